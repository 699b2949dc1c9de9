// safetensors: any bytes are read or refused, and what was read lies inside the file.
// The mutator works on the header as a list of tensors, because no chain of byte changes leads past a checked JSON header.
#include "fuzz.hpp"

#include <m2lm/interop/json.hpp>
#include <m2lm/io/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::MemoryFile input;
  input.put(data, size);
  m2lm::Safetensors file;
  if (!m2lm_fuzz::accepted([&] { file = m2lm::Safetensors::open(input.path()); })) return 0;
  m2lm_fuzz::check(file.bytes() == size, "the file has the size it has");
  (void)file.metadata();
  std::size_t data_bytes = 0;
  std::size_t sum = 0;
  for (const std::string& name : file.names()) {
    m2lm_fuzz::check(file.contains(name), "names are of tensors");
    m2lm_fuzz::accepted([&] {
      const m2lm::AnyTensor tensor = file.tensor(name);
      for (std::size_t i = 0; i < tensor.bytes(); ++i) sum += std::to_integer<std::size_t>(tensor.data()[i]);
      data_bytes += tensor.bytes();
    });
    m2lm_fuzz::accepted([&] { (void)file.tensor(name + "?"); });
  }
  m2lm_fuzz::check(data_bytes <= size, "tensors are no larger than the file");
  m2lm_fuzz::check(sum <= 255 * size, "every byte of a tensor can be read");
  return 0;
}

namespace {

struct Description {
  std::string name, dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;
};

struct Container {
  std::vector<Description> tensors;
  nlohmann::json metadata;
  std::string data;
};

constexpr std::array<std::pair<const char*, unsigned>, 12> dtypes = {{{"F64", 8},
                                                                      {"F32", 4},
                                                                      {"F16", 2},
                                                                      {"BF16", 2},
                                                                      {"I64", 8},
                                                                      {"I32", 4},
                                                                      {"I16", 2},
                                                                      {"I8", 1},
                                                                      {"U8", 1},
                                                                      {"BOOL", 1},
                                                                      {"F8_E4M3", 1},
                                                                      {"", 1}}};

using Random = std::minstd_rand;
std::size_t below(Random& random, std::size_t n) { return n ? random() % n : 0; }

/// What can be understood of the bytes; an empty container where nothing can.
Container parse(const std::uint8_t* data, std::size_t size) {
  Container out;
  std::uint64_t length = 0;
  if (size < 8) return out;
  std::memcpy(&length, data, 8);
  if (length > size - 8) return out;
  const char* text = reinterpret_cast<const char*>(data) + 8;
  const auto header = nlohmann::json::parse(text, text + length, nullptr, false);
  out.data.assign(text + length, size - 8 - length);
  if (!header.is_object()) return out;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      out.metadata = value;
      continue;
    }
    if (!value.is_object()) continue;
    Description tensor{.name = name};
    if (value.contains("dtype") && value["dtype"].is_string()) tensor.dtype = value["dtype"];
    if (value.contains("shape") && value["shape"].is_array())
      for (const auto& extent : value["shape"])
        if (extent.is_number_unsigned()) tensor.shape.push_back(extent);
    if (value.contains("data_offsets") && value["data_offsets"].is_array() && value["data_offsets"].size() == 2) {
      const auto& offsets = value["data_offsets"];
      if (offsets[0].is_number_unsigned()) tensor.begin = offsets[0];
      if (offsets[1].is_number_unsigned()) tensor.end = offsets[1];
    }
    out.tensors.push_back(std::move(tensor));
  }
  return out;
}

/// Makes dtypes, shapes and offsets agree, one tensor behind the other, and gives them the data they need.
void mend(Container& container) {
  constexpr std::uint64_t most = 1 << 12;
  std::uint64_t offset = 0;
  for (Description& tensor : container.tensors) {
    std::uint64_t bytes = 1;
    for (const auto& [name, width] : dtypes)
      if (tensor.dtype == name) bytes = width;
    if (tensor.shape.size() > 8) tensor.shape.resize(8);
    for (std::uint64_t& extent : tensor.shape) {
      if (extent > most || bytes * extent > most) extent = 1;
      bytes *= extent;
    }
    tensor.begin = offset;
    tensor.end = offset += bytes;
  }
  container.data.resize(static_cast<std::size_t>(offset), 'x');
}

