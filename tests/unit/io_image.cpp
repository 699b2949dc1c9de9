// Pictures: decoding, Pillow's resampling, CLIP's preprocessing, and files that are no pictures.
#include <m2lm/io/file.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

using m2lm::CheckpointError;
using m2lm::Image;
using m2lm::ImageProcessorConfig;
using m2lm::InputError;
using m2lm::Resample;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

struct Difference {
  std::size_t count = 0, values = 0;
  int largest = 0;
  double mean = 0.0;
};

Difference compare(const Image& image, const m2lm::AnyTensor& expected) {
  REQUIRE(expected.shape() == m2lm::Shape{image.height, image.width, 3});
  Difference d;
  d.values = image.pixels.size();
  for (std::size_t i = 0; i < d.values; ++i) {
    const int difference = std::abs(image.pixels[i] - static_cast<int>(expected.at(static_cast<std::int64_t>(i))));
    d.count += difference != 0;
    d.largest = std::max(d.largest, difference);
    d.mean += difference / static_cast<double>(d.values);
  }
  return d;
}

Image image_of(const m2lm::AnyTensor& rgb) {
  Image out;
  out.height = rgb.shape()[0];
  out.width = rgb.shape()[1];
  for (std::int64_t i = 0; i < rgb.shape().elements(); ++i) out.pixels.push_back(static_cast<std::uint8_t>(rgb.at(i)));
  return out;
}

Image gradient(std::int64_t width, std::int64_t height) {
  Image out;
  out.width = width;
  out.height = height;
  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x)
      for (int c = 0; c < 3; ++c) out.pixels.push_back(static_cast<std::uint8_t>((x * 7 + y * 13 + c * 50) % 256));
  return out;
}

Image plain(std::int64_t width, std::int64_t height, std::uint8_t value) {
  return {width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(3 * width * height), value)};
}

std::array<int, 3> pixel(const Image& image, std::int64_t x, std::int64_t y) {
  const std::uint8_t* p = image.pixels.data() + 3 * (y * image.width + x);
  return {p[0], p[1], p[2]};
}

std::string file_bytes(const std::string& path) { return m2lm::read_file(path); }
std::span<const std::byte> bytes_of(const std::string& s) { return std::as_bytes(std::span(s.data(), s.size())); }
std::string decode_message(const std::string& bytes, const m2lm::ImageLimits& limits = {}) {
  return message_of<InputError>([&] { (void)m2lm::decode_image(bytes_of(bytes), "picture", limits); });
}

}  // namespace

TEST_CASE("pictures of every kind decode as Pillow's convert(\"RGB\"), resize as its resize, and preprocess as CLIPImageProcessor") {
  const auto index = m2lm::ConfigValue::parse_file(m2lm_test::golden("images/index.json"));
  const auto files = index["files"];
  std::size_t resizes = 0, preprocessed = 0;
  for (const std::string& name : files.keys()) {
    CAPTURE(name);
    Image image = m2lm::load_image(m2lm_test::golden("images/" + name));
    const auto golden = m2lm::Safetensors::open(m2lm_test::golden("images/" + name.substr(0, name.find('.')) + ".safetensors"));
    if (golden.contains("rgb")) {
      const Difference d = compare(image, golden.tensor("rgb"));
      if (has(name, ".jpg")) {
        // Another decoder: the inverse transform and the interpolation of colours are not laid down to the bit.
        std::printf("%s: %zu of %zu values differ from libjpeg's, the largest by %d, %.3f on average\n", name.c_str(), d.count, d.values,
                    d.largest, d.mean);
        CHECK(d.mean < 1.0);
        CHECK(d.largest <= 24);
        image = image_of(golden.tensor("rgb"));
      } else {
        CHECK(d.count == 0);
      }
    }
    for (const std::string& key : golden.names()) {
      CAPTURE(key);
      const std::size_t dot = key.find('.'), cross = key.find('x', dot == std::string::npos ? 0 : dot);
      const std::string kind = key.substr(0, dot);
      if (kind == "bicubic" || kind == "bilinear" || kind == "box" || kind == "lanczos") {
        const Resample filter = kind == "bicubic" ? Resample::bicubic : kind == "bilinear" ? Resample::bilinear : kind == "box" ? Resample::box : Resample::lanczos;
        const Difference d = compare(m2lm::resize(image, std::stoi(key.substr(dot + 1)), std::stoi(key.substr(cross + 1)), filter), golden.tensor(key));
        CHECK(d.count == 0);
        ++resizes;
      } else if (kind == "pixel_values" || kind == "pixel_values_pad") {
        ImageProcessorConfig config = m2lm::clip_image_processor(28);
        config.pad_to_square = kind == "pixel_values_pad";
        if (key == "pixel_values.size36_crop28") config.shortest_edge = 36;
        if (key == "pixel_values.size24_crop28") config.shortest_edge = 24;
        if (key == "pixel_values.size33_crop32x28") {
          config.shortest_edge = 33;
          config.crop_width = 32;
        }
        const m2lm::Tensor<float> x = m2lm::preprocess(image, config);
        const m2lm::AnyTensor expected = golden.tensor(key);
        REQUIRE(x.shape() == expected.shape());
        double worst = 0.0;
        for (std::int64_t i = 0; i < x.elements(); ++i) worst = std::max(worst, std::abs(static_cast<double>(x.data()[i]) - expected.at(i)));
        CHECK(worst < 2e-6);  // a few roundings of values up to 2.7; one 8-bit step is 0.0146
        ++preprocessed;
      }
    }
  }
  CHECK(resizes >= 20);
  CHECK(preprocessed >= 15);
}

