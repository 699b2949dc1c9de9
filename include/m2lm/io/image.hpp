// Image: 8-bit RGB pictures, decoding, and the geometry that vision encoders ask for.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/core/view.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// RGB, 8 bits, row-major: pixel (x, y) starts at 3 · (y · width + x).
struct Image {
  std::int64_t width = 0;            ///< pixels in a row
  std::int64_t height = 0;           ///< rows
  std::vector<std::uint8_t> pixels;  ///< 3 · width · height

  /// True without pixels.
  bool empty() const { return pixels.empty(); }
};

/// What a decoder may be asked to allocate; larger pictures are refused from their header, before any pixel is read.
struct ImageLimits {
  std::int64_t max_width = std::int64_t{1} << 16;     ///< pixels in a row
  std::int64_t max_height = std::int64_t{1} << 16;    ///< rows
  std::int64_t max_pixels = std::int64_t{1} << 28;    ///< width times height
  std::size_t max_file_bytes = std::size_t{1} << 30;  ///< of the encoded picture
};

/// JPEG, PNG, BMP, GIF (its first frame) or binary PNM, as Pillow's convert("RGB") gives it: grey and palettes are spread, alpha is
/// dropped, of 16-bit colours the upper 8 bits are kept, and 16-bit grey is clipped at 255.
/// throws InputError naming the file: missing, empty, damaged, of an unknown format, or over the limits.
Image load_image(std::string_view path, const ImageLimits& limits = {});
/// The same from memory; `name` stands for the file in messages.
Image decode_image(std::span<const std::byte> bytes, std::string_view name = "image", const ImageLimits& limits = {});

/// Writes a PNG, atomically. throws InputError for an image whose pixels do not fit its size; otherwise as FileWriter.
void save_png(std::string_view path, const Image& image);

/// The filters of Pillow's Image.resize. `nearest` takes the pixel under the centre; the others are antialiased.
enum class Resample : std::uint8_t { nearest, box, bilinear, bicubic, lanczos };

/// Bit-equal to the Image.resize((width, height), filter) of Pillow 13 on RGB images: two passes with 8-bit values between them and
/// 22-bit fixed-point coefficients; the vertical pass is the first when the height loses over twice the pixels the width loses. requires width, height > 0 and a non-empty image. throws InputError.
Image resize(const Image& image, std::int64_t width, std::int64_t height, Resample filter = Resample::bicubic);

/// The middle of the image; where it is smaller than asked, it lies in the middle of black, as in transformers' center_crop.
Image center_crop(const Image& image, std::int64_t width, std::int64_t height);

/// The image in the middle of a square of its longer side (LLaVA's expand2square).
Image pad_to_square(const Image& image, std::array<std::uint8_t, 3> fill);

/// The image with `fill` in every pixel whose mask is true, as torch.Tensor.masked_fill. requires mask [height, width] and a non-empty
/// image. throws InputError.
Image masked_fill(const Image& image, Matrix<const bool> mask, std::array<std::uint8_t, 3> fill);

}  // namespace m2lm
