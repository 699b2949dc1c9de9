// Definitions of io/image.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/interop/stb.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/image.hpp>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr std::int64_t max_image_pixels = std::int64_t{1} << 28;

M2LM_IMPL std::string size_string(std::int64_t width, std::int64_t height) { return concat(width, " x ", height); }

/// throws InputError unless `image` is not empty and its pixels fit its size.
M2LM_IMPL void check_image(const Image& image, std::string_view who) {
  require<InputError>(image.width > 0 && image.height > 0, who, ": the image is empty (", size_string(image.width, image.height), ")");
  require<InputError>(image.height <= std::numeric_limits<std::int64_t>::max() / 3 / image.width &&
                          image.pixels.size() == static_cast<std::size_t>(3 * image.width * image.height),
                      who, ": an RGB image of ", size_string(image.width, image.height), " has 3 bytes for each pixel, found ",
                      image.pixels.size(), " bytes");
}

M2LM_IMPL Image blank_image(std::int64_t width, std::int64_t height, std::string_view who) {
  require<InputError>(width > 0 && height > 0 && height <= max_image_pixels / width, who, ": a size of ", size_string(width, height),
                      " is not between 1 and 2^28 pixels");
  Image out;
  out.width = width;
  out.height = height;
  out.pixels.resize(static_cast<std::size_t>(3 * width * height));
  return out;
}

/// What the first bytes of a file say it is.
M2LM_IMPL std::string_view image_format(std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.starts_with("\x89PNG\r\n\x1a\n")) return "PNG";
  if (text.starts_with("\xff\xd8")) return "JPEG";
  if (text.starts_with("GIF87a") || text.starts_with("GIF89a")) return "GIF";
  if (text.starts_with("BM")) return "BMP";
  if (text.starts_with("P5") || text.starts_with("P6")) return "PNM";
  if (text.starts_with("RIFF") && text.size() >= 12 && text.substr(8, 4) == "WEBP") return "WebP";
  if (text.size() >= 12 && text.substr(4, 4) == "ftyp") return "AVIF, HEIC or a video";
  if (text.starts_with(std::string_view("II*\0", 4)) || text.starts_with(std::string_view("MM\0*", 4))) return "TIFF";
  return "";
}

/// False when a Huffman table of a JPEG promises more than the 256 codes there can be. stb_image before 2.28 does not look, and
/// writes past its tables. Walks the markers as stb does: from segment to segment by their lengths, on to the next marker where
/// there is none, and over the data of a scan; where the two might part, stb stops with an error.
M2LM_IMPL bool jpeg_tables_fit(std::span<const std::byte> bytes) {
  const std::size_t size = bytes.size();
  const auto at = [&](std::size_t i) { return i < size ? std::to_integer<unsigned>(bytes[i]) : 0U; };
  for (std::size_t i = 2; i < size;) {
    while (i < size && at(i) != 0xff) ++i;
    while (i < size && at(i) == 0xff) ++i;
    const unsigned marker = at(i++);
    if (marker == 0x00 || marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) continue;  // stuffing, restarts: no length follows
    if (marker == 0xd9) return true;  // the end; nothing after it is read
    const std::size_t end = i + (at(i) << 8U) + at(i + 1);
    if (marker == 0xc4) {
      for (std::size_t table = i + 2; table < end && table < size;) {
        unsigned codes = 0;
        for (std::size_t k = 1; k <= 16; ++k) codes += at(table + k);
        if (codes > 256) return false;
        table += 17 + codes;
      }
    }
    i = std::max(end, i);
  }
  return true;
}

/// False when a data chunk of a PNG promises more bytes than the file has. stb allocates what a chunk promises before it reads: up to
/// 2 GiB for a file of 60 bytes. Walks the chunks as stb does.
M2LM_IMPL bool png_chunks_fit(std::span<const std::byte> bytes) {
  const auto number = [&](std::size_t i) {
    std::uint32_t n = 0;
    for (std::size_t k = 0; k < 4; ++k) n = n << 8U | std::to_integer<std::uint32_t>(bytes[i + k]);
    return n;
  };
  for (std::size_t i = 8; i <= bytes.size() && bytes.size() - i >= 8;) {  // behind the signature: length, type, data, checksum
    const std::size_t length = number(i), type = number(i + 4), rest = bytes.size() - i - 8;
    if (length > rest) return type != 0x49444154;  // "IDAT"; stb skips the others to the end of the file
    i += 8 + length + 4;
  }
  return true;
}

