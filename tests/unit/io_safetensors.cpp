// The safetensors container and checkpoints made of it.
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cmath>
#include <cstring>

using m2lm::AnyTensor;
using m2lm::Checkpoint;
using m2lm::CheckpointError;
using m2lm::DType;
using m2lm::NamedTensor;
using m2lm::Safetensors;
using m2lm::Shape;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

std::string container(std::string_view header, std::string_view data, std::uint64_t claimed = ~std::uint64_t{0}) {
  std::uint64_t length = claimed == ~std::uint64_t{0} ? header.size() : claimed;
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out.append(header).append(data);
}

std::string open_message(const std::string& path) {
  return message_of<CheckpointError>([&] { (void)Safetensors::open(path); });
}

template <class T>
AnyTensor tensor_of(Shape shape, const std::vector<T>& values) {
  m2lm::Tensor<T> t(shape);
  std::copy(values.begin(), values.end(), t.data());
  return AnyTensor(std::move(t));
}

}  // namespace

TEST_CASE("what is written reads back, in order and with its dtype") {
  const m2lm_test::TemporaryDirectory dir;
  std::vector<NamedTensor> tensors;
  tensors.push_back({"z.half", tensor_of<m2lm::Half>({3}, {m2lm::to_half(1.5F), m2lm::to_half(-0.25F), m2lm::to_half(65504.0F)})});
  tensors.push_back({"a.brain", tensor_of<m2lm::Bf16>({1, 3}, {m2lm::to_bf16(1.5F), m2lm::to_bf16(-3e20F), m2lm::to_bf16(7.0F)})});
  tensors.push_back({"byte \"quoted\"", tensor_of<std::uint8_t>({1}, {200})});
  tensors.push_back({"odd", tensor_of<float>({2, 2}, {1, 2, 3, 4})});  // begins at an odd byte
  tensors.push_back({"double", tensor_of<double>({1}, {0.1})});
  tensors.push_back({"i64", tensor_of<std::int64_t>({2}, {-5, 1LL << 40})});
  tensors.push_back({"i32", tensor_of<std::int32_t>({1}, {-7})});
  tensors.push_back({"i16", tensor_of<std::int16_t>({1}, {-9})});
  tensors.push_back({"i8", tensor_of<std::int8_t>({1}, {-11})});
  tensors.push_back({"bool", tensor_of<bool>({2}, {true, false})});
  tensors.push_back({"scalar", tensor_of<float>(Shape{}, {2.5F})});
  tensors.push_back({"empty", tensor_of<float>({0, 4}, {})});
  const std::string path = dir / "t.safetensors";
  m2lm::write_safetensors(path, tensors, {{"format", "pt"}});

  const auto file = Safetensors::open(path);
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.names().size() == tensors.size());
  CHECK(file.names()[0] == "z.half");
  CHECK(file.names()[1] == "a.brain");
  for (const NamedTensor& written : tensors) {
    const std::string& name = written.name;
    const AnyTensor& expected = written.tensor;
    CAPTURE(name);
    REQUIRE(file.contains(name));
    const AnyTensor t = file.tensor(name);
    CHECK(t.dtype() == expected.dtype());
    CHECK(t.shape() == expected.shape());
    REQUIRE(t.has_value());
    for (std::int64_t i = 0; i < t.shape().elements(); ++i) CHECK(t.at(i) == expected.at(i));
  }
  CHECK(file.tensor("a.brain").at(1) == doctest::Approx(-3e20).epsilon(0.01));
  const AnyTensor odd = file.tensor("odd");
  CHECK(odd.to<float>().span()[3] == 4.0F);
  file.mapping().release(0, file.bytes());
  CHECK(odd.at(2) == 3.0);
  CHECK(file.bytes() == m2lm::read_file(path).size());

  CHECK(has(message_of<CheckpointError>([&] { (void)file.tensor("a.brian"); }), "t.safetensors: has no tensor \"a.brian\"; the nearest name is \"a.brain\""));
  const std::vector<NamedTensor> twice{tensors[0], tensors[0]}, reserved{{"__metadata__", tensors[0].tensor}}, hollow{{"x", {}}};
  for (const auto& bad : {twice, reserved, hollow}) CHECK_THROWS_AS(m2lm::write_safetensors(dir / "bad", bad), CheckpointError);
  CHECK_FALSE(m2lm::file_exists(dir / "bad"));
  m2lm::write_safetensors(dir / "none", {});
  CHECK(Safetensors::open(dir / "none").names().empty());
}

