// A program that includes everything and needs the libraries behind it: it asks for a checkpoint that is not there.
#include <m2lm/m2lm.hpp>

#include <cstdio>
#include <string_view>

static_assert(__cplusplus >= 202002L);
#if defined(M2LM_EXPECT_SEPARATE_IMPL) != defined(M2LM_SEPARATE_IMPL)
#error "the target and its definition M2LM_SEPARATE_IMPL disagree"
#endif

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

int main() {
  try {
    Vlm::from_pretrained("no-such-directory");
  } catch (const m2lm::Error& error) {
    std::puts(error.what());
    return std::string_view(error.what()).find("no-such-directory") != std::string_view::npos ? 0 : 1;
  }
  return 1;
}
