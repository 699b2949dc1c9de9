// Preprocessing with xtensor: cuts, mirrors and masks a picture by expressions that are computed when the model asks for the pixels.
// usage: own_pixels [MODEL_DIRECTORY [PICTURE]]
#include <m2lm/xtensor.hpp>

#if __has_include(<xtensor/views/xview.hpp>)  // since xtensor 0.26
#include <xtensor/core/xmath.hpp>
#include <xtensor/misc/xmanipulation.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xmanipulation.hpp>
#include <xtensor/xmath.hpp>
#include <xtensor/xview.hpp>
#endif

#include <cstdio>
#include <exception>

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

int main(int argc, char** argv) try {
  const Vlm model = Vlm::from_pretrained(argc > 1 ? argv[1] : "assets/easy-vqa");
  const m2lm::Image picture = m2lm::load_image(argc > 2 ? argv[2] : "assets/easy-vqa/pictures/0.png");
  const auto ask = [&](const char* what, const auto& pixels) {
    auto prompt = model.prompt("<image>\nWhat shape is in the image?");
    prompt.attach<"image">(pixels);
    const std::string answer = model.generate(prompt, {.max_new_tokens = 16}).text;
    std::printf("%-9s %s\n", what, answer.c_str());
    return answer;
  };

  const auto pixels = m2lm::as_xtensor(picture);  // [height, width, 3], the picture's own bytes
  const auto mirrored = xt::flip(pixels, 1);
  const auto darker = pixels / 255.0F * 0.9F;  // floating-point pictures are 0 to 1
  // A mask, [height, width]: dark pixels become black.
  const auto dark = xt::amax(pixels, {2}) < 64;
  const m2lm::Image masked = m2lm::masked_fill(pixels, dark, {0, 0, 0});

  const std::string answer = ask("as it is", picture);
  return ask("pixels", pixels) == answer && ask("mirrored", mirrored) == answer && !ask("darker", darker).empty() && !ask("masked", masked).empty() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "own_pixels: %s\n", error.what());
  return 1;
}