TEST_CASE("the picture and the config of a checkpoint give its pixel values") {
  const std::string dir = m2lm_test::golden("llava/with_tokenizer");
  const ImageProcessorConfig config = m2lm::read_image_processor_config(dir);
  CHECK(config.shortest_edge == 28);
  const auto x = m2lm::preprocess(m2lm::load_image(dir + "/picture.png"), config);
  const auto expected = m2lm::Safetensors::open(dir + "/golden.safetensors").tensor("pixel_values");
  REQUIRE(x.elements() == expected.shape().elements());
  double worst = 0.0;
  for (std::int64_t i = 0; i < x.elements(); ++i) worst = std::max(worst, std::abs(static_cast<double>(x.data()[i]) - expected.at(i)));
  CHECK(worst < 2e-6);
}

TEST_CASE("geometry") {
  const Image image = gradient(7, 4);
  CHECK(m2lm::resize(image, 7, 4).pixels == image.pixels);
  CHECK(m2lm::resize(plain(9, 5, 77), 4, 11, Resample::lanczos).pixels == plain(4, 11, 77).pixels);
  const Image doubled = m2lm::resize(image, 14, 8, Resample::nearest);
  for (std::int64_t y = 0; y < 8; ++y)
    for (std::int64_t x = 0; x < 14; ++x) CHECK(pixel(doubled, x, y) == pixel(image, x / 2, y / 2));

  // As transformers: the offset is rounded down when cutting, and up when padding.
  const Image cut = m2lm::center_crop(image, 4, 3);
  CHECK(pixel(cut, 0, 0) == pixel(image, 1, 0));
  const Image padded = m2lm::center_crop(image, 10, 3);
  CHECK(pixel(padded, 1, 0) == std::array{0, 0, 0});
  CHECK(pixel(padded, 2, 0) == pixel(image, 0, 0));
  CHECK(pixel(padded, 8, 2) == pixel(image, 6, 2));
  CHECK(pixel(padded, 9, 2) == std::array{0, 0, 0});

  const Image square = m2lm::pad_to_square(image, {1, 2, 3});
  CHECK(square.width == 7);
  CHECK(square.height == 7);
  CHECK(pixel(square, 0, 0) == std::array{1, 2, 3});
  CHECK(pixel(square, 3, 1) == pixel(image, 3, 0));
  CHECK(pixel(square, 3, 4) == pixel(image, 3, 3));
  CHECK(pixel(square, 3, 5) == std::array{1, 2, 3});
  CHECK(pixel(m2lm::pad_to_square(gradient(4, 7), {9, 9, 9}), 1, 3) == pixel(gradient(4, 7), 0, 3));
  CHECK(m2lm::pad_to_square(plain(5, 5, 1), {9, 9, 9}).pixels == plain(5, 5, 1).pixels);

  // Extremely long pictures take memory for what is kept only.
  const auto x = m2lm::preprocess(gradient(60000, 1), m2lm::clip_image_processor(224));
  CHECK(x.shape() == m2lm::Shape{3, 224, 224});
  CHECK(m2lm::preprocess(gradient(1, 1), m2lm::clip_image_processor(14)).shape() == m2lm::Shape{3, 14, 14});
}