/// A BMP may hold more between its header and its pixels than stb knows: Windows repeats the colour masks behind the header of
/// version 5. Returns the file without that, or nothing when there is none.
M2LM_IMPL std::vector<std::byte> bmp_without_gap(std::span<const std::byte> bytes) {
  if (bytes.size() < 54) return {};
  const auto number = [&](std::size_t i, std::size_t count) {
    std::size_t n = 0;
    for (std::size_t k = count; k > 0; --k) n = n << 8U | std::to_integer<std::size_t>(bytes[i + k - 1]);
    return n;
  };
  const std::size_t pixels = number(10, 4), header = number(14, 4), bits = number(28, 2), compression = number(30, 4);
  if (bits < 16 || header < 40 || header > 124) return {};
  const std::size_t end = 14 + header + ((header == 40 || header == 56) && compression == 3 && bits != 24 ? 12 : 0);
  if (pixels <= end || pixels > bytes.size()) return {};
  std::vector<std::byte> out(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(end));
  for (std::size_t k = 0; k < 4; ++k) out[10 + k] = static_cast<std::byte>(end >> (8 * k) & 0xffU);
  out.insert(out.end(), bytes.begin() + static_cast<std::ptrdiff_t>(pixels), bytes.end());
  return out;
}

/// False when `bytes` cannot hold so many pixels, whatever they show: a decoder takes memory for what the header promises. Deflate makes at
/// most 1032 bytes of one; a block of a JPEG or a code of a GIF takes a bit or more; small pictures are always let through.
M2LM_IMPL bool pixels_fit(std::span<const std::byte> bytes, std::string_view format, std::int64_t width, std::int64_t height) {
  const auto size = static_cast<std::int64_t>(bytes.size());
  const std::int64_t pixels = width * height;  // within the limits: no overflow
  const auto byte = [&](std::size_t i) { return i < bytes.size() ? std::to_integer<std::int64_t>(bytes[i]) : 0; };
  if (format == "BMP") {
    const std::int64_t bits = byte(14) == 12 ? byte(24) : byte(28);  // 12: the header of OS/2
    const std::int64_t begin = byte(10) + (byte(11) << 8) + (byte(12) << 16) + (byte(13) << 24);
    return (width * bits + 31) / 32 * 4 * (height - 1) + (width * bits + 7) / 8 <= size - begin;
  }
  if (pixels <= std::int64_t{1} << 22) return true;
  if (format == "PNG") {
    const std::int64_t channels = byte(25) == 2 ? 3 : byte(25) == 6 ? 4 : byte(25) == 4 ? 2 : 1;
    return (width * byte(24) * channels + 7) / 8 * height / 1032 <= size;
  }
  return pixels / 8192 <= size;
}

M2LM_IMPL void check_limits(std::int64_t width, std::int64_t height, std::string_view name, const ImageLimits& limits) {
  require<InputError>(width > 0 && height > 0, name, ": the image is empty (", size_string(width, height), ")");
  const auto check = [&](bool ok, std::int64_t limit, std::string_view what, std::string_view option) {
    require<InputError>(ok, name, ": the image of ", size_string(width, height), " pixels is over the limit of ", limit, what, " (ImageLimits::", option, ")");
  };
  check(width <= limits.max_width, limits.max_width, " pixels of width", "max_width");
  check(height <= limits.max_height, limits.max_height, " pixels of height", "max_height");
  check(height <= limits.max_pixels / width, limits.max_pixels, " pixels in all", "max_pixels");  // the product may not fit a number
}

