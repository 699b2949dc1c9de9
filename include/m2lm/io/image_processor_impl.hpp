// Definitions of io/image_processor.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/gguf_model.hpp>
#include <m2lm/io/image_impl.hpp>
#include <m2lm/io/image_processor.hpp>

#include <algorithm>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr int max_processor_size = 1 << 14;

M2LM_IMPL int processor_size(const ConfigValue& value) {
  const int size = value.as<int>();
  if (size < 1 || size > max_processor_size) value.fail(concat("must be between 1 and ", max_processor_size, ", found ", size));
  return size;
}

M2LM_IMPL std::array<double, 3> processor_channels(const ConfigValue& config, std::string_view key, std::array<double, 3> fallback,
                                                   bool divisor) {
  if (!config.has_value(key)) return fallback;
  const auto values = config.get_list<double>(key);
  if (values.size() != 3) config[key].fail(concat("must be three numbers, one for each of red, green and blue, found ", values.size()));
  for (const double value : values)
    if (!std::isfinite(value) || (divisor && value == 0.0)) config[key].fail(divisor ? "must be finite and not 0" : "must be finite");
  return {values[0], values[1], values[2]};
}

}  // namespace detail

M2LM_IMPL ImageProcessorConfig clip_image_processor(int image_size) {
  ImageProcessorConfig out;
  out.shortest_edge = out.crop_height = out.crop_width = image_size;
  return out;
}

M2LM_IMPL ImageProcessorConfig read_image_processor_config(std::string_view directory, int image_size) {
  std::string path = join_path(directory, "preprocessor_config.json");
  ConfigValue config;
  if (file_exists(path)) {
    config = ConfigValue::parse_file(path);
  } else {
    // transformers 5 may write all processors of a model into one file.
    path = join_path(directory, "processor_config.json");
    if (!file_exists(path)) {
      const auto gguf = GgufModel::find(directory);
      return gguf && gguf->vision ? gguf->image_processor() : clip_image_processor(image_size);
    }
    config = ConfigValue::parse_file(path);
    if (!config.has_value("image_processor")) return clip_image_processor(image_size);
    config = config["image_processor"];
  }
  return read_image_processor_config(config, image_size);
}

M2LM_IMPL ImageProcessorConfig read_image_processor_config(const ConfigValue& config, int image_size) {
  ImageProcessorConfig out = clip_image_processor(image_size);
  if (!config.is_object()) config.fail("must be an object");

  if (config.has_value("size")) {
    const ConfigValue size = config["size"];
    if (!size.is_object()) {
      out.shortest_edge = detail::processor_size(size);
    } else if (size.has_value("shortest_edge")) {
      if (size.has_value("longest_edge")) size.fail("a longest_edge beside shortest_edge is not supported yet");
      out.shortest_edge = detail::processor_size(size["shortest_edge"]);
    } else {
      out.resize_height = detail::processor_size(size["height"]);
      out.resize_width = detail::processor_size(size["width"]);
    }
  }
  if (config.has_value("crop_size")) {
    const ConfigValue size = config["crop_size"];
    if (!size.is_object()) {
      out.crop_height = out.crop_width = detail::processor_size(size);
    } else {
      out.crop_height = detail::processor_size(size["height"]);
      out.crop_width = detail::processor_size(size["width"]);
    }
  }
  out.do_resize = config.get_or("do_resize", out.do_resize);
  out.do_center_crop = config.get_or("do_center_crop", out.do_center_crop);
  out.do_rescale = config.get_or("do_rescale", out.do_rescale);
  out.do_normalize = config.get_or("do_normalize", out.do_normalize);
  out.pad_to_square = config.get_or("do_pad", false) || config.get_or("image_aspect_ratio", "") == "pad";
  out.rescale_factor = config.get_or("rescale_factor", out.rescale_factor);
  out.mean = detail::processor_channels(config, "image_mean", out.mean, false);
  out.std = detail::processor_channels(config, "image_std", out.std, true);
  if (config.has_value("resample")) {
    switch (config.get<int>("resample")) {  // Pillow's numbers
      case 0: out.resample = Resample::nearest; break;
      case 1: out.resample = Resample::lanczos; break;
      case 2: out.resample = Resample::bilinear; break;
      case 3: out.resample = Resample::bicubic; break;
      case 4: out.resample = Resample::box; break;
      default: config["resample"].fail("is not a filter that is supported: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box");
    }
  }
  return out;
}

M2LM_IMPL Tensor<float> preprocess(const Image& image, const ImageProcessorConfig& config) {
  detail::check_image(image, "m2lm::preprocess");
  const Image* source = &image;
  Image square;
  if (config.pad_to_square) {
    std::array<std::uint8_t, 3> fill{};
    for (std::size_t c = 0; c < 3; ++c) fill[c] = static_cast<std::uint8_t>(std::clamp(config.mean[c] * 255.0, 0.0, 255.0));
    square = pad_to_square(image, fill);
    source = &square;
  }
  std::int64_t width = source->width, height = source->height;
  if (config.do_resize && config.resize_height > 0) {
    width = config.resize_width;
    height = config.resize_height;
  } else if (config.do_resize) {
    std::int64_t& shorter = width <= height ? width : height;
    std::int64_t& longer = width <= height ? height : width;
    longer = (config.shortest_edge * longer + (M2LM_FAULT(9) ? shorter - 1 : 0)) / shorter;
    shorter = config.shortest_edge;
  }
  const std::int64_t out_width = config.do_center_crop ? config.crop_width : width;
  const std::int64_t out_height = config.do_center_crop ? config.crop_height : height;
  const Image pixels = detail::resize_and_crop(*source, width, height, out_width, out_height, config.resample);

  // Each of the 256 values once per channel, in double: what transformers computes in float differs by its rounding only.
  std::array<std::array<float, 256>, 3> table{};
  for (std::size_t c = 0; c < 3; ++c) {
    const std::size_t channel = M2LM_FAULT(2) ? 2 - c : c;
    for (std::size_t v = 0; v < 256; ++v) {
      double value = static_cast<double>(v);
      if (config.do_rescale) value *= config.rescale_factor;
      if (config.do_normalize) value = (value - config.mean[channel]) / config.std[channel];
      table[c][v] = static_cast<float>(value);
    }
  }
  Tensor<float> out(Shape{3, out_height, out_width});
  const std::int64_t area = out_width * out_height;
  for (std::int64_t c = 0; c < 3; ++c)
    for (std::int64_t i = 0; i < area; ++i)
      out.data()[c * area + i] = table[static_cast<std::size_t>(c)][pixels.pixels[static_cast<std::size_t>(3 * i + c)]];
  return out;
}

}  // namespace m2lm
