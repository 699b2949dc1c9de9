// xtensor beside the whole library: its expressions where a picture is expected. Not part of m2lm.hpp; the CMake target is m2lm::xtensor.
// Floor: m2lm. May include: everything.
#pragma once

#include <m2lm/interop/xtensor.hpp>
#include <m2lm/m2lm.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace m2lm::inline M2LM_ABI {

/// The pixels as an xtensor array [height, width, 3]; writes go to the picture, which must outlive it.
inline auto as_xtensor(Image& image) {
  return as_xtensor(View<std::uint8_t, 3>(image.pixels.data(), {image.height, image.width, 3}));
}
/// The same, read-only.
inline auto as_xtensor(const Image& image) {
  return as_xtensor(View<const std::uint8_t, 3>(image.pixels.data(), {image.height, image.width, 3}));
}
void as_xtensor(Image&&) = delete;

/// The values of an expression as a picture, computed now and once: [height, width] or [height, width, 1] is grey, 3 channels are RGB, of 4
/// the last one, alpha, is dropped. Integers stand for 0 to 255, floating-point values for 0 to 1, which are rounded to the nearest of 256.
/// throws InputError for another shape, and naming the first value outside that range, NaN among them.
template <XtensorExpression E>
Image to_image(const E& expression) {
  using T = typename E::value_type;
  static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>, "m2lm::to_image: the values are integers of 0 to 255, or floating-point numbers of 0 to 1");
  const Shape shape = detail::shape_of_expression(expression);
  const std::int64_t channels = shape.rank() == 3 ? shape[2] : 1;
  require<InputError>((shape.rank() == 2 || shape.rank() == 3) && (channels == 1 || channels == 3 || channels == 4) && shape.elements() != 0,
                      "m2lm::to_image: a picture is [height, width] or [height, width, 1, 3 or 4 channels], this is ", shape.string(),
                      ": xt::transpose(x, {1, 2, 0}) puts the channels last");
  // Assigned and not asked for element by element: xtensor's views of an extent of 1 are broadcast in assignments only.
  const auto values = to_tensor(expression);
  const T* next = values.data();
  Image out{.width = shape[1], .height = shape[0], .pixels = {}};
  out.pixels.reserve(static_cast<std::size_t>(3 * out.width * out.height));
  for (std::int64_t y = 0; y < out.height; ++y)
    for (std::int64_t x = 0; x < out.width; ++x)
      for (std::int64_t c = 0; c < channels; ++c) {
        const T value = *next++;
        if (c == 3) continue;  // alpha
        constexpr T most = static_cast<T>(std::is_floating_point_v<T> ? 1 : sizeof(T) == 1 ? 127 : 255);
        if constexpr (!std::is_same_v<T, std::uint8_t>)
          require<InputError>(value >= T{0} && value <= most, "m2lm::to_image: the value ", value, " at row ", y, ", column ", x, ", channel ", c,
                              std::is_floating_point_v<T> ? " is not between 0 and 1, as floating-point pictures have them"
                                                          : " is not between 0 and 255, as pictures of integers have them");
        const auto byte = std::is_floating_point_v<T> ? static_cast<std::uint8_t>(static_cast<double>(value) * 255.0 + 0.5) : static_cast<std::uint8_t>(value);
        out.pixels.insert(out.pixels.end(), channels == 1 ? 3 : 1, byte);
      }
  return out;
}

/// What Prompt::attach and Model::encode make of an expression where a picture is expected.
template <XtensorExpression E>
Image to_input(InputTag<Image>, const E& expression) {
  return to_image(expression);
}

// The functions of io/image.hpp and io/image_processor.hpp for expressions.

/// preprocess(to_image(expression), config).
template <XtensorExpression E>
Tensor<float> preprocess(const E& expression, const ImageProcessorConfig& config) {
  return preprocess(to_image(expression), config);
}
/// resize(to_image(expression), width, height, filter).
template <XtensorExpression E>
Image resize(const E& expression, std::int64_t width, std::int64_t height, Resample filter = Resample::bicubic) {
  return resize(to_image(expression), width, height, filter);
}
/// center_crop(to_image(expression), width, height).
template <XtensorExpression E>
Image center_crop(const E& expression, std::int64_t width, std::int64_t height) {
  return center_crop(to_image(expression), width, height);
}
/// pad_to_square(to_image(expression), fill).
template <XtensorExpression E>
Image pad_to_square(const E& expression, std::array<std::uint8_t, 3> fill) {
  return pad_to_square(to_image(expression), fill);
}
/// The picture, or the expression of one, with `fill` in every pixel whose mask is true. The mask is any expression of bool, [height, width] or
/// [height, width, 1], computed once: pixels > 127, xt::isnan(depth). throws InputError for another shape.
template <class Picture, XtensorExpression M>
  requires(XtensorExpression<Picture> || std::is_same_v<Picture, Image>)
Image masked_fill(const Picture& picture, const M& mask, std::array<std::uint8_t, 3> fill) {
  static_assert(std::is_same_v<typename M::value_type, bool>, "m2lm::masked_fill: a mask is an expression of bool, such as pixels > 127");
  const Tensor<bool> values = to_tensor(mask);
  const Shape& shape = values.shape();
  require<InputError>(shape.rank() == 2 || (shape.rank() == 3 && shape[2] == 1), "m2lm::masked_fill: a mask is [height, width], this one ", shape.string());
  const Matrix<const bool> view(values.data(), {shape[0], shape[1]});
  if constexpr (XtensorExpression<Picture>)
    return masked_fill(to_image(picture), view, fill);
  else
    return masked_fill(picture, view, fill);
}
/// save_png(path, to_image(expression)).
template <XtensorExpression E>
void save_png(std::string_view path, const E& expression) {
  save_png(path, to_image(expression));
}

}  // namespace m2lm