TEST_CASE("pixels whose mask is true get the colour") {
  const Image image = gradient(3, 2);
  const std::array<bool, 6> mask{false, true, false, false, false, true};
  const Image filled = m2lm::masked_fill(image, m2lm::Matrix<const bool>(mask.data(), {2, 3}), {7, 8, 9});
  for (int y = 0; y < 2; ++y)
    for (int x = 0; x < 3; ++x) CHECK(pixel(filled, x, y) == (mask[static_cast<std::size_t>(3 * y + x)] ? std::array{7, 8, 9} : pixel(image, x, y)));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::masked_fill(image, m2lm::Matrix<const bool>(mask.data(), {3, 2}), {}); }),
            "the mask is [3, 2], the picture has 2 rows of 3 pixels"));
  CHECK_THROWS_AS((void)m2lm::masked_fill(Image{}, {}, {}), InputError);
}

TEST_CASE("what cannot be done is said") {
  const Image image = gradient(7, 4);
  Image wrong = image;
  wrong.pixels.pop_back();
  CHECK(has(message_of<InputError>([&] { (void)m2lm::resize(wrong, 3, 3); }), "an RGB image of 7 x 4 has 3 bytes for each pixel, found 83 bytes"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::resize(Image{}, 3, 3); }), "the image is empty (0 x 0)"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::resize(image, 0, 3); }), "to a size of 0 x 3"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::resize(image, 1 << 20, 1 << 20); }), "1048576 x 1048576"));
  CHECK_THROWS_AS((void)m2lm::center_crop(image, -1, 1), InputError);
  CHECK_THROWS_AS((void)m2lm::center_crop(Image{}, 1, 1), InputError);
  CHECK_THROWS_AS((void)m2lm::pad_to_square(Image{}, {}), InputError);
  CHECK_THROWS_AS((void)m2lm::preprocess(Image{}, {}), InputError);
  Image overflow;
  overflow.width = overflow.height = std::int64_t{1} << 40;
  CHECK_THROWS_AS((void)m2lm::resize(overflow, 1, 1), InputError);
  const m2lm_test::TemporaryDirectory dir;
  CHECK_THROWS_AS(m2lm::save_png(dir / "x.png", wrong), InputError);
}

TEST_CASE("a picture that is saved reads back") {
  const m2lm_test::TemporaryDirectory dir;
  for (const auto& [w, h] : {std::pair{1, 1}, {7, 4}, {200, 3}}) {
    m2lm::save_png(dir / "x.png", gradient(w, h));
    const Image back = m2lm::load_image(dir / "x.png");
    CHECK(back.width == w);
    CHECK(back.pixels == gradient(w, h).pixels);
  }
}

TEST_CASE("files that are no pictures") {
  const m2lm_test::TemporaryDirectory dir;
  const auto message = [](const std::string& path) { return message_of<InputError>([&] { (void)m2lm::load_image(path); }); };
  CHECK(has(message(dir / "none.png"), "none.png: cannot open the file"));
  CHECK(has(message(dir.path()), "is a directory"));
  CHECK(has(message(dir.write("e.png", "")), "e.png: the image is empty (0 bytes)"));
  CHECK(has(message(dir.write("t.png", "hello")), "t.png: is not an image in a known format; JPEG, PNG"));
  CHECK(has(message(dir.write("w.webp", std::string("RIFF\0\0\0\0WEBPVP8 ", 16))), "the image format WebP is not supported"));
  CHECK(has(message(dir.write("a.avif", std::string("\0\0\0\x1c""ftypavif", 12))), "the image format AVIF, HEIC or a video is not supported"));
  const std::string png = file_bytes(m2lm_test::golden("images/rgb_64x64.png"));
  CHECK(has(decode_message(png.substr(0, 20)), "picture: the PNG image cannot be read: "));
  CHECK(has(decode_message(png.substr(0, png.size() / 2)), "the file is damaged or truncated"));
  const std::string jpeg = file_bytes(m2lm_test::golden("images/photo420_61x45.jpg"));
  CHECK(has(decode_message(jpeg.substr(0, 100)), "picture: the JPEG image cannot be read: "));

  // Headers that promise too much: refused before anything is allocated. stb itself gives up at 2^30 bytes.
  std::string huge = png;
  for (std::size_t i = 16; i < 24; i += 4) huge.replace(i, 4, std::string("\x00\x00\x41\x00", 4));
  CHECK(has(decode_message(huge), "picture: the image of 16640 x 16640 pixels is over the limit of 268435456 pixels in all (ImageLimits::max_pixels)"));
  for (std::size_t i = 16; i < 24; i += 4) huge.replace(i, 4, "\x7f\xff\xff\xff");
  CHECK_FALSE(decode_message(huge).empty());
  for (std::size_t i = 16; i < 24; i += 4) huge.replace(i, 4, std::string(4, '\0'));
  CHECK_FALSE(decode_message(huge).empty());
  m2lm::ImageLimits small;
  small.max_width = 63;
  CHECK(has(decode_message(png, small), "64 x 64 pixels is over the limit of 63 pixels of width (ImageLimits::max_width)"));
  small = {};
  small.max_file_bytes = 100;
  CHECK(has(decode_message(png, small), "more than the limit of 100 (ImageLimits::max_file_bytes)"));
}

