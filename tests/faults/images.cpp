// Probe: pictures against Pillow and CLIPImageProcessor.
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <cmath>
#include <string>

namespace {

std::string file(const std::string& name) { return m2lm_test::source_file("tests/golden/images/" + name); }

double distance(const m2lm::Tensor<float>& a, const m2lm::AnyTensor& b) {
  REQUIRE(a.shape() == b.shape());
  double most = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) most = std::max(most, std::abs(static_cast<double>(a.data()[i]) - b.at(i)));
  return most;
}

}  // namespace

TEST_CASE("bicubic pixels equal Pillow's") {
  const m2lm::Image image = m2lm::load_image(file("rgb_200x150.png"));
  const m2lm::AnyTensor expected = m2lm::Safetensors::open(file("rgb_200x150.safetensors")).tensor("bicubic.32x24");
  const m2lm::Image small = m2lm::resize(image, 32, 24);
  std::int64_t differ = 0;
  for (std::size_t i = 0; i < small.pixels.size(); ++i) differ += std::abs(expected.at(static_cast<std::int64_t>(i)) - small.pixels[i]) > 0 ? 1 : 0;
  CHECK(differ == 0);
}

TEST_CASE("pixel values equal CLIPImageProcessor's") {
  for (const char* name : {"rgb_200x150", "rgb_33x97", "rgb_64x64"}) {
    const m2lm::Image image = m2lm::load_image(file(std::string(name) + ".png"));
    const m2lm::Safetensors golden = m2lm::Safetensors::open(file(std::string(name) + ".safetensors"));
    m2lm::ImageProcessorConfig config = m2lm::clip_image_processor(28);
    CHECK(distance(m2lm::preprocess(image, config), golden.tensor("pixel_values")) < 1e-5);
    config.pad_to_square = true;
    CHECK(distance(m2lm::preprocess(image, config), golden.tensor("pixel_values_pad")) < 1e-5);
  }
}
