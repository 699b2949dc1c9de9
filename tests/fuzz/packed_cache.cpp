// Packed weights in a file: a valid file with any bytes of its header changed, or cut off anywhere, is read or refused, and what is read of
// it lies inside the file. An input is a list of changes, because no chain of them leads past the hashes of a header made of nothing.
#include "fuzz.hpp"

#include <m2lm/models/packed_cache.hpp>
#include <m2lm/ops/linear.hpp>

#include <cstring>
#include <string>
#include <vector>

namespace {

struct Packed {
  std::string directory = "/tmp/m2lm-fuzz-packed-XXXXXX", file;
  std::vector<m2lm::Parameter> parameters = std::vector<m2lm::Parameter>(3);
  std::vector<m2lm::detail::NamedParameter> named;
  m2lm::Checkpoint checkpoint;
  std::vector<std::uint8_t> valid;

  m2lm::detail::PackedCacheRequest request(m2lm::PackedCacheMode mode, const std::string& path, bool in_full) const {
    return {.mode = mode, .path = path, .backend = "cpu", .version = 1, .in_full = in_full};
  }
  Packed() {
    m2lm_fuzz::check(mkdtemp(directory.data()) != nullptr, "a directory can be made");
    std::vector<m2lm::NamedTensor> tensors;
    for (const char* name : {"a", "b", "c"}) tensors.push_back({name, m2lm::AnyTensor(m2lm::Tensor<float>(m2lm::Shape{4, 8}))});
    m2lm::write_safetensors(directory + "/model.safetensors", tensors);
    checkpoint = m2lm::Checkpoint::open(directory);
    for (std::size_t i = 0; i < 3; ++i) {
      parameters[i] = m2lm::Parameter(m2lm::Shape{4, 8});
      parameters[i].value = *checkpoint.find(tensors[i].name);
      named.push_back({tensors[i].name, &parameters[i]});
    }
    file = directory + "/packed.safetensors";
    m2lm::detail::PackedCache cache;
    cache.start(request(m2lm::PackedCacheMode::written, file, false), named, checkpoint);
    for (std::size_t i = 0; i < 3; ++i) {
      auto bytes = std::make_shared<std::vector<std::byte>>(128);
      const m2lm::PackedMatrix matrix{.format = m2lm::DType::q8, .rows = 4, .cols = 8, .gated = false, .data = {bytes, bytes->data()}, .bytes = bytes->size()};
      cache.keep(std::span(&parameters[i].value, 1), matrix);
    }
    cache.write(checkpoint);
    const std::string text = m2lm::read_file(file);
    valid.assign(text.begin(), text.end());
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Packed packed;
  static m2lm_fuzz::MemoryFile input;
  std::vector<std::uint8_t> bytes = packed.valid;
  bool in_full = false;
  for (; size >= 3; data += 3, size -= 3) {
    const std::size_t at = data[0] | static_cast<std::size_t>(data[1]) << 8U;
    if (at >= 0xff00U)
      bytes.resize(bytes.size() * data[2] / 255);  // cut off
    else if (at >= 0xfe00U)
      in_full = true;
    else if (!bytes.empty())
      bytes[at % bytes.size()] = data[2];
  }
  input.put(bytes.data(), bytes.size());
  m2lm::detail::PackedCache cache;
  if (!m2lm_fuzz::accepted([&] { cache.start(packed.request(m2lm::PackedCacheMode::required, input.path(), in_full), packed.named, packed.checkpoint); })) return 0;
  unsigned sum = 0;
  for (const m2lm::Parameter& p : packed.parameters)
    m2lm_fuzz::accepted([&] {
      const m2lm::PackedMatrix found = cache.find(std::span(&p.value, 1), m2lm::DType::q8, false, 128);
      m2lm_fuzz::check(found.empty() || (found.bytes == 128 && found.rows == 4 && found.cols == 8), "a matrix is the one that was asked for");
      for (std::size_t i = 0; i < found.bytes; ++i) sum += std::to_integer<unsigned>(found.data.get()[i]);
    });
  if (in_full) m2lm_fuzz::check(sum == 0, "what a full check has passed is what was written");
  return 0;
}