TEST_CASE("binary PNM") {
  const auto decode = [](std::string_view s) { return m2lm::decode_image(std::as_bytes(std::span(s.data(), s.size())), "picture"); };
  CHECK(decode("P6 2 1 255\nabcdef").pixels == std::vector<std::uint8_t>{'a', 'b', 'c', 'd', 'e', 'f'});
  CHECK(decode("P5\n# a comment\n2\n1 # another\n255\nab").pixels == std::vector<std::uint8_t>{'a', 'a', 'a', 'b', 'b', 'b'});
  CHECK(decode(std::string_view("P5 2 1 15 \x00\x08", 12)).pixels == std::vector<std::uint8_t>{0, 0, 0, 136, 136, 136});
  CHECK(decode(std::string_view("P6 1 1 65535 \x80\x00\xff\xff\x00\x00", 19)).pixels == std::vector<std::uint8_t>{128, 255, 0});
  CHECK(decode(std::string_view("P5 2 1 65535 \x00\x07\x01\x00", 17)).pixels == std::vector<std::uint8_t>{7, 7, 7, 255, 255, 255});
  for (const char* bad : {"P6", "P6 ", "P6 2", "P6 2 1", "P6 2 1 255", "P6 2 1 255\nabcde", "P6 0 1 255\n", "P6 2 1 0\nabcdef", "P6 2 1 65536\nabcdef",
                          "P5 9999999999 9999999999 255\n", "P5 99999999999999999999 1 255\n", "P5 # no end", "P5 x", "P5 60000 60000 255 a"}) {
    CAPTURE(bad);
    CHECK(has(decode_message(bad), "picture: the "));
  }
}

TEST_CASE("a JPEG whose Huffman table promises more codes than there are") {
  std::string jpeg = file_bytes(m2lm_test::golden("images/photo420_61x45.jpg"));
  const std::size_t table = jpeg.find("\xff\xc4");
  REQUIRE(table != std::string::npos);
  for (std::size_t i = 5; i < 21; ++i) jpeg[table + i] = '\x7f';
  CHECK(has(decode_message(jpeg), "a Huffman table has more than 256 codes"));
}

TEST_CASE("every cut and random damage decodes or is refused") {
  std::uint32_t state = 99;
  const auto next = [&] { return state = state * 1664525U + 1013904223U, state >> 8; };
  m2lm::ImageLimits limits;
  limits.max_pixels = 1 << 20;
  for (const char* name : {"rgb_5x7.png", "palette_trns_39x30.png", "rgb16_30x24.png", "photo420_61x45.jpg", "progressive444_48x56.jpg", "bilevel_37x29.png"}) {
    CAPTURE(name);
    const std::string good = file_bytes(m2lm_test::golden(std::string("images/") + name));
    const auto attempt = [&](const std::string& bytes) {
      try {
        const Image image = m2lm::decode_image(bytes_of(bytes), "p", limits);
        CHECK(image.pixels.size() == static_cast<std::size_t>(3 * image.width * image.height));
      } catch (const InputError& error) {
        CHECK(has(error.what(), "p: "));
      }
    };
    for (std::size_t n = 0; n < good.size(); n += 1 + good.size() / 200) attempt(good.substr(0, n));
    for (int round = 0; round < 300; ++round) {
      std::string bad = good;
      for (std::uint32_t n = next() % 4 + 1; n > 0; --n) bad[next() % bad.size()] = static_cast<char>(next());
      attempt(bad);
    }
  }
}

