// Definitions of io/pickle.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/view.hpp>
#include <m2lm/io/pickle.hpp>

#include <array>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

namespace m2lm::inline M2LM_ABI::detail {

/// What the interpreter has a meaning for; the name is how a pickle calls it.
enum class PickleGlobal : std::uint8_t { ordered_dict, rebuild_tensor, rebuild_parameter, storage };

struct KnownGlobal {
  std::string_view module, name;
  PickleGlobal meaning;
  DType dtype;  ///< of a storage
};

inline constexpr std::array<KnownGlobal, 13> known_globals{{
    {"collections", "OrderedDict", PickleGlobal::ordered_dict, DType::inherit},
    {"torch._utils", "_rebuild_tensor_v2", PickleGlobal::rebuild_tensor, DType::inherit},
    {"torch._utils", "_rebuild_parameter", PickleGlobal::rebuild_parameter, DType::inherit},
    {"torch", "DoubleStorage", PickleGlobal::storage, DType::f64},
    {"torch", "FloatStorage", PickleGlobal::storage, DType::f32},
    {"torch", "HalfStorage", PickleGlobal::storage, DType::f16},
    {"torch", "BFloat16Storage", PickleGlobal::storage, DType::bf16},
    {"torch", "LongStorage", PickleGlobal::storage, DType::i64},
    {"torch", "IntStorage", PickleGlobal::storage, DType::i32},
    {"torch", "ShortStorage", PickleGlobal::storage, DType::i16},
    {"torch", "CharStorage", PickleGlobal::storage, DType::i8},
    {"torch", "ByteStorage", PickleGlobal::storage, DType::u8},
    {"torch", "BoolStorage", PickleGlobal::storage, DType::boolean},
}};

/// Bytes of a pickle as they may be shown: printable ASCII, the rest as '?'.
inline std::string shown(std::string_view text, std::size_t most = 60) {
  std::string out(text.substr(0, most));
  for (char& c : out)
    if (c < ' ' || c > '~') c = '?';
  return text.size() > most ? out + "..." : out;
}

/// The stack machine. Containers lie in flat tables and values name them by index: a list may hold itself, and nothing recurses.
class PickleMachine {
  enum class Kind : std::uint8_t { none, boolean, integer, real, text, tuple, list, dict, global, storage, tensor };
  struct Value {  // 16 bytes: an opcode of one byte can make one
    Kind kind = Kind::none;
    std::uint32_t index = 0;   // of tuples_, dicts_, …, known_globals; of a text: its first byte
    std::int64_t integer = 0;  // of a text: its length
  };
  struct Storage {
    DType dtype;
    std::string_view key;
    std::int64_t elements;
  };
  struct TensorParts {
    std::uint32_t storage;
    std::int64_t offset;
    std::uint32_t shape, strides;  // tuples
  };

  std::span<const std::byte> bytes_;
  std::string_view file_;
  std::size_t at_ = 0, opcode_at_ = 0;
  std::vector<Value> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint32_t, Value> memo_;
  std::vector<std::vector<Value>> tuples_{1};  // the first is the empty one; lists too: only their length may grow
  std::vector<std::vector<std::pair<Value, Value>>> dicts_;
  std::vector<Storage> storages_;
  std::vector<TensorParts> tensors_;

 public:
  PickleMachine(std::span<const std::byte> bytes, std::string_view file) : bytes_(bytes), file_(file) {}

  std::vector<PickledTensor> run() {
    while (step()) {
    }
    check(marks_.empty() && stack_.size() == 1, "ends with ", stack_.size(), " values on its stack instead of one");
    return state_dict(stack_.back());
  }

 private:
  template <class... Piece>
  void check(bool ok, const Piece&... what) const {
    require<CheckpointError>(ok, file_, ": the pickle at byte ", opcode_at_, ": ", what...);
  }

