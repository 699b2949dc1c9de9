// .npy and .npz: what NumPy wrote is read, what is written is what NumPy writes, and damaged files get no further than an error.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>

#include <support.hpp>
#include <support/torch_file.hpp>

#include <cstring>

using m2lm::AnyTensor;
using m2lm::CheckpointError;
using m2lm::DType;
using m2lm::Shape;
using m2lm::Tensor;
using m2lm_test::golden;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

/// Element i of the recorded [2, 3, 4] array is i / 8.
template <class T = float>
Tensor<T> eighths(const Shape& shape) {
  Tensor<T> out(shape);
  for (std::int64_t i = 0; i < out.elements(); ++i) out.data()[i] = static_cast<T>(i) / 8;
  return out;
}

void check_eighths(const AnyTensor& tensor, DType dtype, const Shape& shape) {
  CHECK(tensor.dtype() == dtype);
  REQUIRE(tensor.shape() == shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) CHECK(tensor.at(i) == static_cast<double>(i) / 8);
}

std::string npy(std::string_view header, std::string_view data, char version = 1) {
  std::string out = "\x93NUMPY";
  out += version;
  out += '\0';
  out += version == 1 ? m2lm_test::little_endian(static_cast<std::uint16_t>(header.size())) : m2lm_test::little_endian(static_cast<std::uint32_t>(header.size()));
  out += header;
  out += data;
  return out;
}

std::string refusal(std::string_view bytes) {
  return message_of<CheckpointError>([&] { (void)m2lm::parse_npy(std::as_bytes(std::span(bytes.data(), bytes.size())), nullptr, "x.npy"); });
}

}  // namespace

TEST_CASE("arrays that NumPy wrote") {
  check_eighths(m2lm::load_npy(golden("numpy/f4.npy")), DType::f32, {2, 3, 4});
  check_eighths(m2lm::load_npy(golden("numpy/f4_fortran.npy")), DType::f32, {2, 3, 4});
  check_eighths(m2lm::load_npy(golden("numpy/f8_big_endian.npy")), DType::f64, {2, 3, 4});
  const AnyTensor scalar = m2lm::load_npy(golden("numpy/scalar.npy"));
  CHECK(scalar.shape().rank() == 0);
  CHECK(scalar.at(0) == -5.0);
  const AnyTensor truths = m2lm::load_npy(golden("numpy/vector.npy"));
  CHECK(truths.dtype() == DType::boolean);
  CHECK((truths.at(0) == 1.0 && truths.at(1) == 0.0 && truths.at(2) == 1.0));
  CHECK(m2lm::load_npy(golden("numpy/empty.npy")).shape() == Shape{0, 3});
}

TEST_CASE("arrays that are refused, with what to do") {
  const auto message = [](const char* name) { return message_of<CheckpointError>([&] { (void)m2lm::load_npy(golden(name)); }); };
  CHECK(has(message("numpy/complex.npy"), "complex.npy: is an array of '<c8'; f8, f4, f2, i8, i4, i2, i1, u1 and b1 are read: convert it with .astype"));
  CHECK(has(message("numpy/objects.npy"), "Python objects, which are never unpickled"));
  CHECK(has(message("numpy/records.npy"), "is an array of records"));
  CHECK(has(message("numpy/several.npz"), "does not begin as a .npy file does"));
  CHECK(has(message("numpy/no_such.npy"), "no_such.npy"));
}

TEST_CASE("several arrays that NumPy wrote") {
  const std::vector<m2lm::NamedTensor> arrays = m2lm::load_npz(golden("numpy/several.npz"));
  REQUIRE(arrays.size() == 3);
  CHECK(arrays[0].name == "first");
  check_eighths(arrays[0].tensor, DType::f32, {2, 3, 4});
  CHECK(arrays[1].name == "second");
  CHECK(arrays[1].tensor.shape() == Shape{2, 2});
  CHECK(arrays[1].tensor.at(3) == 4.0);
  check_eighths(arrays[2].tensor, DType::f16, {3, 4});
}

TEST_CASE("compressed arrays are unpacked") {
  const std::string path = golden("numpy/compressed.npz");
  const std::vector<m2lm::NamedTensor> arrays = m2lm::load_npz(path);
  REQUIRE(arrays.size() == 1);
  check_eighths(arrays[0].tensor, DType::f32, {2, 3, 4});
  CHECK(has(message_of<CheckpointError>([&] { (void)m2lm::ZipArchive::open(m2lm::MappedFile::open(path)); }), "is compressed (method 8); only stored entries are read here"));

  const m2lm_test::TemporaryDirectory dir;
  const std::string good = m2lm::read_file(path);
  const auto refused = [&](std::size_t at, char value) {
    std::string bytes = good;
    bytes[at] = value;
    return message_of<CheckpointError>([&] { (void)m2lm::load_npz(dir.write("damaged.npz", bytes)); });
  };
  const std::size_t directory = good.rfind("PK\x01\x02");
  CHECK(has(refused(directory + 16, static_cast<char>(good[directory + 16] ^ 1)), "its checksum is"));
  CHECK(has(refused(directory + 27, '\x7f'), "deflated ones cannot hold"));
  // Byte by byte: the array as it is, or an error.
  for (std::size_t at = 0; at < good.size(); ++at) (void)refused(at, static_cast<char>(good[at] ^ 0x55));
}