TEST_CASE("a tensor outlives the file object") {
  const m2lm_test::TemporaryDirectory dir;
  const std::vector<NamedTensor> tensors{{"x", tensor_of<float>({2}, {1, 2})}};
  m2lm::write_safetensors(dir / "x", tensors);
  AnyTensor t;
  {
    t = Safetensors::open(dir / "x").tensor("x");
  }
  CHECK(t.at(1) == 2.0);
}

TEST_CASE("damaged and contradictory files are refused with the place") {
  const m2lm_test::TemporaryDirectory dir;
  const auto message = [&](const std::string& bytes) { return open_message(dir.write("m.safetensors", bytes)); };
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}})";
  const std::string data(11, '\1');
  REQUIRE(message(container(good, data)).empty());

  CHECK(has(open_message(dir / "none.safetensors"), "none.safetensors: cannot open the file"));
  CHECK(has(open_message(dir.path()), "is not a regular file"));
  CHECK(has(message(""), "m.safetensors: a safetensors file begins with 8 bytes of header length, the file has 0 bytes"));
  CHECK(has(message("1234567"), "the file has 7 bytes"));
  // Every possible truncation.
  const std::string whole = container(good, data);
  for (std::size_t n = 0; n < whole.size(); ++n) CHECK_FALSE(message(whole.substr(0, n)).empty());
  CHECK(has(message(whole.substr(0, whole.size() - 1)), "tensor \"b\": its data end at byte 11, the file holds 10 bytes of data"));
  CHECK(has(message(whole + "x"), "the tensors cover 11 bytes of data, the file holds 12"));
  CHECK(has(message(container(good, data, 100'000'001)), "the header claims 100000001 bytes, more than"));
  CHECK(has(message(container(good, data, ~std::uint64_t{1})), "the header claims 18446744073709551614 bytes"));
  CHECK(has(message(container(good, data, 5000)), "the file is truncated"));
  CHECK(has(message(container("", "")), "does not begin with '{'"));
  CHECK(has(message(container("[]", "")), "does not begin with '{'"));
  CHECK(has(message(container("{\"a\":", "")), "the header is not valid"));
  CHECK(has(message(container("{}{}", "")), "the header is not valid"));
  CHECK(has(message(container("{\"\xff\":1}", "")), "the header is not valid"));
  CHECK(has(message(container(std::string(1, '{') + "\"a\":" + std::string(100, '['), "")), "nested deeper"));
  CHECK(message(container("{}", "")).empty());
  CHECK(message(container("{}      ", "")).empty());

  const auto one = [&](std::string_view description, std::string_view bytes = "12345678") {
    return message(container(std::string("{\"w\":") + std::string(description) + "}", bytes));
  };
  CHECK(has(one("3"), "tensor \"w\": its description must be an object"));
  CHECK(has(one(R"({"shape":[2],"data_offsets":[0,8]})"), "\"dtype\" is missing"));
  CHECK(has(one(R"({"dtype":3,"shape":[2],"data_offsets":[0,8]})"), "\"dtype\" is missing or not a string"));
  CHECK(has(one(R"({"dtype":"F32","data_offsets":[0,8]})"), "\"shape\" is missing"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2]})"), "\"data_offsets\" is missing"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), "\"data_offsets\" is missing or not two numbers"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":1})"), "unknown key \"extra\""));
  CHECK(has(one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "the extents must be whole numbers from 0 up, found -2"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "found 2.0"));
  CHECK(has(one(R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})"), "the extents must be"));
  CHECK(has(one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), "shape [3] of F32 takes 12 bytes, its data offsets give 8"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "its data end at 0, before they begin at 8"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,-8]})"), "the data offsets must be"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]})"), "the data offsets must be"));
  CHECK(has(one(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"), "end at byte 12, the file holds 8"));
  CHECK(has(one(R"({"dtype":"F32","shape":[1,1,1,1,1,1,2],"data_offsets":[0,8]})"), "has 7 dimensions, at most 6"));
  CHECK(has(one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", ""), "more elements than can be counted"));
  CHECK(has(one(R"({"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]})", ""), "takes more than 2^63 bytes"));
  CHECK(has(message(container(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "12345678")),
            "the key \"a\" is there twice"));
  CHECK(has(message(container(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[4],"data_offsets":[3,7]}})", "1234567")),
            "tensor \"b\" begins at byte 3 of the data, inside a, which ends at 4"));
  CHECK(has(message(container(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[3],"data_offsets":[5,8]}})", "12345678")),
            "tensor \"b\" begins at byte 5 of the data, with a gap after a, which ends at 4"));
  CHECK(has(message(container(R"({"__metadata__":{"a":1}})", "")), "__metadata__.a must be a string"));
  CHECK(has(message(container(R"({"__metadata__":[]})", "")), "__metadata__ must be an object"));

  // A dtype that is not known is an error when that tensor is asked for.
  const std::string mixed = dir.write("f8.safetensors", container(
      R"({"f8":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"x":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})", "123456"));
  const auto file = Safetensors::open(mixed);
  CHECK(file.tensor("x").at(0) == '5');
  CHECK_FALSE(file.dtype("f8").has_value());
  CHECK(has(message_of<CheckpointError>([&] { (void)file.tensor("f8"); }), "tensor \"f8\" has dtype F8_E4M3, which is not supported"));
}

TEST_CASE("random damage never gets past the checks as anything but an error or a valid file") {
  const m2lm_test::TemporaryDirectory dir;
  const std::vector<NamedTensor> tensors{{"a", tensor_of<float>({2, 3}, {1, 2, 3, 4, 5, 6})}, {"b", tensor_of<std::int8_t>({5}, {1, 2, 3, 4, 5})}};
  m2lm::write_safetensors(dir / "x", tensors);
  const std::string good = m2lm::read_file(dir / "x");
  std::uint32_t state = 12345;
  const auto next = [&] { return state = state * 1664525U + 1013904223U, state >> 8; };
  for (int round = 0; round < 3000; ++round) {
    std::string bad = good;
    for (std::uint32_t n = next() % 3 + 1; n > 0; --n) bad[next() % bad.size()] = static_cast<char>(next());
    try {
      const auto file = Safetensors::open(dir.write("y", bad));
      for (const auto& name : file.names())
        if (file.dtype(name)) {
          const AnyTensor t = file.tensor(name);
          double sum = 0;
          for (std::int64_t i = 0; i < t.shape().elements(); ++i) sum += t.at(i);
          CHECK((sum == sum || sum != sum));
        }
    } catch (const CheckpointError& error) {
      CHECK(has(error.what(), "/y: "));
    }
  }
}

TEST_CASE("checkpoints: single, in shards, and what can be missing") {
  const m2lm_test::TemporaryDirectory dir;
  const std::vector<NamedTensor> first{{"a", tensor_of<float>({1}, {1})}}, second{{"b", tensor_of<float>({1}, {2})}, {"c", tensor_of<float>({1}, {3})}};
  const auto message = [&] { return message_of<CheckpointError>([&] { (void)Checkpoint::open(dir.path()); }); };
  CHECK(has(message_of<CheckpointError>([&] { (void)Checkpoint::open(dir / "none"); }), "none: there is no such directory"));
  CHECK(has(message(), "holds neither model.safetensors nor pytorch_model.bin, nor the index of one in shards"));
  dir.write("consolidated.00.pth", "PK");
  CHECK(has(message(), "consolidated.00.pth: Meta's own layout is not supported; convert it"));
  dir.write("pytorch_model.bin", "PK");
  CHECK(has(message(), "pytorch_model.bin: no end of a zip archive is found"));

  dir.write("model.safetensors.index.json", "{\"metadata\": {}}");
  CHECK(has(message(), "model.safetensors.index.json: weight_map: is missing"));
  const auto index = [&](std::string_view map) { dir.write("model.safetensors.index.json", "{\"weight_map\": " + std::string(map) + "}"); };
  index(R"({"a": "s-1.safetensors", "b": "s-2.safetensors", "c": "s-2.safetensors"})");
  CHECK(has(message(), "shards are missing: s-1.safetensors (1 tensors, among them a), s-2.safetensors (2 tensors, among them b)"));
  m2lm::write_safetensors(dir / "s-1.safetensors", first);
  CHECK(has(message(), "shards are missing: s-2.safetensors"));
  m2lm::write_safetensors(dir / "s-2.safetensors", second);
  {
    const auto checkpoint = Checkpoint::open(dir.path());
    CHECK(checkpoint.names() == std::vector<std::string>{"a", "b", "c"});
    REQUIRE(checkpoint.find("c"));
    CHECK(checkpoint.find("c")->at(0) == 3.0);
    CHECK(checkpoint.find("d") == nullptr);
    CHECK(has(std::string(checkpoint.file_of("b")), "s-2.safetensors"));
    CHECK(has(message_of<CheckpointError>([&] { (void)checkpoint.file_of("d"); }), "has no tensor \"d\""));
    CHECK(checkpoint.total_bytes() == m2lm::read_file(dir / "s-1.safetensors").size() + m2lm::read_file(dir / "s-2.safetensors").size());
    checkpoint.release_pages();
    CHECK(checkpoint.find("a")->at(0) == 1.0);
  }
  index(R"({"a": "s-1.safetensors", "b": "s-2.safetensors", "x": "s-1.safetensors", "y": "s-2.safetensors"})");
  CHECK(has(message(), "are not in the shards that should hold them: x (s-1.safetensors), y (s-2.safetensors)"));
  for (const char* outside : {"../s-1.safetensors", "/etc/passwd", "sub/s.safetensors", "..", "", "s-1.bin"}) {
    index(R"({"a": ")" + std::string(outside) + "\"}");
    CHECK(has(message(), "weight_map must name .safetensors files of this directory, found \"" + std::string(outside) + "\" (tensor a)"));
  }
  index(R"({"a": 3})");
  CHECK(has(message(), "weight_map.a: must be a string, found integer 3"));
  index("[");
  CHECK(has(message(), "is not valid JSON"));
  m2lm::write_safetensors(dir / "model.safetensors", second);
  CHECK(Checkpoint::open(dir.path()).names() == std::vector<std::string>{"b", "c"});
}

TEST_CASE("a dtype of a checkpoint that is not supported is an error when asked for") {
  const m2lm_test::TemporaryDirectory dir;
  dir.write("model.safetensors", container(R"({"q":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}})", "1234"));
  const auto checkpoint = Checkpoint::open(dir.path());
  CHECK(has(message_of<CheckpointError>([&] { (void)checkpoint.find("q"); }), "F8_E4M3"));
}

TEST_CASE("checkpoints that transformers wrote") {
  const auto sharded = Checkpoint::open(m2lm_test::golden("llama/gqa_linear_tied_sharded"));
  REQUIRE(sharded.find("model.embed_tokens.weight"));
  CHECK(sharded.find("model.embed_tokens.weight")->shape().rank() == 2);
  CHECK(sharded.find("model.norm.weight")->dtype() == DType::f32);
  const auto bf16 = Checkpoint::open(m2lm_test::golden("llama/mha_wide_heads_bf16"));
  double largest = 0;
  for (const auto& name : bf16.names()) {
    CHECK(bf16.find(name)->dtype() == DType::bf16);
    for (std::int64_t i = 0; i < bf16.find(name)->shape().elements(); ++i) largest = std::max(largest, std::abs(bf16.find(name)->at(i)));
  }
  CHECK(largest < 10.0);  // read as f16, bfloat16 numbers around 1 look different
  const AnyTensor* norm = bf16.find("model.norm.weight");
  REQUIRE(norm);
  for (std::int64_t i = 0; i < norm->shape().elements(); ++i) CHECK(norm->at(i) == doctest::Approx(1.0).epsilon(0.5));
}
