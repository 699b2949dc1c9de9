// Pictures: any bytes are decoded to the size that the limits allow, or refused.
#include "fuzz.hpp"

#include <m2lm/io/image.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr m2lm::ImageLimits limits{.max_width = 256, .max_height = 256, .max_pixels = 1 << 14, .max_file_bytes = 1 << 20};
  m2lm_fuzz::accepted([&] {
    const m2lm::Image image = m2lm::decode_image(std::as_bytes(std::span(data, size)), "fuzzed image", limits);
    m2lm_fuzz::check(image.width > 0 && image.width <= limits.max_width && image.height > 0 && image.height <= limits.max_height &&
                         image.width * image.height <= limits.max_pixels,
                     "a decoded image is within the limits");
    m2lm_fuzz::check(image.pixels.size() == static_cast<std::size_t>(3 * image.width * image.height), "a decoded image has all its pixels");
  });
  return 0;
}
