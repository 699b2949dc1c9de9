// .npy and .npz: any bytes are read or refused, every element can be read, and what is written of it is read again as the same.
#include "fuzz.hpp"

#include <m2lm/io/npy.hpp>

#include <cstring>

namespace {

void read_all(const m2lm::AnyTensor& tensor, std::size_t size) {
  m2lm_fuzz::check(tensor.bytes() <= size, "an array is no larger than the file");
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) (void)tensor.at(i);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::MemoryFile input;
  m2lm_fuzz::accepted([&] {
    const m2lm::AnyTensor tensor = m2lm::parse_npy(std::as_bytes(std::span(data, size)), nullptr, "fuzz");
    read_all(tensor, size);
    const std::string header = m2lm::detail::npy_header(tensor, "fuzz");
    std::string again = header;
    again.append(reinterpret_cast<const char*>(tensor.data()), tensor.bytes());
    const m2lm::AnyTensor same = m2lm::parse_npy(std::as_bytes(std::span(again.data(), again.size())), nullptr, "again");
    m2lm_fuzz::check(same.shape() == tensor.shape() && same.dtype() == tensor.dtype() &&
                         std::memcmp(same.data(), tensor.data(), tensor.bytes()) == 0,
                     "what is written is what was read");
  });
  if (size >= 2 && data[0] == 'P' && data[1] == 'K') {
    input.put(data, size);
    m2lm_fuzz::accepted([&] {
      for (const m2lm::NamedTensor& item : m2lm::load_npz(input.path())) read_all(item.tensor, size);
    });
  }
  return 0;
}
