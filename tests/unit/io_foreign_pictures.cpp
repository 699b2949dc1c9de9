// Every picture of the shared assets' fuzz/ sets is decoded to the pixels that other software recorded, or refused with a clear error.
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/image.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

namespace {

using m2lm::ConfigValue;
using m2lm::Image;
using m2lm_test::has;

namespace fs = std::filesystem;

struct Outcome {
  Image image;
  std::string refused;
};
/// Decodes, or keeps the message. Any other exception than InputError fails the test.
Outcome decode(const std::string& path) {
  Outcome out;
  try {
    out.image = m2lm::load_image(path);
  } catch (const m2lm::InputError& error) {
    out.refused = error.what();
    CHECK_MESSAGE(has(out.refused, path), out.refused);
    const bool clear = has(out.refused, "damaged") || has(out.refused, "not supported") || has(out.refused, "known format") || has(out.refused, "truncated") ||
                       has(out.refused, "empty");
    CHECK_MESSAGE(clear, out.refused);
  }
  return out;
}

std::string hash(const std::vector<std::uint8_t>& bytes) {
  std::uint64_t value = 0xCBF29CE484222325U;
  for (const std::uint8_t byte : bytes) value = (value ^ byte) * 0x100000001B3U;
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::int64_t mean(const Image& image, std::int64_t row, std::int64_t column, std::int64_t channel) {
  std::int64_t sum = 0, count = 0;
  for (std::int64_t y = row * image.height / 4; y < (row + 1) * image.height / 4; ++y)
    for (std::int64_t x = column * image.width / 4; x < (column + 1) * image.width / 4; ++x, ++count)
      sum += image.pixels[static_cast<std::size_t>(3 * (y * image.width + x) + channel)];
  return (2 * sum + count) / (2 * count);
}

std::vector<int> list_of(const ConfigValue& array) {
  std::vector<int> out;
  for (std::size_t i = 0; i < array.size(); ++i) out.push_back(array.at(i).as<int>());
  return out;
}

std::vector<std::string> files_below(const std::string& root) {
  std::vector<std::string> out;
  for (const auto& entry : fs::recursive_directory_iterator(root))
    if (entry.is_regular_file()) out.push_back(entry.path().string());
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace

TEST_CASE("PngSuite: the recorded pixels, or an error") {
  M2LM_SKIP_WITHOUT(m2lm_test::asset_file("fuzz/pngsuite/png/basn2c08.png"));
  const std::string root = m2lm_test::asset_file("fuzz/pngsuite/");
  int equal = 0, refused = 0;
  for (const std::string& path : files_below(root + "png")) {
    CAPTURE(path);
    const Outcome outcome = decode(path);
    const std::string recorded = root + "json/" + fs::path(path).stem().string() + ".json";
    if (!m2lm::file_exists(recorded)) {  // the damaged files of the suite
      CHECK(!outcome.refused.empty());
      ++refused;
      continue;
    }
    // Red, green, blue and alpha of each pixel, of 8 or 16 bits. 16-bit colours lose their lower half; 16-bit grey is clipped, as Pillow
    // does; alpha is dropped.
    REQUIRE_MESSAGE(outcome.refused.empty(), outcome.refused);
    const std::vector<int> values = list_of(ConfigValue::parse_file(recorded));
    REQUIRE(values.size() == outcome.image.pixels.size() / 3 * 4);
    const std::string header = m2lm::read_file(path).substr(24, 2);
    const bool deep = header[0] == 16, grey = header[1] == 0;
    std::vector<std::uint8_t> wanted;
    for (std::size_t i = 0; i < values.size(); ++i)
      if (i % 4 != 3) wanted.push_back(static_cast<std::uint8_t>(!deep ? values[i] : grey ? std::min(values[i], 255) : values[i] / 256));
    CHECK(outcome.image.pixels == wanted);
    ++equal;
  }
  std::printf("PngSuite: %d pictures equal the recorded pixels, %d damaged ones are refused\n", equal, refused);
  CHECK(equal == 163);
  CHECK(refused == 12);
}

TEST_CASE("BMP, PNM, JPEG and other pictures: as Pillow decodes them, or an error") {
  M2LM_SKIP_WITHOUT(m2lm_test::asset_file("fuzz/libjpeg-turbo/testorig.jpg"));
  const ConfigValue golden = ConfigValue::parse_file(m2lm_test::golden("foreign_pictures.json"));
  // Where this library refuses what Pillow reads: the reason that the error gives.
  const std::map<std::string, std::string> refused_here = {
      {"torchvision_assets/damaged_jpeg/bad_huffman.jpg", "damaged"},  // libjpeg warns and goes on
      {"torchvision_assets/fakedata/logos/rgb_pytorch.avif", "not supported"},
      {"torchvision_assets/fakedata/logos/rgb_pytorch.webp", "not supported"},
      {"libjpeg-turbo/testimgari.jpg", "coded arithmetically"},
  };
  int equal = 0, close = 0, refused_by_both = 0, others = 0;
  for (const std::string& name : golden.keys()) {
    CAPTURE(name);
    const Outcome outcome = decode(m2lm_test::asset_file("fuzz/" + name));
    const ConfigValue entry = golden[name];
    if (const auto other = refused_here.find(name); other != refused_here.end()) {
      CHECK_MESSAGE(has(outcome.refused, other->second), outcome.refused);
      ++others;
      continue;
    }
    CHECK_MESSAGE(outcome.refused.empty() != entry.contains("refused"), outcome.refused);
    if (!outcome.refused.empty()) {
      ++refused_by_both;
      continue;
    }
    const Image& image = outcome.image;
    REQUIRE(image.width == entry["size"].at(0).as<std::int64_t>());
    REQUIRE(image.height == entry["size"].at(1).as<std::int64_t>());
    if (entry.contains("pixels")) {
      CHECK(hash(image.pixels) == entry.get<std::string>("pixels"));
      ++equal;
      continue;
    }
    // Decoders round each of three steps (inverse transform, upsampling, colours) their own way: the mean of a cell may move by one.
    for (std::size_t cell = 0; cell < 16; ++cell)
      for (std::size_t channel = 0; channel < 3; ++channel) {
        const auto wanted = entry["grid"].at(cell).at(channel).as<std::int64_t>();
        CHECK(std::abs(wanted - mean(image, static_cast<std::int64_t>(cell / 4), static_cast<std::int64_t>(cell % 4), static_cast<std::int64_t>(channel))) <= 1);
      }
    ++close;
  }
  std::printf("others: %d pictures equal Pillow's pixels, %d JPEGs are close to them, %d are refused by both, %d here only\n", equal, close, refused_by_both, others);
  CHECK(equal == 191);
  CHECK(close == 7);
  CHECK(refused_by_both == 20);
  CHECK(others == 4);
}

TEST_CASE("files of the sets that are no pictures are refused as such") {
  M2LM_SKIP_WITHOUT(m2lm_test::asset_file("fuzz/libjpeg-turbo/test1.icc"));
  int refused = 0;
  for (const char* set : {"torchvision_assets", "libjpeg-turbo", "wav_hound", "wav_scipy"})
    for (const std::string& path : files_below(m2lm_test::asset_file("fuzz/") + set)) {
      if (std::set<std::string>{".png", ".jpg", ".bmp", ".pgm", ".ppm", ".webp", ".avif", ".heic"}.contains(fs::path(path).extension().string())) continue;
      CAPTURE(path);
      CHECK(!decode(path).refused.empty());
      ++refused;
    }
  std::printf("%d files that are no pictures are refused\n", refused);
  CHECK(refused > 100);
}
