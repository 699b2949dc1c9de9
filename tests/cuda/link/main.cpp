// A program of a user whose compiler is not nvcc: its model comes from m2lm_instantiate. Without a device it says so.
#include "models.hpp"

#include <cstdio>

int main() {
  try {
    const program::CudaVlm model = program::CudaVlm::from_pretrained("no-such-directory");
    auto prompt = model.prompt("<image>\nWhat shape is in the image?");
    prompt.attach<"image">(m2lm::load_image("no-such-picture"));
    model.generate(prompt, {.max_new_tokens = 1});
  } catch (const m2lm::DeviceError& error) {
    std::printf("DeviceError: %s\n", error.what());
    return 0;
  } catch (const m2lm::CheckpointError& error) {  // there is a device
    std::printf("CheckpointError: %s\n", error.what());
    return 0;
  }
  return 1;
}
