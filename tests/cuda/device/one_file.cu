// A program in one .cu: the model, its kernels, and an answer. usage: cuda_one_file DIRECTORY; 77 where there is no device.
#include <m2lm/m2lm.cuh>

#include <cstdio>

using Lm = m2lm::Model<m2lm::Cuda, m2lm::Precision{}, m2lm::LlamaDecoder<>>;

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    const Lm model = Lm::from_pretrained(argv[1]);
    const m2lm::Generation answer = model.generate(model.prompt({3, 4, 5}), {.max_new_tokens = 8, .ignore_eos = true});
    for (const std::int32_t token : answer.tokens) std::printf("%d ", token);
    std::printf("\n");
    return answer.tokens.size() == 8 ? 0 : 1;
  } catch (const m2lm::DeviceError& error) {
    std::printf("skipped: no device (%s)\n", error.what());
    return m2lm::cuda::device_count() == 0 ? 77 : 1;
  }
}
