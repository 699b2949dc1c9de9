// Limits of what is read of foreign files: exactly at the limit passes, one more fails, and the error names the limit and its option.
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <bit>
#include <cstring>

namespace {

using m2lm::CheckpointError;
using m2lm::ConfigValue;
using m2lm::ImageLimits;
using m2lm::InputError;
using m2lm::JsonLimits;
using m2lm::Safetensors;
using m2lm::SafetensorsLimits;
using m2lm_test::has;
using m2lm_test::message_of;

/// `f(limit)` passes when the limit is what the file needs, and fails below, with both numbers' place in the message.
template <class E, class F>
void check_edge(std::int64_t needs, const std::string& option, F&& f) {
  CAPTURE(option);
  CHECK_NOTHROW(f(needs + 1));
  CHECK_NOTHROW(f(needs));
  const std::string message = message_of<E>([&] { f(needs - 1); });
  CHECK_MESSAGE(has(message, option), message);
  CHECK_MESSAGE(has(message, std::to_string(needs - 1)), message);
}

std::string safetensors(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + header + std::string(data_bytes, 'd');
}

}  // namespace

TEST_CASE("pictures: width, height, pixels and bytes, in every format") {
  const m2lm_test::TemporaryDirectory directory;
  m2lm::Image image{.width = 7, .height = 5, .pixels = std::vector<std::uint8_t>(105, 9)};
  m2lm::save_png(directory / "picture.png", image);
  directory.write("picture.ppm", "P6 7 5 255\n" + std::string(105, 'x'));
  std::string bmp("BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x07\0\0\0\x05\0\0\0\1\0\x18\0", 30);
  bmp += std::string(24, '\0') + std::string(5 * 24, 'x');
  directory.write("picture.bmp", bmp);
  for (const char* name : {"picture.png", "picture.ppm", "picture.bmp"}) {
    CAPTURE(name);
    const std::string path = directory / name;
    REQUIRE(m2lm::load_image(path).width == 7);
    check_edge<InputError>(7, "ImageLimits::max_width", [&](std::int64_t n) { m2lm::load_image(path, {.max_width = n}); });
    check_edge<InputError>(5, "ImageLimits::max_height", [&](std::int64_t n) { m2lm::load_image(path, {.max_height = n}); });
    check_edge<InputError>(35, "ImageLimits::max_pixels", [&](std::int64_t n) { m2lm::load_image(path, {.max_pixels = n}); });
    const std::string bytes = m2lm::read_file(path);
    const auto size = static_cast<std::int64_t>(bytes.size());
    check_edge<InputError>(size, "max_bytes", [&](std::int64_t n) { m2lm::load_image(path, {.max_file_bytes = static_cast<std::size_t>(n)}); });
    check_edge<InputError>(size, "ImageLimits::max_file_bytes", [&](std::int64_t n) {
      m2lm::decode_image(std::as_bytes(std::span(bytes.data(), bytes.size())), name, {.max_file_bytes = static_cast<std::size_t>(n)});
    });
  }
}

TEST_CASE("JSON: bytes, nesting and lengths of texts and keys") {
  const m2lm_test::TemporaryDirectory directory;
  const std::string text = R"({"key": [[{"a long key": "and a text of thirty-one bytes"}]]})";
  const std::string path = directory.write("config.json", text);
  check_edge<CheckpointError>(static_cast<std::int64_t>(text.size()), "max_bytes",
                              [&](std::int64_t n) { ConfigValue::parse_file(path, {.max_bytes = static_cast<std::size_t>(n)}); });
  check_edge<CheckpointError>(4, "JsonLimits::max_nesting", [&](std::int64_t n) { ConfigValue::parse_file(path, {.max_nesting = static_cast<int>(n)}); });
  check_edge<CheckpointError>(30, "JsonLimits::max_string_bytes",
                              [&](std::int64_t n) { ConfigValue::parse_file(path, {.max_string_bytes = static_cast<std::size_t>(n)}); });
  check_edge<CheckpointError>(10, "JsonLimits::max_string_bytes",
                              [&](std::int64_t n) { ConfigValue::parse_text(R"({"a long key": 1})", "text", {.max_string_bytes = static_cast<std::size_t>(n)}); });
  check_edge<InputError>(1, "JsonLimits::max_nesting", [&](std::int64_t n) {
    m2lm::parse_json_lines(directory.write("lines", "{}\n[1]\n"), {.max_nesting = static_cast<int>(n)});
  });
  // The default: a value inside 64 containers.
  const auto nested = [](int n) { return std::string(static_cast<std::size_t>(n), '[') + std::string(static_cast<std::size_t>(n), ']'); };
  CHECK_NOTHROW(ConfigValue::parse_text(nested(64), "text"));
  CHECK_THROWS_AS(ConfigValue::parse_text(nested(65), "text"), CheckpointError);
  const std::string long_text(std::size_t{1} << 24, 'x');
  CHECK_NOTHROW(ConfigValue::parse_text("\"" + long_text + "\"", "text"));
  CHECK_THROWS_AS(ConfigValue::parse_text("\"" + long_text + "x\"", "text"), CheckpointError);
}

TEST_CASE("what JSON means is the same as before there were limits") {
  const auto parse = [](std::string_view text) { return ConfigValue::parse_text(text, "text"); };
  CHECK(parse(R"({"a": 1, "b": {"c": [1, 2.5, "x", true, null, -7]}, "a": [3]})")["a"].at(0).as<int>() == 3);
  CHECK(parse(R"({"a": {"deep": {"er": [1, {"x": 2}]}}, "a": 4})")["a"].as<int>() == 4);
  CHECK(parse(R"([[], {}, [[]], [{}]])").size() == 4);
  CHECK(parse("18446744073709551615").is_number());
  CHECK(parse(" true ").as<bool>());
  CHECK(parse(R"("\u00e9\ud83d\ude00")").as<std::string>() == "\xc3\xa9\xf0\x9f\x98\x80");
  for (const char* bad : {"", "{", "[1,]", "{\"a\"}", "{\"a\":1,}", "1 2", "nul", "\"\x01\"", "\"\xff\"", "[1}", "1e999"})
    CHECK_THROWS_AS(parse(bad), CheckpointError);
}

TEST_CASE("safetensors: header, tensors and names") {
  const m2lm_test::TemporaryDirectory directory;
  const std::string header = R"({"__metadata__":{"format":"pt"},"first":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"2nd":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})";
  const std::string path = directory.write("model.safetensors", safetensors(header, 3));
  REQUIRE(Safetensors::open(path).names().size() == 2);
  const auto edge = [&](std::int64_t needs, const char* option, std::size_t SafetensorsLimits::*limit) {
    check_edge<CheckpointError>(needs, option, [&](std::int64_t n) {
      SafetensorsLimits limits;
      limits.*limit = static_cast<std::size_t>(n);
      Safetensors::open(path, limits);
    });
    check_edge<CheckpointError>(needs, option, [&](std::int64_t n) {
      m2lm::CheckpointLimits limits;
      limits.safetensors.*limit = static_cast<std::size_t>(n);
      m2lm::Checkpoint::open(directory.path(), limits);
    });
  };
  edge(static_cast<std::int64_t>(header.size()), "SafetensorsLimits::max_header_bytes", &SafetensorsLimits::max_header_bytes);
  edge(2, "SafetensorsLimits::max_tensors", &SafetensorsLimits::max_tensors);
  edge(12, "SafetensorsLimits::max_name_bytes", &SafetensorsLimits::max_name_bytes);  // "__metadata__"
}