  // ---- reading ----
  template <class T>
  T number() {
    check(bytes_.size() - at_ >= sizeof(T), "ends in the middle of a number: the file is truncated");
    T value{};
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  std::string_view text(std::uint64_t size) {
    check(size <= bytes_.size() - at_, "a text of ", size, " bytes does not fit in the ", bytes_.size() - at_, " that are left");
    const std::string_view out(reinterpret_cast<const char*>(bytes_.data()) + at_, static_cast<std::size_t>(size));
    at_ += out.size();
    return out;
  }
  std::string_view line() {
    const std::string_view rest(reinterpret_cast<const char*>(bytes_.data()) + at_, bytes_.size() - at_);
    const std::size_t end = rest.find('\n');
    check(end != std::string_view::npos, "a line does not end");
    at_ += end + 1;
    return rest.substr(0, end);
  }

  // ---- the stack ----
  static Value of_kind(Kind kind, std::size_t index) { return {.kind = kind, .index = static_cast<std::uint32_t>(index)}; }
  static Value of_integer(std::int64_t x) { return {.kind = Kind::integer, .integer = x}; }
  Value of_text(std::string_view s) const {
    const auto begin = s.empty() ? 0 : s.data() - reinterpret_cast<const char*>(bytes_.data());
    return {.kind = Kind::text, .index = static_cast<std::uint32_t>(begin), .integer = static_cast<std::int64_t>(s.size())};
  }
  std::string_view text_of(const Value& v, std::string_view what) const {
    check(v.kind == Kind::text, what, " is no text");
    return {reinterpret_cast<const char*>(bytes_.data()) + v.index, static_cast<std::size_t>(v.integer)};
  }
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void push(const Value& v) { stack_.push_back(v); }
  Value pop() {
    check(stack_.size() > floor(), "takes a value from an empty stack");
    const Value out = stack_.back();
    stack_.pop_back();
    return out;
  }
  const Value& top() const {
    check(stack_.size() > floor(), "looks at an empty stack");
    return stack_.back();
  }
  std::vector<Value> pop_to_mark() {
    check(!marks_.empty(), "has no mark where one is needed");
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Value> out(begin, stack_.end());
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return out;
  }
  void push_tuple(std::vector<Value> values) {
    if (values.empty()) return push(of_kind(Kind::tuple, 0));
    tuples_.push_back(std::move(values));
    push(of_kind(Kind::tuple, tuples_.size() - 1));
  }
  void push_last(std::size_t count) {
    std::vector<Value> values(count);
    for (std::size_t i = count; i-- > 0;) values[i] = pop();
    push_tuple(std::move(values));
  }
  void push_dict() {
    dicts_.emplace_back();
    push(of_kind(Kind::dict, dicts_.size() - 1));
  }
  std::vector<std::pair<Value, Value>>& top_dict() {
    check(top().kind == Kind::dict, "puts a member into what is no dict");
    return dicts_[top().index];
  }
  const std::vector<Value>& tuple(const Value& v, std::string_view what) const {
    check(v.kind == Kind::tuple, what, " is no tuple");
    return tuples_[v.index];
  }
  std::int64_t integer(const Value& v, std::string_view what) const {
    check(v.kind == Kind::integer, what, " is no integer");
    return v.integer;
  }

  // ---- what is built ----
  void push_global(std::string_view module, std::string_view name) {
    for (std::size_t i = 0; i < known_globals.size(); ++i)
      if (known_globals[i].module == module && known_globals[i].name == name) return push(of_kind(Kind::global, i));
    check(false, "asks for ", shown(module), ".", shown(name),
          ", which no state dict needs; nothing was run. If you trust the file, load it with PyTorch and save its state dict as safetensors");
  }
  void reduce() {
    const Value arguments = pop(), function = pop();
    check(function.kind == Kind::global, "calls what is no function");
    const std::vector<Value>& given = tuple(arguments, "what a function is called with");
    switch (known_globals[function.index].meaning) {
      case PickleGlobal::ordered_dict:
        check(given.empty(), "an OrderedDict is made of ", given.size(), " arguments; torch.save writes none");
        return push_dict();
      case PickleGlobal::rebuild_tensor: {
        // (storage, offset, shape, strides, requires_grad, hooks[, metadata])
        check(given.size() == 6 || given.size() == 7, "a tensor is made of ", given.size(), " arguments instead of 6 or 7");
        check(given[0].kind == Kind::storage, "a tensor's first argument is no storage");
        const TensorParts parts{given[0].index, integer(given[1], "a tensor's offset"), given[2].index, given[3].index};
        const std::size_t rank = tuple(given[2], "a tensor's shape").size();
        check(tuple(given[3], "a tensor's strides").size() == rank, "a tensor has ", rank, " dimensions and ", tuples_[given[3].index].size(),
              " strides");
        check(rank <= static_cast<std::size_t>(max_rank), "a tensor has ", rank, " dimensions, at most ", max_rank, " are supported");
        for (const Value& v : tuples_[given[2].index]) (void)integer(v, "a tensor's extent");
        for (const Value& v : tuples_[given[3].index]) (void)integer(v, "a tensor's stride");
        tensors_.push_back(parts);
        return push(of_kind(Kind::tensor, tensors_.size() - 1));
      }
      case PickleGlobal::rebuild_parameter:
        check(given.size() == 3 && given[0].kind == Kind::tensor, "a parameter is made of something else than a tensor and two more values");
        return push(Value(given[0]));
      case PickleGlobal::storage: break;
    }
    check(false, "calls torch.", known_globals[function.index].name, ", which is a name of a type only");
  }
  void persistent_storage() {
    // ("storage", type, key, location, elements)
    const Value id = pop();
    const std::vector<Value>& given = tuple(id, "a persistent id");
    check(given.size() == 5 && text_of(given[0], "a persistent id's kind") == "storage", "a persistent id is not that of a storage");
    check(given[1].kind == Kind::global && known_globals[given[1].index].meaning == PickleGlobal::storage, "a storage has a type that is none");
    storages_.push_back(
        {known_globals[given[1].index].dtype, text_of(given[2], "a storage's key"), integer(given[4], "a storage's number of elements")});
    push(of_kind(Kind::storage, storages_.size() - 1));
  }

  bool step() {
    opcode_at_ = at_;
    check(at_ < bytes_.size(), "ends without STOP: the file is truncated");
    const auto opcode = std::to_integer<unsigned char>(bytes_[at_++]);
    switch (opcode) {
      case 0x80: {  // PROTO
        const auto version = number<std::uint8_t>();
        check(version >= 2 && version <= 5, "protocol ", static_cast<int>(version), " is not known; 2 to 5 are");
        break;
      }
      case 0x95: (void)number<std::uint64_t>(); break;  // FRAME: a hint for buffers
      case '.': return false;                           // STOP
      case '(': marks_.push_back(stack_.size()); break;
      case '0': (void)pop(); break;
      case 'N': push({}); break;
      case 0x88: push({.kind = Kind::boolean, .integer = 1}); break;
      case 0x89: push({.kind = Kind::boolean, .integer = 0}); break;
      case 'J': push(of_integer(number<std::int32_t>())); break;
      case 'K': push(of_integer(number<std::uint8_t>())); break;
      case 'M': push(of_integer(number<std::uint16_t>())); break;
      case 0x8a: {  // LONG1: two's complement, little-endian
        const auto size = number<std::uint8_t>();
        check(size <= 8, "an integer of ", static_cast<int>(size), " bytes is larger than any size");
        const std::string_view digits = text(size);
        std::uint64_t value = 0;
        for (std::size_t i = 0; i < digits.size(); ++i) value |= std::uint64_t{static_cast<unsigned char>(digits[i])} << (8 * i);
        if (size > 0 && size < 8 && (static_cast<unsigned char>(digits.back()) & 0x80U)) value |= ~std::uint64_t{0} << (8U * size);
        push(of_integer(static_cast<std::int64_t>(value)));
        break;
      }
      case 'G':  // BINFLOAT: no tensor needs its value
        (void)text(8);
        push({.kind = Kind::real});
        break;
      case 'X': push(of_text(text(number<std::uint32_t>()))); break;
      case 0x8c: push(of_text(text(number<std::uint8_t>()))); break;
      case 0x8d: push(of_text(text(number<std::uint64_t>()))); break;
      case ')': push_tuple({}); break;
      case 't': push_tuple(pop_to_mark()); break;
      case 0x85: push_last(1); break;
      case 0x86: push_last(2); break;
      case 0x87: push_last(3); break;
      case ']':
        tuples_.emplace_back();
        push(of_kind(Kind::list, tuples_.size() - 1));
        break;
      case 'a': append({pop()}); break;
      case 'e': append(pop_to_mark()); break;
      case '}': push_dict(); break;
      case 's': {
        const Value value = pop(), key = pop();
        top_dict().emplace_back(key, value);
        break;
      }
      case 'u': {
        const std::vector<Value> members = pop_to_mark();
        check(members.size() % 2 == 0, "a dict gets a key without a value");
        auto& dict = top_dict();
        for (std::size_t i = 0; i < members.size(); i += 2) dict.emplace_back(members[i], members[i + 1]);
        break;
      }
      case 'c': {
        const std::string_view module = line();
        push_global(module, line());
        break;
      }
      case 0x93: {  // STACK_GLOBAL
        const Value name = pop(), module = pop();
        push_global(text_of(module, "a global's module"), text_of(name, "a global's name"));
        break;
      }
      case 'R': reduce(); break;
      case 'b': {  // BUILD: a state dict's attributes, "_metadata", which hold no tensors
        const Value attributes = pop();
        check(attributes.kind == Kind::dict && top().kind == Kind::dict, "sets the state of something else than a dict");
        break;
      }
      case 'Q': persistent_storage(); break;
      case 'h': get(number<std::uint8_t>()); break;
      case 'j': get(number<std::uint32_t>()); break;
      case 'q': note<std::uint8_t>(); break;
      case 'r': note<std::uint32_t>(); break;
      case 0x94: memo_.insert_or_assign(static_cast<std::uint32_t>(memo_.size()), top()); break;  // MEMOIZE
      default:
        check(false, "opcode ", static_cast<int>(opcode),
              opcode > ' ' && opcode <= '~' ? concat(" ('", static_cast<char>(opcode), "')") : std::string(),
              " is not one that torch.save of a state dict uses; nothing was run");
    }
    return true;
  }
  void append(const std::vector<Value>& values) {
    check(top().kind == Kind::list, "appends to what is no list");
    auto& list = tuples_[top().index];
    list.insert(list.end(), values.begin(), values.end());
  }
  template <class Key>
  void note() {
    const Value value = top();
    memo_.insert_or_assign(number<Key>(), value);
  }
  void get(std::uint32_t key) {
    const auto found = memo_.find(key);
    check(found != memo_.end(), "recalls value ", key, ", which was not noted");
    push(found->second);
  }

  std::vector<PickledTensor> state_dict(const Value& root) {
    check(root.kind == Kind::dict, "holds something else than a state dict (a whole module?); save model.state_dict()");
    const auto& members = dicts_[root.index];
    std::vector<PickledTensor> out;
    std::size_t dicts = 0;
    for (const auto& [key, value] : members) {
      dicts += value.kind == Kind::dict;
      if (value.kind != Kind::tensor) continue;  // an epoch, a version: nothing to load
      const TensorParts& parts = tensors_[value.index];
      const Storage& storage = storages_[parts.storage];
      PickledTensor tensor{.name = text_of(key, "a tensor's name"),
                           .dtype = storage.dtype,
                           .storage = storage.key,
                           .storage_elements = storage.elements,
                           .offset = parts.offset,
                           .shape = {},
                           .strides = {}};
      for (const Value& v : tuples_[parts.shape]) tensor.shape.push_back(v.integer);
      for (const Value& v : tuples_[parts.strides]) tensor.strides.push_back(v.integer);
      out.push_back(std::move(tensor));
    }
    check(!out.empty() || dicts == 0, "has no tensor among its ", members.size(),
          " members, but dicts: a training checkpoint? Save the state dict that it holds, alone");
    return out;
  }
};

}  // namespace m2lm::detail

namespace m2lm::inline M2LM_ABI {

M2LM_IMPL std::vector<PickledTensor> read_pickled_tensors(std::span<const std::byte> pickle, std::string_view file, const PytorchLimits& limits) {
  constexpr std::size_t most = std::size_t{1} << 31;  // positions and counts are kept in 32 bits
  require<OptionError>(limits.max_pickle_bytes <= most, "m2lm: PytorchLimits::max_pickle_bytes = ", limits.max_pickle_bytes, " is above ", most);
  require<CheckpointError>(pickle.size() <= limits.max_pickle_bytes, file, ": the pickle is ", pickle.size(), " bytes long, more than the ",
                           limits.max_pickle_bytes, " allowed (PytorchLimits::max_pickle_bytes); a state dict takes about 150 for each tensor");
  return detail::PickleMachine(pickle, file).run();
}

}  // namespace m2lm