TEST_CASE("the pictures of the fuzz corpora decode or are refused") {
  const auto assets = m2lm_test::assets();
  if (!assets) return m2lm_test::skip("fuzz corpora of pictures", "no shared assets");
  m2lm::ImageLimits limits;
  limits.max_pixels = 1 << 24;
  for (const char* corpus : {"pngsuite", "torchvision_assets", "libjpeg-turbo"}) {
    const std::string dir = *assets + "/fuzz/" + corpus;
    if (!std::filesystem::is_directory(dir)) {
      m2lm_test::skip("fuzz corpora of pictures", "no " + dir);
      continue;
    }
    int decoded = 0, refused = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
      if (!entry.is_regular_file()) continue;
      const std::string path = entry.path().string();
      CAPTURE(path);
      try {
        const Image image = m2lm::load_image(path, limits);
        CHECK(image.pixels.size() == static_cast<std::size_t>(3 * image.width * image.height));
        (void)m2lm::preprocess(image, m2lm::clip_image_processor(28));
        ++decoded;
      } catch (const InputError& error) {
        CHECK(has(error.what(), path));
        ++refused;
      }
    }
    std::printf("%s: %d files decoded, %d refused\n", corpus, decoded, refused);
    CHECK(decoded + refused > 0);
  }
}

TEST_CASE("preprocessor_config.json in its dialects") {
  const m2lm_test::TemporaryDirectory dir;
  const auto read = [&](std::string_view json) {
    dir.write("preprocessor_config.json", json);
    return m2lm::read_image_processor_config(dir.path(), 336);
  };
  CHECK(m2lm::read_image_processor_config(dir / "none", 336).crop_width == 336);
  CHECK(m2lm::read_image_processor_config(dir.path(), 336).shortest_edge == 336);
  ImageProcessorConfig c = read("{}");
  CHECK(c.shortest_edge == 336);
  CHECK(c.resample == Resample::bicubic);
  c = read(R"({"size": 224, "crop_size": 224, "do_center_crop": false, "do_normalize": false, "resample": 2})");
  CHECK(c.shortest_edge == 224);
  CHECK(c.crop_height == 224);
  CHECK_FALSE(c.do_center_crop);
  CHECK_FALSE(c.do_normalize);
  CHECK(c.resample == Resample::bilinear);
  c = read(R"({"size": {"shortest_edge": 56}, "crop_size": {"height": 28, "width": 42}, "image_mean": [0.5, 0.25, 0], "image_std": [1, 2, 3], "rescale_factor": 0.5})");
  CHECK(c.shortest_edge == 56);
  CHECK(c.crop_width == 42);
  CHECK(c.mean[1] == 0.25);
  CHECK(c.std[2] == 3.0);
  CHECK(c.rescale_factor == 0.5);
  const auto x = m2lm::preprocess(plain(60, 60, 100), c);
  CHECK(x.shape() == m2lm::Shape{3, 28, 42});
  CHECK(x.view<3>()(1, 5, 5) == doctest::Approx((100 * 0.5 - 0.25) / 2));
  c = read(R"({"size": {"height": 10, "width": 20}, "do_center_crop": false, "do_pad": true})");
  CHECK(c.pad_to_square);
  CHECK(m2lm::preprocess(gradient(30, 15), c).shape() == m2lm::Shape{3, 10, 20});
  CHECK(read(R"({"image_aspect_ratio": "pad"})").pad_to_square);

  const auto message = [&](std::string_view json) { return message_of<CheckpointError>([&] { (void)read(json); }); };
  CHECK(has(message("[]"), "preprocessor_config.json: must be an object"));
  CHECK(has(message("{"), "is not valid JSON"));
  CHECK(has(message(R"({"size": "big"})"), "size: must be an integer, found string \"big\""));
  CHECK(has(message(R"({"size": 0})"), "size: must be between 1 and 16384, found 0"));
  CHECK(has(message(R"({"size": {"width": 3}})"), "size.height: is missing"));
  CHECK(has(message(R"({"crop_size": {"height": 1000000, "width": 3}})"), "crop_size.height: must be between 1 and 16384"));
  CHECK(has(message(R"({"image_mean": [0.5]})"), "image_mean: must be three numbers"));
  CHECK(has(message(R"({"image_std": [1, 0, 1]})"), "image_std: must be finite and not 0"));
  CHECK(has(message(R"({"resample": 5})"), "resample: is not a filter that is supported"));
  CHECK(has(message(R"({"do_resize": 1})"), "do_resize: must be true or false"));
}