/// Binary PNM (P5 grey, P6 colour). Values are scaled to 255 as Pillow does; grey of 16 bits is clipped, as Pillow does, too.
M2LM_IMPL Image decode_pnm(std::span<const std::byte> bytes, std::string_view name, const ImageLimits& limits) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const bool colour = text[1] == '6';
  std::size_t at = 2;
  const auto number = [&](std::string_view what) {
    while (at < text.size() && (text[at] == '#' || text[at] == ' ' || (text[at] >= '\t' && text[at] <= '\r'))) {
      if (text[at] == '#') at = std::min(text.find('\n', at), text.size() - 1);
      ++at;
    }
    std::int64_t value = 0;
    const std::size_t begin = at;
    while (at < text.size() && text[at] >= '0' && text[at] <= '9' && at - begin < 10) value = value * 10 + (text[at++] - '0');
    require<InputError>(at > begin, name, ": the PNM image cannot be read: its header lacks the ", what, "; the file is damaged or truncated");
    return value;
  };
  const std::int64_t width = number("width"), height = number("height"), largest = number("largest value");
  check_limits(width, height, name, limits);
  require<InputError>(largest >= 1 && largest <= 65535, name, ": the PNM image cannot be read: its largest value is ", largest);
  ++at;  // one character of white space
  const std::size_t size = largest > 255 ? 2 : 1, values = static_cast<std::size_t>(width * height * (colour ? 3 : 1));
  require<InputError>(at <= text.size() && values <= (text.size() - at) / size, name, ": the PNM image of ", size_string(width, height),
                      " takes ", values * size, " bytes, the file is truncated");
  Image out;
  out.width = width;
  out.height = height;
  out.pixels.resize(static_cast<std::size_t>(3 * width * height));
  const auto* p = reinterpret_cast<const std::uint8_t*>(bytes.data()) + at;
  const double target = size == 2 && !colour ? 65535.0 : 255.0;
  for (std::size_t i = 0; i < values; ++i) {
    const int value = size == 2 ? p[2 * i] * 256 + p[2 * i + 1] : p[i];
    const auto scaled = static_cast<std::uint8_t>(std::min(std::nearbyint(value / static_cast<double>(largest) * target), 255.0));
    if (colour)
      out.pixels[i] = scaled;
    else
      std::fill_n(out.pixels.begin() + static_cast<std::ptrdiff_t>(3 * i), 3, scaled);
  }
  return out;
}

}  // namespace detail

M2LM_IMPL Image decode_image(std::span<const std::byte> bytes, std::string_view name, const ImageLimits& limits) try {
  require<InputError>(!bytes.empty(), name, ": the image is empty (0 bytes)");
  require<InputError>(bytes.size() <= limits.max_file_bytes && bytes.size() <= static_cast<std::size_t>(INT_MAX), name, ": the image has ",
                      bytes.size(), " bytes, more than the limit of ", std::min<std::size_t>(limits.max_file_bytes, INT_MAX), " (ImageLimits::max_file_bytes)");
  const std::string_view format = detail::image_format(bytes);
  require<InputError>(!format.empty(), name, ": is not an image in a known format; JPEG, PNG, BMP, GIF and binary PNM are read");
  const bool supported = format == "PNG" || format == "JPEG" || format == "GIF" || format == "BMP" || format == "PNM";
  require<InputError>(supported, name, ": the image format ", format, " is not supported; JPEG, PNG, BMP, GIF and binary PNM are");
  if (format == "PNM") return detail::decode_pnm(bytes, name, limits);
  require<InputError>(format != "JPEG" || detail::jpeg_tables_fit(bytes), name,
                      ": the JPEG image cannot be read: a Huffman table has more than 256 codes; the file is damaged");
  require<InputError>(format != "PNG" || detail::png_chunks_fit(bytes), name,
                      ": the PNG image cannot be read: a data chunk is longer than the file; the file is damaged or truncated");
  const std::vector<std::byte> mended = format == "BMP" ? detail::bmp_without_gap(bytes) : std::vector<std::byte>();
  if (!mended.empty()) bytes = mended;
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  const int size = static_cast<int>(bytes.size());
  int width = 0, height = 0, channels = 0;
  detail::stb::out_of_memory = false;
  if (!detail::stb::m2lm_stbi_info_from_memory(data, size, &width, &height, &channels)) {
    if (detail::stb::out_of_memory) throw std::bad_alloc();
    // stb tries all formats in turn and keeps the reason of the last only.
    throw InputError(concat(name, ": the ", format, " image cannot be read: its header is damaged, truncated or promises too many pixels",
                            format == "JPEG" ? ", or the picture is of 12 bits or coded arithmetically, which is not supported" : ""));
  }
  detail::check_limits(width, height, name, limits);
  require<InputError>(detail::pixels_fit(bytes, format, width, height), name, ": the ", format, " image of ", detail::size_string(width, height), " pixels cannot be in ",
                      bytes.size(), " bytes; the file is damaged or truncated");
  // Pillow does not scale 16-bit grey (its mode I;16) but clips it at 255; stb's upper byte would be another picture.
  const bool clipped = channels == 1 && detail::stb::m2lm_stbi_is_16_bit_from_memory(data, size) != 0;
  const auto release = [](void* p) { detail::stb::m2lm_stbi_image_free(p); };
  const std::unique_ptr<void, void (*)(void*)> decoded(
      clipped ? static_cast<void*>(detail::stb::m2lm_stbi_load_16_from_memory(data, size, &width, &height, &channels, 1))
              : detail::stb::m2lm_stbi_load_from_memory(data, size, &width, &height, &channels, 3),
      release);
  if (!decoded) {
    const char* reason = detail::stb::m2lm_stbi_failure_reason();
    if (detail::stb::out_of_memory) throw std::bad_alloc();
    throw InputError(concat(name, ": the ", format, " image cannot be read: ", reason && *reason ? reason : "its data end early or contradict its header",
                            "; the file is damaged or truncated"));
  }
  Image out;
  out.width = width;
  out.height = height;
  const std::size_t area = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
  if (clipped) {
    const auto* grey = static_cast<const std::uint16_t*>(decoded.get());
    out.pixels.resize(3 * area);
    for (std::size_t i = 0; i < 3 * area; ++i) out.pixels[i] = static_cast<std::uint8_t>(std::min<int>(grey[i / 3], 255));
  } else {
    const auto* rgb = static_cast<const std::uint8_t*>(decoded.get());
    out.pixels.assign(rgb, rgb + 3 * area);
  }
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a picture");
}

