// pytorch_model.bin: any bytes are read or refused, nothing of the pickle runs, and what was read lies in the file or in a bounded copy.
// The mutator takes the archive apart, changes the pickle by instructions or a storage by bytes, and puts it together with the right
// checksums: no chain of byte changes keeps those.
#include "../support/torch_file.hpp"
#include "fuzz.hpp"

#include <m2lm/io/pickle.hpp>
#include <m2lm/io/pytorch.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::MemoryFile input;
  input.put(data, size);
  m2lm::PytorchFile file;
  const bool whole = m2lm_fuzz::accepted([&] { file = m2lm::PytorchFile::open(input.path()); });
  // The bytes as a pickle alone, too.
  m2lm_fuzz::accepted([&] {
    const auto tensors = m2lm::read_pickled_tensors(std::as_bytes(std::span(data, size)), "fuzz");
    for (const m2lm::PickledTensor& t : tensors)
      m2lm_fuzz::check(t.shape.size() == t.strides.size() && t.name.size() <= size, "a tensor is described whole");
  });
  if (!whole) return 0;
  const auto bytes = file.mapping().bytes();
  m2lm_fuzz::check(bytes.size() == size, "the file has the size it has");
  std::size_t sum = 0;
  for (const std::string& name : file.names()) {
    m2lm_fuzz::check(file.contains(name), "names are of tensors");
    const m2lm::AnyTensor& tensor = file.tensor(name);
    m2lm_fuzz::check(tensor.bytes() <= size, "a tensor is no larger than the file");
    for (std::size_t i = 0; i < tensor.bytes(); ++i) sum += std::to_integer<std::size_t>(tensor.data()[i]);
    m2lm_fuzz::accepted([&] { (void)file.tensor(name + "?"); });
  }
  m2lm_fuzz::check(sum <= 255 * size * (1 + file.names().size()), "every byte of a tensor can be read");
  return 0;
}

