// Gguf: every block format against the ggml project's own Python, metadata of every type, and damage of every kind.
#include <m2lm/io/file.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/gguf_model.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <bit>
#include <cstring>
#include <functional>

using m2lm::CheckpointError;
using m2lm::Gguf;
using m2lm::GgufLimits;
using m2lm_test::golden;
using m2lm_test::has;
using m2lm_test::message_of;
using m2lm_test::TemporaryDirectory;

namespace {

/// Writes GGUF by hand, right or wrong.
struct Writer {
  std::string bytes;

  template <class T>
  Writer& put(T value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Writer& u32(std::uint32_t value) { return put(value); }
  Writer& u64(std::uint64_t value) { return put(value); }
  Writer& text(std::string_view value) {
    u64(value.size());
    bytes += value;
    return *this;
  }
  Writer& header(std::uint64_t tensors, std::uint64_t keys, std::uint32_t version = 3) {
    bytes += "GGUF";
    return u32(version).u64(tensors).u64(keys);
  }
  Writer& key(std::string_view name, std::uint32_t type) { return text(name).u32(type); }
  Writer& tensor(std::string_view name, std::initializer_list<std::uint64_t> extents, std::uint32_t type, std::uint64_t offset) {
    text(name).u32(static_cast<std::uint32_t>(extents.size()));
    for (const std::uint64_t extent : extents) u64(extent);
    return u32(type).u64(offset);
  }
  Writer& align(std::size_t to = 32) {
    bytes.append((to - bytes.size() % to) % to, '\0');
    return *this;
  }
  Writer& data(std::size_t n) {
    bytes.append(n, 'x');
    return *this;
  }
};

const TemporaryDirectory& directory() {
  static const TemporaryDirectory directory;
  return directory;
}

Gguf open(const Writer& file, const GgufLimits& limits = {}) {
  directory().write("file.gguf", file.bytes);
  return Gguf::open(directory() / "file.gguf", limits);
}

std::string refusal(const Writer& file, const GgufLimits& limits = {}) {
  const std::string message = message_of<CheckpointError>([&] { open(file, limits); });
  CHECK_MESSAGE(has(message, "file.gguf"), message);
  return message;
}

/// Two tensors and three keys; nothing is wrong with it.
Writer whole() {
  Writer w;
  w.header(2, 3).key("general.architecture", 8).text("llama").key("llama.block_count", 4).u32(2).key("list", 9).u32(8).u64(2).text("a").text("");
  w.tensor("a.weight", {4, 2}, 0, 0).tensor("q", {32, 2}, 2, 32).align().data(32 + 36);
  return w;
}

}  // namespace

TEST_CASE("every format is what the ggml project's own code makes of it, to the bit") {
  const Gguf file = Gguf::open(golden("gguf/formats.gguf"));
  const m2lm::Safetensors expected = m2lm::Safetensors::open(golden("gguf/formats.safetensors"));
  CHECK(file.version() == 3);
  std::size_t formats = 0;
  for (const std::string& name : expected.names()) {
    CAPTURE(name);
    const m2lm::AnyTensor stored = file.tensor(name);
    const auto values = stored.to<float>(), wanted = expected.tensor(name).to<float>();
    REQUIRE(values.shape() == wanted.shape());
    REQUIRE(file.format(name) != nullptr);
    CHECK(file.format(name)->name == name);
    std::size_t wrong = 0;
    for (std::int64_t i = 0; i < values.elements(); ++i)
      wrong += std::bit_cast<std::uint32_t>(values.data()[i]) != std::bit_cast<std::uint32_t>(wanted.data()[i]);
    CHECK(wrong == 0);
    ++formats;
  }
  CHECK(formats == 13);
  CHECK(file.shape("I32") == m2lm::Shape{1, 2, 3});
  CHECK(file.tensor("I32").at(4) == 4);
  // Plain numbers are the file's own bytes.
  CHECK(file.tensor("F16").dtype() == m2lm::DType::f16);
  CHECK(file.tensor("F32").data() == file.tensor("F32").data());
  CHECK(has(message_of<CheckpointError>([&] { file.tensor("Q4_2"); }), "the nearest name is \"Q4_"));
}

TEST_CASE("dequantise_gguf refuses what is not quantised, and part of a block") {
  const std::byte block[18]{};
  float out[64];
  m2lm::dequantise_gguf(m2lm::GgufType::q4_0, block, std::span(out).first(32));
  CHECK(out[31] == 0);
  CHECK(has(message_of<m2lm::ShapeError>([&] { m2lm::dequantise_gguf(m2lm::GgufType::q4_0, block, std::span(out).first(31)); }), "31 elements"));
  CHECK(has(message_of<m2lm::ShapeError>([&] { m2lm::dequantise_gguf(m2lm::GgufType::f16, block, std::span(out).first(32)); }), "not quantised"));
}

TEST_CASE("metadata of every type") {
  const m2lm::ConfigValue meta = Gguf::open(golden("gguf/formats.gguf")).metadata();
  CHECK(meta.get<std::string>("general.architecture") == "test");
  CHECK(meta.get<int>("value.uint8") == 200);
  CHECK(meta.get<int>("value.int8") == -100);
  CHECK(meta.get<int>("value.uint16") == 60000);
  CHECK(meta.get<int>("value.int16") == -30000);
  CHECK(meta.get<std::uint32_t>("value.uint32") == 4000000000U);
  CHECK(meta.get<int>("value.int32") == -2000000000);
  CHECK(meta.get<std::int64_t>("value.uint64") == std::int64_t{1} << 62);
  CHECK(meta.get<std::int64_t>("value.int64") == -(std::int64_t{1} << 62));
  CHECK(meta.get<float>("value.float32") == 0.1F);
  CHECK(meta.get<double>("value.float32") == 0.1);
  CHECK(meta.get<double>("value.float64") == 0.1);
  CHECK(meta.get<bool>("value.bool"));
  CHECK(meta.get<std::string>("value.string") == "\u2581h\u00e9 <0x0A>");
  CHECK(meta.get_list<std::string>("value.strings") == std::vector<std::string>{"a", "", "\u2581b"});
  CHECK(meta.get_list<double>("value.floats") == std::vector<double>{0.5, -2.0});
  CHECK(meta["value.bools"].at(0).as<bool>());
  const std::string message = message_of<CheckpointError>([&] { meta.get<int>("value.string"); });
  CHECK_MESSAGE((has(message, "formats.gguf") && has(message, "value.string") && has(message, "an integer")), message);
}

TEST_CASE("versions 2 and 3, an alignment of its own, an empty file") {
  CHECK(open(whole()).names().size() == 2);
  Writer old;
  old.header(0, 0, 2);
  CHECK(open(old).names().empty());
  Writer aligned;
  aligned.header(1, 1).key("general.alignment", 4).u32(8).tensor("t", {2}, 0, 8).align(8).data(16);
  CHECK(open(aligned).tensor("t").bytes() == 8);
  Writer uneven = aligned;
  uneven.bytes.replace(uneven.bytes.find("general.alignment") + 21, 4, std::string("\x0c\0\0\0", 4));
  CHECK(has(refusal(uneven), "general.alignment = 12"));
}

TEST_CASE("a file cut off anywhere is refused, or only padding was missing") {
  const Writer file = whole();
  for (std::size_t n = 0; n < file.bytes.size(); ++n) {
    Writer cut;
    cut.bytes = file.bytes.substr(0, n);
    CAPTURE(n);
    CHECK(refusal(cut).size() > 20);
  }
}

TEST_CASE("damage is named, with both sides of the contradiction") {
  const auto changed = [](std::string_view from, std::size_t skip, const auto& value) {
    Writer w = whole();
    const std::size_t at = w.bytes.find(from) + from.size() + skip;
    std::memcpy(w.bytes.data() + at, &value, sizeof(value));
    return w;
  };
  const std::uint64_t huge = ~std::uint64_t{0}, large = std::uint64_t{1} << 40U;
  struct Case {
    Writer file;
    std::vector<std::string> said;
  };
  const std::vector<Case> cases = {
      {Writer{}, {"has 0"}},
      {changed("", 0, 'X'), {"\"GGUF\""}},
      {changed("GGUF", 0, std::uint32_t{1}), {"version 1", "2 and 3"}},
      {changed("GGUF", 0, std::uint32_t{4}), {"version 4"}},
      {changed("GGUF", 0, std::uint32_t{3} << 24U), {"big-endian"}},
      {changed("GGUF", 4, huge), {"tensors", "65536"}},
      {changed("GGUF", 4, std::uint64_t{1000}), {"claims 1000 tensors", "cannot hold"}},
      {changed("GGUF", 12, huge), {"keys", "65536"}},
      {changed("GGUF", 20, huge), {"the name of key 0", "65536"}},
      {changed("general.architecture", 0, std::uint32_t{13}), {"general.architecture", "type 13"}},
      {changed("general.architecture", 4, large), {"general.architecture", "16777216"}},
      {changed("general.architecture", 4, std::uint64_t{4000}), {"general.architecture", "4000 bytes", "truncated"}},
      {changed("list", 4, std::uint32_t{99}), {"list", "type 99"}},
      {changed("list", 8, huge), {"elements of list", "4194304"}},
      {changed("list", 8, std::uint64_t{50}), {"claims 50 elements of list", "cannot hold"}},
      {changed("a.weight", 0, std::uint32_t{5}), {"a.weight", "5 dimensions", "at most 4"}},
      {changed("a.weight", 4, huge), {"a.weight", "more elements than can be counted"}},
      {changed("a.weight", 4, std::uint64_t{1} << 62U), {"a.weight", "more elements than can be counted"}},
      {changed("a.weight", 4, large), {"a.weight", "[2, 1099511627776]", "F32"}},
      {changed("a.weight", 24, std::uint64_t{16}), {"a.weight", "byte 16", "alignment 32"}},
      {changed("a.weight", 24, large), {"a.weight", "1099511627776"}},
      {changed("a.weight", 24, std::uint64_t{64}), {"a.weight", "64", "truncated"}},
      {changed("a.weight", 24, std::uint64_t{32}), {"inside tensor"}},
      {changed("a.weight", 20, std::uint32_t{2}), {"a.weight", "rows of 4", "blocks of 32", "Q4_0"}},
  };
  for (const Case& c : cases) {
    const std::string message = refusal(c.file);
    for (const std::string& part : c.said) CHECK_MESSAGE(has(message, part), message, " / ", part);
  }
  Writer twice;
  twice.header(0, 2).key("k", 0).put('\1').key("k", 0).put('\1');
  CHECK(has(refusal(twice), "\"k\" is there twice"));
  Writer two;
  two.header(2, 0).tensor("t", {1}, 0, 0).tensor("t", {1}, 0, 32).align().data(64);
  CHECK(has(refusal(two), "tensor \"t\": is there twice"));
  Writer none;  // no elements at all, but extents whose product cannot be counted
  none.header(1, 0).tensor("t", {0, std::uint64_t{1} << 62U, std::uint64_t{1} << 62U}, 0, 0).align();
  CHECK(has(refusal(none), "more elements than can be counted"));
  Writer truth;
  truth.header(0, 1).key("k", 7).put('\2');
  CHECK(has(refusal(truth), "0 or 1"));
}

TEST_CASE("a type that is not known is an error only when the tensor is asked for") {
  Writer w;
  w.header(2, 0).tensor("x", {256}, 16, 0).tensor("y", {2}, 0, 96).align().data(96 + 8);
  const Gguf file = open(w);
  CHECK(file.format("x") == nullptr);
  CHECK(file.tensor("y").bytes() == 8);
  const std::string message = message_of<CheckpointError>([&] { file.tensor("x"); });
  CHECK_MESSAGE((has(message, "file.gguf") && has(message, "\"x\"") && has(message, "type 16") && has(message, "Q6_K")), message);
}

TEST_CASE("rows in another order: counts that do not fit, and any number of rows without columns") {
  Writer w;
  w.header(3, 0).tensor("odd", {1, 6}, 0, 0).tensor("none", {0, std::uint64_t{1} << 52U}, 0, 32).tensor("even", {1, 8}, 0, 32);
  w.align().data(32);
  for (int i = 0; i < 8; ++i) w.put(static_cast<float>(i));
  const Gguf file = open(w);
  const auto read = [&](const std::string& name, std::int64_t heads) { return m2lm::GgufModel::read({"", file, name, heads}); };
  CHECK(read("none", 4).shape()[0] == std::int64_t{1} << 52U);
  const auto even = read("even", 2).to<float>();
  CHECK(std::vector<float>(even.data(), even.data() + 8) == std::vector<float>{0, 2, 1, 3, 4, 6, 5, 7});
  for (const std::int64_t heads : {std::int64_t{2}, std::int64_t{4}, std::int64_t{-1}, std::int64_t{1} << 62U}) {
    const std::string message = message_of<CheckpointError>([&] { read("odd", heads); });
    CHECK_MESSAGE((has(message, "odd") && has(message, "6 rows") && has(message, std::to_string(heads) + " heads")), message);
  }
}

TEST_CASE("each limit holds at its edge") {
  Writer w;
  w.header(2, 2).key("key", 8).text("12345").key("k", 9).u32(9).u64(2).u32(0).u64(3).put('a').put('b').put('c').u32(0).u64(0);
  w.tensor("t", {1}, 0, 0).tensor("u", {1}, 0, 32).align().data(36);
  const GgufLimits exact{
      .max_keys = 2, .max_tensors = 2, .max_name_bytes = 3, .max_string_bytes = 5, .max_array_elements = 5, .max_array_nesting = 2};
  CHECK(open(w, exact).names().size() == 2);
  struct Less {
    std::function<void(GgufLimits&)> lower;
    std::string said;
  };
  for (const Less& less :
       {Less{[](GgufLimits& l) { l.max_keys = 1; }, "2 keys"}, Less{[](GgufLimits& l) { l.max_tensors = 1; }, "2 tensors"},
        Less{[](GgufLimits& l) { l.max_name_bytes = 2; }, "the name of key 0"}, Less{[](GgufLimits& l) { l.max_string_bytes = 4; }, "5 bytes"},
        Less{[](GgufLimits& l) { l.max_array_elements = 4; }, "elements of k"},
        Less{[](GgufLimits& l) { l.max_array_nesting = 1; }, "nested deeper than 1"}}) {
    GgufLimits limits = exact;
    less.lower(limits);
    CHECK_MESSAGE(has(refusal(w, limits), less.said), less.said);
  }
}