M2LM_IMPL Image load_image(std::string_view path, const ImageLimits& limits) try {
  const std::string bytes = read_file(path, limits.max_file_bytes);
  return decode_image(std::as_bytes(std::span(bytes.data(), bytes.size())), path, limits);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a picture");
}

M2LM_IMPL void save_png(std::string_view path, const Image& image) {
  detail::check_image(image, path);
  require<InputError>(image.pixels.size() < static_cast<std::size_t>(INT_MAX) / 2, path, ": an image of ",
                      detail::size_string(image.width, image.height), " is too large for the PNG writer");
  int size = 0;
  const std::unique_ptr<unsigned char, void (*)(void*)> png(
      detail::stb::stbi_write_png_to_mem(image.pixels.data(), static_cast<int>(3 * image.width), static_cast<int>(image.width),
                                         static_cast<int>(image.height), 3, &size),
      [](void* p) { std::free(p); });
  require<CapacityError>(png != nullptr, path, ": not enough memory to write the image");
  write_file(path, std::as_bytes(std::span(png.get(), static_cast<std::size_t>(size))));
}

namespace detail {

/// Half the width of a filter, in source pixels when the size does not change.
M2LM_IMPL double filter_support(Resample filter) {
  switch (filter) {
    case Resample::nearest: return 0.0;
    case Resample::box: return 0.5;
    case Resample::bilinear: return 1.0;
    case Resample::bicubic: return 2.0;
    case Resample::lanczos: return 3.0;
  }
  return 0.0;
}

M2LM_IMPL double filter_value(Resample filter, double x) {
  const auto sinc = [](double t) { return t == 0.0 ? 1.0 : std::sin(t * 3.14159265358979323846) / (t * 3.14159265358979323846); };
  const double a = std::abs(x);
  switch (filter) {
    case Resample::nearest: break;
    case Resample::box: return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
    case Resample::bilinear: return a < 1.0 ? 1.0 - a : 0.0;
    case Resample::bicubic:  // Keys, a = -1/2
      if (a < 1.0) return (1.5 * a - 2.5) * a * a + 1.0;
      return a < 2.0 ? (((a - 5.0) * a + 8.0) * a - 4.0) * -0.5 : 0.0;
    case Resample::lanczos: return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
  }
  return 0.0;
}

/// For each of `count` output positions from `begin` on: the source range and its weights in 22-bit fixed point.
struct ResampleTaps {
  std::vector<std::int64_t> first, taps;
  std::vector<std::int32_t> weights;  // [count, stride]
  std::int64_t stride = 0;
};

inline constexpr int resample_bits = 22;  // 8 bits of a pixel and 2 for overshoot leave 22 of 32

M2LM_IMPL ResampleTaps resample_taps(std::int64_t in_size, std::int64_t out_size, std::int64_t begin, std::int64_t count, Resample filter) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  double widening = std::max(scale, 1.0);  // antialiasing: shrinking widens the filter
  if (M2LM_FAULT(1)) widening = 1.0;
  const double support = filter_support(filter) * widening;
  ResampleTaps out;
  out.stride = std::min(static_cast<std::int64_t>(std::ceil(support)) * 2 + 1, in_size);
  out.first.resize(static_cast<std::size_t>(count));
  out.taps.resize(static_cast<std::size_t>(count));
  out.weights.resize(static_cast<std::size_t>(count * out.stride));
  std::vector<double> weight(static_cast<std::size_t>(out.stride));
  for (std::int64_t i = 0; i < count; ++i) {
    const double center = (static_cast<double>(begin + i) + 0.5) * scale;
    const std::int64_t first = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5), 0);
    const std::int64_t end = std::min(static_cast<std::int64_t>(center + support + 0.5), in_size);
    const std::int64_t taps = std::clamp<std::int64_t>(end - first, 0, out.stride);
    double sum = 0.0;
    for (std::int64_t k = 0; k < taps; ++k) {
      const double w = filter_value(filter, (static_cast<double>(k + first) - center + 0.5) * (1.0 / widening));
      weight[static_cast<std::size_t>(k)] = w;
      sum += w;
    }
    out.first[static_cast<std::size_t>(i)] = first;
    out.taps[static_cast<std::size_t>(i)] = taps;
    for (std::int64_t k = 0; k < taps; ++k) {
      double w = weight[static_cast<std::size_t>(k)];
      if (sum != 0.0) w /= sum;
      w *= 1 << resample_bits;
      out.weights[static_cast<std::size_t>(i * out.stride + k)] = static_cast<std::int32_t>(w < 0.0 ? w - 0.5 : w + 0.5);
    }
  }
  return out;
}

