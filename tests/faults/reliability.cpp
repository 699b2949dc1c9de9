// Probe: what docs/reliability.md promises, in the smallest cases that a fault breaks.
#include <m2lm/m2lm.hpp>

#include "../unit/io_save_faults.cpp"
#include "../unit/models_support.hpp"

#include <limits>

namespace {
using namespace m2lm_test;
}

TEST_CASE("a file that is cut while it is mapped says so") {
  const TemporaryDirectory directory;
  const std::string path = directory.write("file", std::string(10000, 'x'));
  const m2lm::MappedFile file = m2lm::MappedFile::open(path);
  std::filesystem::resize_file(path, 100);
  CHECK_THROWS_AS(file.require_intact(), m2lm::CheckpointError);
}

TEST_CASE("the check of weights names a NaN") {
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llama(directory.path());
  change_tensors(directory, [](std::vector<m2lm::NamedTensor>& tensors) {
    Tensor<float> values = tensors.front().tensor.to<float>();
    values.data()[3] = std::numeric_limits<float>::quiet_NaN();
    tensors.front().tensor = AnyTensor(std::move(values));
  });
  CHECK_THROWS_AS(Lm::from_pretrained(directory.path(), Cpu({.threads = 1}), {.check = true}), m2lm::CheckpointError);
}

TEST_CASE("an id far behind the vocabulary is refused") {
  const TemporaryDirectory directory;
  copy_directory(golden("llava/with_tokenizer"), directory);
  directory.write("added_tokens.json", R"({"<far>": 1000000})");
  CHECK_THROWS_AS(m2lm::Tokenizer::from_directory(directory.path()), m2lm::CheckpointError);
}

TEST_CASE("a link that leads out of the directory is refused") {
  const TemporaryDirectory directory, elsewhere;
  m2lm::testing::write_synthetic_llama(directory.path());
  std::filesystem::rename(directory / "config.json", elsewhere / "config.json");
  std::filesystem::create_symlink(elsewhere / "config.json", directory / "config.json");
  CHECK_THROWS_AS(Lm::from_pretrained(directory.path(), Cpu({.threads = 1})), m2lm::CheckpointError);
}