void mutate_number(std::uint64_t& number, Random& random) {
  switch (below(random, 7)) {
    case 0: ++number; break;
    case 1: --number; break;
    case 2: number = below(random, 9); break;
    case 3: number <<= 1U; break;
    case 4: number ^= std::uint64_t{1} << below(random, 64); break;
    case 5: number = ~std::uint64_t{0} >> below(random, 34); break;
    default: number = std::uint64_t{1} << below(random, 64);
  }
}

void mutate_text(std::string& text, Random& random) {
  std::array<std::uint8_t, 64> buffer{};
  const std::size_t n = std::min(text.size(), buffer.size() / 2);
  std::copy_n(text.begin(), n, buffer.begin());
  const std::size_t m = LLVMFuzzerMutate(buffer.data(), n, buffer.size());
  text.assign(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(m));
  if (below(random, 16) == 0) text = "__metadata__";
}

void mutate(Container& container, Random& random) {
  auto& tensors = container.tensors;
  if (tensors.empty() || (tensors.size() < 32 && below(random, 8) == 0)) {
    Description added{.name = "t" + std::to_string(below(random, 100)), .dtype = dtypes[below(random, dtypes.size())].first};
    for (std::size_t i = below(random, 4); i > 0; --i) added.shape.push_back(below(random, 5));
    tensors.insert(tensors.begin() + static_cast<std::ptrdiff_t>(below(random, tensors.size() + 1)), std::move(added));
    return;
  }
  const std::size_t at = below(random, tensors.size());
  Description& tensor = tensors[at];
  switch (below(random, 10)) {
    case 0: tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(at)); break;
    case 1: std::swap(tensor, tensors[below(random, tensors.size())]); break;
    case 2: mutate_text(tensor.name, random); break;
    case 3: tensor.dtype = dtypes[below(random, dtypes.size())].first; break;
    case 4: tensor.shape.insert(tensor.shape.end(), below(random, 3) == 0 ? 9 : 1, below(random, 3)); break;
    case 5:
      if (!tensor.shape.empty()) tensor.shape.pop_back();
      break;
    case 6:
      if (!tensor.shape.empty()) mutate_number(tensor.shape[below(random, tensor.shape.size())], random);
      break;
    case 7: mutate_number(below(random, 2) ? tensor.begin : tensor.end, random); break;
    case 8: container.data.resize(below(random, 2) ? container.data.size() / 2 : container.data.size() + below(random, 16) + 1); break;
    default:
      if (!container.metadata.is_object()) container.metadata = nlohmann::json::object();
      std::string key = "k", value = "v";
      mutate_text(key, random);
      mutate_text(value, random);
      if (below(random, 8) == 0)
        container.metadata[key] = 1;
      else
        container.metadata[key] = value;
  }
}

std::string serialise(const Container& container, Random& random) {
  // Text by hand: a JSON library would neither repeat a key nor keep the order of the tensors.
  const auto quote = [](const std::string& s) { return nlohmann::json(s).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace); };
  std::string header = "{";
  const auto separate = [&] { header += header.size() > 1 ? "," : ""; };
  if (!container.metadata.is_null())
    header += "\"__metadata__\":" + container.metadata.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  for (const Description& tensor : container.tensors) {
    separate();
    header += quote(tensor.name) + ":{\"dtype\":" + quote(tensor.dtype) + ",\"shape\":" + nlohmann::json(tensor.shape).dump() +
              ",\"data_offsets\":[" + std::to_string(tensor.begin) + "," + std::to_string(tensor.end) + "]}";
  }
  header += "}";
  if (below(random, 4) == 0) header.append(below(random, 9), ' ');
  std::uint64_t length = header.size();
  if (below(random, 32) == 0) mutate_number(length, random);
  std::string out(reinterpret_cast<const char*>(&length), 8);
  return out + header + container.data;
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
  Random random(seed + 1);
  if (below(random, 10) == 0) return LLVMFuzzerMutate(data, size, max_size);
  Container container = parse(data, size);
  for (std::size_t n = 1 + below(random, 4); n > 0; --n) {
    mutate(container, random);
    // After most changes all else follows, so that only one thing is wrong, or nothing.
    if (below(random, 3) != 0 && n > 1) mend(container);
  }
  if (below(random, 2) == 0) mend(container);
  const std::string out = serialise(container, random);
  if (out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, out.data(), out.size());
  return out.size();
}