/// Source positions of nearest-neighbour sampling.
M2LM_IMPL std::vector<std::int64_t> nearest_positions(std::int64_t in_size, std::int64_t out_size, std::int64_t begin, std::int64_t count) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  std::vector<std::int64_t> out;
  double position = scale * 0.5;
  for (std::int64_t i = 0; i < begin + count; ++i, position += scale)  // summed, not multiplied, as Pillow does
    if (i >= begin) out.push_back(std::min(static_cast<std::int64_t>(position), in_size - 1));
  return out;
}

M2LM_IMPL std::uint8_t fixed_to_byte(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> resample_bits, 0, 255));
}

/// Source positions [begin, end) that `taps` read.
struct ResampleRange {
  std::int64_t begin = 0, end = 0;
};
M2LM_IMPL ResampleRange taps_range(const ResampleTaps& taps) {
  ResampleRange out{taps.first[0], 0};
  for (std::size_t i = 0; i < taps.first.size(); ++i) {
    out.begin = std::min(out.begin, taps.first[i]);
    out.end = std::max(out.end, taps.first[i] + taps.taps[i]);
  }
  return out;
}

M2LM_IMPL std::int32_t resample_half() { return M2LM_FAULT(6) ? 0 : 1 << (resample_bits - 1); }

/// Each row of `source` (`source_width` pixels, of which the first is number `first` of the picture) through the taps.
M2LM_IMPL void resample_across(const std::uint8_t* source, std::int64_t source_width, std::int64_t first, std::int64_t rows,
                               const ResampleTaps& taps, std::uint8_t* target) {
  for (std::int64_t r = 0; r < rows; ++r, source += 3 * source_width)
    for (std::size_t c = 0; c < taps.first.size(); ++c, target += 3) {
      const std::uint8_t* p = source + 3 * (taps.first[c] - first);
      const std::int32_t* w = taps.weights.data() + static_cast<std::int64_t>(c) * taps.stride;
      std::int32_t red = resample_half(), green = red, blue = red;
      for (std::int64_t k = 0; k < taps.taps[c]; ++k, p += 3) {
        red += w[k] * p[0];
        green += w[k] * p[1];
        blue += w[k] * p[2];
      }
      target[0] = fixed_to_byte(red);
      target[1] = fixed_to_byte(green);
      target[2] = fixed_to_byte(blue);
    }
}