namespace {

using m2lm_test::PickleText;
using m2lm_test::ZipMember;
using Random = std::minstd_rand;

std::size_t below(Random& random, std::size_t n) { return n ? random() % n : 0; }

/// The members that stand one behind the other from the beginning of the file.
std::vector<ZipMember> parse(std::string_view bytes) {
  std::vector<ZipMember> out;
  while (bytes.size() >= 30 && bytes.starts_with("PK\x03\x04") && out.size() < 64) {
    std::uint32_t size = 0;
    std::uint16_t name = 0, extra = 0;
    std::memcpy(&size, bytes.data() + 18, 4);
    std::memcpy(&name, bytes.data() + 26, 2);
    std::memcpy(&extra, bytes.data() + 28, 2);
    // torch writes the sizes behind the data; then the data end where the next header begins.
    const std::size_t begin = 30U + name + extra;
    if (begin > bytes.size()) break;
    std::size_t end = begin + size;
    if (size == 0) end = std::min(bytes.find("PK", begin), bytes.size());
    if (end > bytes.size()) break;
    out.push_back(m2lm_test::zip_member(bytes.substr(30, name), bytes.substr(begin, end - begin)));
    while (end < bytes.size() && !bytes.substr(end).starts_with("PK\x03\x04") && !bytes.substr(end).starts_with("PK\x01\x02")) ++end;
    bytes = bytes.substr(end);
  }
  return out;
}

std::int64_t number(Random& random) {
  switch (below(random, 8)) {
    case 0: return -1;
    case 1: return std::int64_t{1} << below(random, 63);
    case 2: return static_cast<std::int64_t>(~std::uint64_t{0} >> 1);
    default: return static_cast<std::int64_t>(below(random, 9));
  }
}

std::vector<std::int64_t> numbers(Random& random) {
  std::vector<std::int64_t> out;
  for (std::size_t n = below(random, below(random, 9) == 0 ? 9 : 4); n > 0; --n) out.push_back(number(random));
  return out;
}

/// A few instructions that belong together.
std::string instructions(Random& random) {
  static constexpr std::array<std::string_view, 22> plain{"}", "]", ")", "(", "N",    "0",    "t",    "s",    "u",    "a",    "e",
                                                          "b", "R", "Q", ".", "\x85", "\x86", "\x87", "\x94", "\x93", "\x88", "K\x03"};
  static constexpr std::array<std::string_view, 8> storages{"FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage",
                                                            "CharStorage",  "BoolStorage", "DoubleStorage",   "QInt8Storage"};
  PickleText p;
  switch (below(random, 8)) {
    case 0: p.global("os", "system"); break;
    case 1: p.global("torch", storages[below(random, storages.size())]); break;
    case 2: p.integer(number(random)); break;
    case 3: p.integers(numbers(random)); break;
    case 4: p.raw("h").raw(std::string(1, static_cast<char>(below(random, 60)))); break;
    case 5: p.raw("q").raw(std::string(1, static_cast<char>(below(random, 60)))); break;
    case 6: {
      std::vector<std::int64_t> shape = numbers(random), strides = numbers(random);
      if (below(random, 4) != 0) strides.resize(shape.size(), 1);
      p.string("t" + std::to_string(below(random, 5)))
          .tensor(storages[below(random, storages.size())], std::to_string(below(random, 4)), number(random), number(random), shape, strides)
          .raw("s");
      break;
    }
    default: p.raw(plain[below(random, plain.size())]);
  }
  return p.text().substr(2);  // without the protocol
}

void mutate_bytes(std::string& text, std::size_t most) {
  std::vector<std::uint8_t> buffer(std::max<std::size_t>(text.size() + 64, 64));
  std::copy(text.begin(), text.end(), buffer.begin());
  const std::size_t size = LLVMFuzzerMutate(buffer.data(), text.size(), std::min(buffer.size(), std::max<std::size_t>(most, 1)));
  text.assign(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(size));
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
  Random random(seed + 1);
  if (below(random, 8) == 0) return LLVMFuzzerMutate(data, size, max_size);
  std::vector<ZipMember> members = parse(m2lm_fuzz::text(data, size));
  if (members.empty()) {
    const std::string start = PickleText().raw("}.").text();
    members = {m2lm_test::zip_member("a/data.pkl", start), m2lm_test::zip_member("a/data/0", std::string(24, 'x'))};
  }
  const bool wide = below(random, 3) == 0;
  std::uint64_t count_error = 0, directory_error = 0;
  for (std::size_t n = 1 + below(random, 3); n > 0; --n) {
    ZipMember& member = members[below(random, members.size())];
    const auto pickle = std::find_if(members.begin(), members.end(), [](const ZipMember& m) { return m.name.ends_with("data.pkl"); });
    switch (below(random, 12)) {
      case 0: member.size_error = static_cast<std::uint64_t>(number(random)); break;
      case 1: member.offset_error = static_cast<std::uint64_t>(number(random)); break;
      case 2: count_error = static_cast<std::uint64_t>(number(random)); break;
      case 3: directory_error = static_cast<std::uint64_t>(number(random)); break;
      case 4: mutate_bytes(member.name, 40); break;
      case 5:
        mutate_bytes(member.data, 2000);
        member.crc = m2lm_test::slow_crc32(member.data);
        break;
      case 6:
        if (below(random, 2) != 0 && members.size() < 32)
          members.push_back(ZipMember(member));
        else if (members.size() > 1)
          members.erase(members.begin() + (&member - members.data()));
        break;
      default:
        if (pickle == members.end()) break;
        if (below(random, 3) == 0) {
          mutate_bytes(pickle->data, 2000);
        } else if (below(random, 3) == 0 && !pickle->data.empty()) {  // a piece goes, or is there twice
          const std::size_t begin = below(random, pickle->data.size()), length = below(random, 24);
          const std::string piece = pickle->data.substr(begin, length);
          if (below(random, 2) != 0)
            pickle->data.erase(begin, length);
          else
            pickle->data.insert(begin, piece);
        } else {
          // Before the end mostly, where the state dict lies on the stack.
          const std::size_t end = pickle->data.empty() ? 0 : pickle->data.size() - 1;
          pickle->data.insert(below(random, 3) == 0 ? below(random, end + 1) : end, instructions(random));
        }
        pickle->crc = m2lm_test::slow_crc32(pickle->data);
    }
  }
  const std::string out = m2lm_test::zip_archive(members, wide, count_error, directory_error);
  if (out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, out.data(), out.size());
  return out.size();
}