TEST_CASE("what is written is, byte for byte, what numpy.save writes") {
  const m2lm_test::TemporaryDirectory dir;
  m2lm::save_npy(dir / "ours.npy", AnyTensor(eighths({2, 3, 4})));
  CHECK(m2lm::read_file(dir / "ours.npy") == m2lm::read_file(golden("numpy/f4.npy")));
  Tensor<bool> truths(Shape{3});
  truths.data()[0] = truths.data()[2] = true;
  m2lm::save_npy(dir / "truths.npy", AnyTensor(std::move(truths)));
  CHECK(m2lm::read_file(dir / "truths.npy") == m2lm::read_file(golden("numpy/vector.npy")));
  Tensor<std::int64_t> scalar{Shape{}};
  *scalar.data() = -5;
  m2lm::save_npy(dir / "scalar.npy", AnyTensor(std::move(scalar)));
  CHECK(m2lm::read_file(dir / "scalar.npy") == m2lm::read_file(golden("numpy/scalar.npy")));
  CHECK(has(message_of<CheckpointError>([&] { m2lm::save_npy(dir / "b.npy", AnyTensor(Tensor<m2lm::Bf16>(Shape{2}))); }),
            "numpy has no bf16: convert it with AnyTensor::to<float>()"));
  CHECK(!m2lm::file_exists(dir / "b.npy"));
}

TEST_CASE("several arrays are written and read again, on borders of 64 bytes") {
  const m2lm_test::TemporaryDirectory dir;
  const std::vector<m2lm::NamedTensor> arrays{{"weights", AnyTensor(eighths({5, 7}))}, {"bias/b", AnyTensor(eighths<double>({3}))}, {"none", AnyTensor(Tensor<float>(Shape{0, 2}))}};
  m2lm::save_npz(dir / "a.npz", arrays);
  const auto back = m2lm::load_npz(dir / "a.npz");
  REQUIRE(back.size() == 3);
  for (std::size_t i = 0; i < back.size(); ++i) {
    CHECK(back[i].name == arrays[i].name);
    CHECK(back[i].tensor.shape() == arrays[i].tensor.shape());
    CHECK(std::memcmp(back[i].tensor.data(), arrays[i].tensor.data(), arrays[i].tensor.bytes()) == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(back[i].tensor.data()) % 64 == 0);
  }
  const std::vector<m2lm::NamedTensor> twice{arrays[0], arrays[0]};
  CHECK(has(message_of<CheckpointError>([&] { m2lm::save_npz(dir / "b.npz", twice); }), "array \"weights\" cannot be written"));

  std::string damaged = m2lm::read_file(dir / "a.npz");
  damaged[200] = static_cast<char>(damaged[200] ^ 1);
  const std::string path = dir.write("damaged.npz", damaged);
  CHECK(has(message_of<CheckpointError>([&] { (void)m2lm::load_npz(path); }), "its checksum is"));
}

TEST_CASE("headers that lie") {
  constexpr std::string_view good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
  CHECK(refusal(npy(good, "12345678")) == "");
  CHECK(refusal(npy(good, "12345678", 2)) == "");
  CHECK(has(refusal(npy(good, "1234567")), "x.npy: an array [2] of f32 has 8 bytes, the file has 7 behind its header"));
  CHECK(has(refusal(npy(good, "123456789")), "has 9 behind its header"));
  CHECK(has(refusal(npy(good, "12345678", 4)), "version 4"));
  CHECK(has(refusal("\x93NUMPY"), "does not begin as a .npy file does"));
  CHECK(has(refusal(npy(good, "12345678").substr(0, 40)), "the file is truncated or damaged"));
  const auto header = [](std::string_view text) { return refusal(npy(text, "")); };
  CHECK(has(header(""), "lacks a {"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, }"), "lacks descr, fortran_order or shape"));
  CHECK(has(header("{'descr': '<f4', 'descr': '<f4', }"), "has the key 'descr' twice"));
  CHECK(has(header("{'color': '<f4', }"), "has the key 'color'"));
  CHECK(has(header("{'descr': '<f4"), "has a text without end"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': Maybe"), "neither True nor False"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), "has an extent that is no number"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 99999999999999999999), }"), "has an extent that is no number"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1), }"), "more than 6 dimensions"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4611686018427387904, 0), }"), "is larger than any memory"));
  CHECK(has(header("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), } + x"), "goes on behind the dict"));
}