/// The first `columns` pixels of rows that lie `source_width` pixels apart, of which the first is number `first` of the picture.
M2LM_IMPL void resample_down(const std::uint8_t* source, std::int64_t source_width, std::int64_t first, std::int64_t columns,
                             const ResampleTaps& taps, std::uint8_t* target) {
  std::vector<std::int32_t> sums(static_cast<std::size_t>(3 * columns));  // a row at a time, so that memory is read in order
  for (std::size_t r = 0; r < taps.first.size(); ++r) {
    std::fill(sums.begin(), sums.end(), resample_half());
    for (std::int64_t k = 0; k < taps.taps[r]; ++k) {
      const std::int32_t w = taps.weights[static_cast<std::size_t>(static_cast<std::int64_t>(r) * taps.stride + k)];
      const std::uint8_t* p = source + 3 * (taps.first[r] + k - first) * source_width;
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += w * p[i];
    }
    for (const std::int32_t sum : sums) *target++ = fixed_to_byte(sum);
  }
}

/// Columns [x, x + columns) and rows [y, y + rows) of the image resized to width x height; nothing outside is computed.
M2LM_IMPL Image resize_part(const Image& image, std::int64_t width, std::int64_t height, std::int64_t x, std::int64_t y,
                            std::int64_t columns, std::int64_t rows, Resample filter) {
  Image out = blank_image(columns, rows, "m2lm::resize");
  if (filter == Resample::nearest) {
    const auto xs = nearest_positions(image.width, width, x, columns), ys = nearest_positions(image.height, height, y, rows);
    std::uint8_t* target = out.pixels.data();
    for (const std::int64_t sy : ys)
      for (const std::int64_t sx : xs) target = std::copy_n(image.pixels.data() + 3 * (sy * image.width + sx), 3, target);
    return out;
  }
  // An axis that keeps its length is not filtered.
  const bool across = width != image.width, down = height != image.height;
  const ResampleTaps across_taps = across ? resample_taps(image.width, width, x, columns, filter) : ResampleTaps{};
  const ResampleTaps down_taps = down ? resample_taps(image.height, height, y, rows, filter) : ResampleTaps{};
  const ResampleRange source_columns = across ? taps_range(across_taps) : ResampleRange{x, x + columns};
  const ResampleRange source_rows = down ? taps_range(down_taps) : ResampleRange{y, y + rows};
  const std::int64_t needed_columns = source_columns.end - source_columns.begin, needed_rows = source_rows.end - source_rows.begin;
  const std::uint8_t* source = image.pixels.data() + 3 * (source_rows.begin * image.width + source_columns.begin);
  std::uint8_t* target = out.pixels.data();

  if (!across && !down) {
    for (std::int64_t r = 0; r < rows; ++r) std::copy_n(source + 3 * r * image.width, 3 * columns, target + 3 * r * columns);
    return out;
  }
  if (!down) {
    resample_across(source, image.width, source_columns.begin, rows, across_taps, target);
    return out;
  }
  if (!across) {
    resample_down(source, image.width, source_rows.begin, columns, down_taps, target);
    return out;
  }
  // The order matters, because the values between the passes are rounded to 8 bits. Pillow 13 begins with the vertical pass when
  // the height loses more than twice the pixels that the width loses; Pillow 12 and older always began with the horizontal one.
  const bool down_first = height < image.height && image.height - height > 2 * (image.width - width);
  const std::int64_t middle_width = down_first ? needed_columns : columns, middle_rows = down_first ? rows : needed_rows;
  require<InputError>(middle_rows <= max_image_pixels / middle_width, "m2lm::resize: from ", size_string(image.width, image.height), " to ",
                      size_string(width, height), " goes through more than 2^28 pixels");
  std::vector<std::uint8_t> middle(static_cast<std::size_t>(3 * middle_rows * middle_width));
  if (down_first) {
    resample_down(source, image.width, source_rows.begin, needed_columns, down_taps, middle.data());
    resample_across(middle.data(), needed_columns, source_columns.begin, rows, across_taps, target);
  } else {
    resample_across(source, image.width, source_columns.begin, needed_rows, across_taps, middle.data());
    resample_down(middle.data(), columns, source_rows.begin, columns, down_taps, target);
  }
  return out;
}

