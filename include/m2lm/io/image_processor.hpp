// The preprocessing of CLIP-like encoders: a picture becomes a normalised [3, height, width] tensor.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/image.hpp>

#include <array>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// The steps, in this order: pad to a square, resize, crop the middle, rescale, normalise.
struct ImageProcessorConfig {
  bool pad_to_square = false;                                     ///< with bars of the mean colour
  bool do_resize = true;                                          ///< to the sizes below
  bool do_center_crop = true;                                     ///< to crop_height × crop_width
  bool do_rescale = true;                                         ///< values times rescale_factor
  bool do_normalize = true;                                       ///< (value - mean) / std, channel by channel
  int shortest_edge = 224;                                        ///< resized so that the shorter side has this many pixels …
  int resize_height = 0;                                          ///< … unless this and resize_width are given: then to exactly this size
  int resize_width = 0;                                           ///< in pixels
  int crop_height = 224;                                          ///< in pixels
  int crop_width = 224;                                           ///< in pixels
  double rescale_factor = 1.0 / 255.0;                            ///< from 0 to 255 to what mean and std are of
  std::array<double, 3> mean{0.48145466, 0.4578275, 0.40821073};  ///< red, green, blue
  std::array<double, 3> std{0.26862954, 0.26130258, 0.27577711};  ///< red, green, blue
  Resample resample = Resample::bicubic;                          ///< how it is resized
};

/// CLIP's values for square pictures of `image_size` pixels.
ImageProcessorConfig clip_image_processor(int image_size);

/// Reads preprocessor_config.json; without that file, CLIP's values for `image_size`. `image_aspect_ratio: "pad"` (LLaVA) and
/// `do_pad` ask for the square. throws CheckpointError naming file and key.
ImageProcessorConfig read_image_processor_config(std::string_view directory, int image_size = 224);

/// The same from what such a file holds.
ImageProcessorConfig read_image_processor_config(const ConfigValue& config, int image_size);

/// [3, H, W], RGB. Equal to transformers' CLIPImageProcessor on the same pixels, up to float rounding. throws InputError for an
/// empty image, and when the steps would give more than 2^28 pixels (a picture extremely long and thin).
Tensor<float> preprocess(const Image& image, const ImageProcessorConfig& config);

}  // namespace m2lm
