// Packed weights in a file: the model is the same with it, and a file that does not fit is refused or passed by, never believed.
#include "models_support.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>

namespace {

using namespace m2lm_test;
using m2lm::CheckpointError;
using m2lm::PackedCacheMode;

constexpr DType all_formats[] = {DType::f32, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8};

Lm load(const std::string& directory, DType format, PackedCacheMode mode, std::string_view file = {}, bool check = false, std::size_t memory_limit = 0) {
  return Lm::from_pretrained(directory, Cpu({.threads = 2}),
                             {.precision = Precision{.weights = format}, .check = check, .memory_limit = memory_limit, .packed_cache_mode = mode, .packed_cache = file});
}

Tensor<float> logits(const Lm& model) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back((i * 37 + 11) % 96);
  return model.logits(model.prompt(ids));
}

std::string message_of(const auto& f) {
  try {
    f();
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, std::string_view piece) { return text.find(piece) != std::string::npos; }

std::string read(const std::string& path) { return m2lm::read_file(path); }
void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// Changes a file and gives it its old time back.
void change_quietly(const std::string& path, const auto& change) {
  struct stat before {};
  REQUIRE(::stat(path.c_str(), &before) == 0);
  std::string bytes = read(path);
  change(bytes);
  write(path, bytes);
  const timespec times[2] = {before.st_atim, before.st_mtim};
  REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

/// A small model with its packed weights beside it.
struct Packed {
  TemporaryDirectory directory;
  std::string source, file;
  Tensor<float> wanted;

  explicit Packed(DType format, const m2lm::LlamaConfig& config = m2lm::testing::small_llama()) {
    m2lm::testing::write_synthetic_llama(directory.path(), config);
    source = m2lm::join_path(directory.path(), "model.safetensors");
    file = m2lm::detail::packed_cache_path(directory.path(), "cpu", format);
    wanted = logits(load(directory.path(), format, PackedCacheMode::ignored));
    const Lm written = load(directory.path(), format, PackedCacheMode::written);
    CHECK(same_bits(logits(written), wanted));
    CHECK(written.load_report().mapped_matrices == 0);
    REQUIRE(m2lm::file_exists(file));
  }
};

TEST_CASE("packed weights in a file: in every format the model is the same, bit for bit, and every matrix comes from the file") {
  for (const DType format : all_formats) {
    CAPTURE(m2lm::dtype_name(format));
    const Packed p(format);
    CHECK(contains(p.file, m2lm::concat("m2lm-packed.cpu.", m2lm::dtype_name(format))));
    for (const PackedCacheMode mode : {PackedCacheMode::when_valid, PackedCacheMode::required}) {
      const Lm model = load(p.directory.path(), format, mode, {}, mode == PackedCacheMode::required);
      // Two layers of a fused q·k·v, an output projection, a gated pair and a down projection, and the head.
      CHECK(model.load_report().mapped_matrices == 9);
      CHECK(model.load_report().packed_cache.empty());
      CHECK(same_bits(logits(model), p.wanted));
    }
    CHECK(load(p.directory.path(), format, PackedCacheMode::ignored).load_report().mapped_matrices == 0);
  }
}

TEST_CASE("packed weights in a file take no memory of the process: the limit counts what is packed anew") {
  const Packed p(DType::f32);
  std::size_t packed = 0;
  for (std::size_t bytes = 1; bytes < std::size_t{1} << 20 && packed == 0; bytes += bytes / 8 + 1) {
    try {
      load(p.directory.path(), DType::f32, PackedCacheMode::ignored, {}, false, bytes);
      packed = bytes;
    } catch (const m2lm::CapacityError&) {
    }
  }
  REQUIRE(packed > 0);
  CHECK(load(p.directory.path(), DType::f32, PackedCacheMode::required, {}, false, packed / 8).load_report().mapped_matrices == 9);
}

TEST_CASE("a file of packed weights for another precision: what it lacks is packed") {
  const Packed p(DType::q4);
  const Lm model = load(p.directory.path(), DType::q8, PackedCacheMode::required, p.file);
  CHECK(model.load_report().mapped_matrices == 0);
  CHECK(same_bits(logits(model), logits(load(p.directory.path(), DType::q8, PackedCacheMode::ignored))));
}

TEST_CASE("a file of packed weights beside a checkpoint that has changed is passed by, or refused where it was asked for") {
  const auto check_refused = [](const Packed& p, DType format, std::string_view why, bool check = false) {
    CAPTURE(why);
    const Lm model = load(p.directory.path(), format, PackedCacheMode::when_valid, {}, check);
    CHECK(model.load_report().mapped_matrices == 0);
    CHECK_MESSAGE(contains(model.load_report().packed_cache, why), model.load_report().packed_cache);
    CHECK(contains(model.load_report().packed_cache, "m2lm-pack"));
    CHECK(same_bits(logits(model), logits(load(p.directory.path(), format, PackedCacheMode::ignored))));
    const std::string message = message_of([&] { load(p.directory.path(), format, PackedCacheMode::required, {}, check); });
    CHECK_MESSAGE(contains(message, why), message);
    CHECK(contains(message, p.file));
  };
  SUBCASE("its time") {
    const Packed p(DType::q8);
    const timespec times[2] = {{1, 5}, {1, 5}};
    REQUIRE(::utimensat(AT_FDCWD, p.source.c_str(), times, 0) == 0);
    check_refused(p, DType::q8, "changed at 1.000000005");
  }
  SUBCASE("its header") {
    const Packed p(DType::q8);
    change_quietly(p.source, [](std::string& bytes) { std::swap(bytes[bytes.size() - 1], bytes[bytes.size() - 4]); });
    check_refused(p, DType::q8, "have changed since");
  }
  SUBCASE("its size") {
    const Packed p(DType::q8);
    m2lm::LlamaConfig config = m2lm::testing::small_llama();
    config.intermediate_size = 80;
    m2lm::testing::write_synthetic_llama(p.directory.path(), config);
    check_refused(p, DType::q8, "bytes");
  }
  SUBCASE("its middle, which only a full check sees") {
    m2lm::LlamaConfig config = m2lm::testing::small_llama();
    config.vocab_size = 96;
    config.hidden_size = 256;
    config.intermediate_size = 512;
    config.head_dim = 64;
    const Packed p(DType::q8, config);
    change_quietly(p.source, [](std::string& bytes) {
      REQUIRE(bytes.size() > (std::size_t{1} << 20) + (std::size_t{1} << 17));
      bytes[(std::size_t{1} << 20) + 4097] = static_cast<char>(bytes[(std::size_t{1} << 20) + 4097] ^ 1);
    });
    CHECK(load(p.directory.path(), DType::q8, PackedCacheMode::required).load_report().mapped_matrices == 9);
    check_refused(p, DType::q8, "other contents", true);
  }
  SUBCASE("one byte of the packed weights, which only a full check sees") {
    const Packed p(DType::q8);
    change_quietly(p.file, [](std::string& bytes) { bytes[bytes.size() - 100] = static_cast<char>(bytes[bytes.size() - 100] ^ 1); });
    check_refused(p, DType::q8, "damaged", true);
  }
}

TEST_CASE("a file of packed weights that is another file, or of another backend or version") {
  const Packed p(DType::q4);
  const auto rewritten = [&](std::string_view key, const std::string& value) {
    const Safetensors old = Safetensors::open(p.file);
    std::map<std::string, std::string> metadata = old.metadata();
    REQUIRE(metadata.contains(std::string(key)));
    metadata[std::string(key)] = value;
    std::vector<m2lm::NamedTensor> tensors;
    for (const std::string& name : old.names()) tensors.push_back({name, old.tensor(name)});
    const std::string path = m2lm::join_path(p.directory.path(), "other.safetensors");
    m2lm::write_safetensors(path, tensors, metadata, 64);
    return message_of([&] { load(p.directory.path(), DType::q4, PackedCacheMode::required, path); });
  };
  CHECK(rewritten("backend", "cpu") == "no error");
  CHECK(contains(rewritten("backend", "cuda"), "another backend: it says \"cuda\", expected \"cpu\""));
  CHECK(contains(rewritten("version", "999999"), "another version"));
  CHECK(contains(rewritten("kind", "x"), "no file of packed weights"));
  CHECK(contains(rewritten("files", "2"), "other files"));
  CHECK(contains(message_of([&] { load(p.directory.path(), DType::q4, PackedCacheMode::required, p.source); }), "no file of packed weights: it says nothing"));
  CHECK(contains(message_of([&] { load(p.directory.path(), DType::q4, PackedCacheMode::required, p.file + "x"); }), "there is no such file"));
  // Data that begin on no border of a cache line, and matrices of another size.
  const Safetensors old = Safetensors::open(p.file);
  std::vector<m2lm::NamedTensor> tensors{{"a", m2lm::AnyTensor(Tensor<std::uint8_t>(Shape{8}))}};
  for (const std::string& name : old.names()) tensors.push_back({name, old.tensor(name)});
  const std::string path = m2lm::join_path(p.directory.path(), "other.safetensors");
  m2lm::write_safetensors(path, tensors, old.metadata(), 64);
  CHECK(contains(message_of([&] { load(p.directory.path(), DType::q4, PackedCacheMode::required, path); }), "no packed matrix"));
  tensors.clear();
  for (const std::string& name : old.names()) tensors.push_back({name, m2lm::AnyTensor(Tensor<std::uint8_t>(Shape{64}))});
  m2lm::write_safetensors(path, tensors, old.metadata(), 64);
  const Lm model = load(p.directory.path(), DType::q4, PackedCacheMode::required, path);
  CHECK(model.load_report().mapped_matrices == 0);
  CHECK(same_bits(logits(model), p.wanted));
}

TEST_CASE("a file of packed weights cut off anywhere, or with any bytes of its header changed: used, or passed by, and never a crash") {
  const Packed p(DType::q4);
  const std::string whole = read(p.file);
  std::mt19937 random(7);
  const std::string path = m2lm::join_path(p.directory.path(), "damaged.safetensors");
  int used = 0;
  for (int trial = 0; trial < 300; ++trial) {
    std::string bytes = whole;
    if (trial % 2 == 0) {
      bytes.resize(random() % whole.size());
    } else {
      std::uint64_t header = 0;
      std::memcpy(&header, whole.data(), sizeof(header));
      for (unsigned i = 0; i <= random() % 3; ++i) bytes[random() % (8 + header)] = static_cast<char>(random());
    }
    write(path, bytes);
    const Lm model = load(p.directory.path(), DType::q4, PackedCacheMode::when_valid, path);
    used += model.load_report().mapped_matrices > 0;
    CHECK(model.load_report().packed_cache.empty() == (model.load_report().mapped_matrices > 0));
    if (trial % 2 == 0) {
      CHECK(model.load_report().mapped_matrices == 0);
      CHECK(same_bits(logits(model), p.wanted));
    } else {
      logits(model);
    }
  }
  CHECK(used < 30);
}

TEST_CASE("a file of packed weights that is cut off while the model is in use is an error, not wrong numbers") {
  const Packed p(DType::bf16);
  const Lm model = load(p.directory.path(), DType::bf16, PackedCacheMode::required);
  CHECK(same_bits(logits(model), logits(load(p.directory.path(), DType::bf16, PackedCacheMode::ignored))));
  REQUIRE(::truncate(p.file.c_str(), 4096) == 0);
  CHECK(contains(message_of([&] { logits(model); }), p.file));
}

TEST_CASE("what has no files has no file of packed weights") {
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llama(directory.path());
  const m2lm::ConfigValue config = m2lm::ConfigValue::parse_file(m2lm::join_path(directory.path(), "config.json"));
  CHECK(contains(message_of([&] { Lm::from_config(config, 1, Cpu{}, {.packed_cache_mode = PackedCacheMode::written}); }), "made from a configuration"));
  CHECK(Lm::from_config(config, 1).load_report().mapped_matrices == 0);
  using OnReference = TextModel<m2lm::Reference<float>>;
  CHECK_THROWS_AS(OnReference::from_pretrained(directory.path(), {}, {.packed_cache_mode = PackedCacheMode::required}), m2lm::OptionError);
}

}  // namespace