/// Where the source of a centred window of `size` begins; negative when the source is smaller.
M2LM_IMPL std::int64_t crop_begin(std::int64_t source, std::int64_t size) {
  const std::int64_t difference = source - size + (M2LM_FAULT(3) ? 2 : 0);
  return difference >= 0 ? difference / 2 : -((1 - difference) / 2);  // rounded down
}

/// Copies `part` to (x, y) of `out`. requires that it fits.
M2LM_IMPL void paste(Image& out, const Image& part, std::int64_t x, std::int64_t y) {
  for (std::int64_t r = 0; r < part.height; ++r)
    std::copy_n(part.pixels.data() + 3 * r * part.width, 3 * part.width, out.pixels.data() + 3 * ((y + r) * out.width + x));
}

/// center_crop(resize(image, width, height), crop_width, crop_height), without computing what is cut off.
M2LM_IMPL Image resize_and_crop(const Image& image, std::int64_t width, std::int64_t height, std::int64_t crop_width,
                                std::int64_t crop_height, Resample filter) {
  const std::int64_t x = crop_begin(width, crop_width), y = crop_begin(height, crop_height);
  const std::int64_t left = std::max<std::int64_t>(x, 0), top = std::max<std::int64_t>(y, 0);
  const std::int64_t right = std::min(x + crop_width, width), bottom = std::min(y + crop_height, height);
  Image part = resize_part(image, width, height, left, top, right - left, bottom - top, filter);
  if (part.width == crop_width && part.height == crop_height) return part;
  Image out = blank_image(crop_width, crop_height, "m2lm::center_crop");
  paste(out, part, left - x, top - y);
  return out;
}

}  // namespace detail

M2LM_IMPL Image resize(const Image& image, std::int64_t width, std::int64_t height, Resample filter) {
  detail::check_image(image, "m2lm::resize");
  require<InputError>(width > 0 && height > 0, "m2lm::resize: to a size of ", detail::size_string(width, height));
  if (width == image.width && height == image.height) return image;
  return detail::resize_part(image, width, height, 0, 0, width, height, filter);
}

M2LM_IMPL Image center_crop(const Image& image, std::int64_t width, std::int64_t height) {
  detail::check_image(image, "m2lm::center_crop");
  require<InputError>(width > 0 && height > 0, "m2lm::center_crop: to a size of ", detail::size_string(width, height));
  return detail::resize_and_crop(image, image.width, image.height, width, height, Resample::bicubic);
}

M2LM_IMPL Image pad_to_square(const Image& image, std::array<std::uint8_t, 3> fill) {
  detail::check_image(image, "m2lm::pad_to_square");
  const std::int64_t side = std::max(image.width, image.height);
  if (image.width == image.height) return image;
  Image out = detail::blank_image(side, side, "m2lm::pad_to_square");
  for (std::size_t i = 0; i < out.pixels.size(); ++i) out.pixels[i] = fill[i % 3];
  const std::int64_t x = M2LM_FAULT(7) ? 0 : (side - image.width) / 2, y = M2LM_FAULT(7) ? 0 : (side - image.height) / 2;
  detail::paste(out, image, x, y);
  return out;
}

M2LM_IMPL Image masked_fill(const Image& image, Matrix<const bool> mask, std::array<std::uint8_t, 3> fill) {
  detail::check_image(image, "m2lm::masked_fill");
  require<InputError>(mask.extent(0) == image.height && mask.extent(1) == image.width, "m2lm::masked_fill: the mask is ", mask.shape(),
                      ", the picture has ", image.height, " rows of ", image.width, " pixels");
  Image out = image;
  for (std::int64_t y = 0; y < image.height; ++y)
    for (std::int64_t x = 0; x < image.width; ++x)
      if (mask(y, x)) std::copy_n(fill.data(), 3, out.pixels.data() + 3 * (y * image.width + x));
  return out;
}

}  // namespace m2lm
