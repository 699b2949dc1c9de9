// ConfigValue: read-only JSON with errors that name file and key. JsonWriter: JSON for output.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What is read of JSON. A file beyond a limit is refused with an error that names the limit.
struct JsonLimits {
  std::size_t max_bytes = std::size_t{1} << 28;         ///< of a file
  int max_nesting = 64;                                 ///< arrays and objects around a value
  std::size_t max_string_bytes = std::size_t{1} << 24;  ///< of a key or a text
};

/// A value of a JSON file, with the file's name and the dotted path that led here. Copies share the document.
/// Types are strict: an integer is not a boolean, 2.0 is not an integer; an integer is a double where one is asked for.
class ConfigValue {
  struct Document;
  std::shared_ptr<const Document> document_;
  const void* value_ = nullptr;
  std::string where_;

 public:
  /// null, of no file.
  ConfigValue() = default;
  /// Of duplicate keys the last one counts. throws CheckpointError: the file is missing, is not JSON (with line and column), or is over a
  /// limit.
  static ConfigValue parse_file(std::string_view path, const JsonLimits& limits = {});
  /// `name` stands for the file in messages.
  static ConfigValue parse_text(std::string_view text, std::string_view name, const JsonLimits& limits = {});

  /// True of a value of no file too.
  bool is_null() const;
  /// Whether `keys` and [key] may be asked.
  bool is_object() const;
  /// Whether `size` and `at` may be asked.
  bool is_array() const;
  /// Whether as<std::string>() gives a text.
  bool is_string() const;
  /// Whether it is true or false.
  bool is_bool() const;
  /// An integer or a number with a fraction.
  bool is_number() const;
  /// A number written without fraction and exponent.
  bool is_integer() const;
  /// "null", "object", "array", "string", "bool", "integer" or "number".
  std::string_view type_name() const;

  /// This value as JSON, indented; keys in order of the alphabet.
  std::string text() const;
  /// Name of the file.
  const std::string& file() const;
  /// Dotted path inside the file, "" for the whole; "text_config.rope_scaling", "names.3".
  const std::string& path() const { return where_; }

  /// True when this is an object that has the key, even with the value null.
  bool contains(std::string_view key) const;
  /// True when this is an object that has the key with a value other than null.
  bool has_value(std::string_view key) const;
  /// throws CheckpointError naming file and dotted path when this is no object or lacks the key.
  ConfigValue operator[](std::string_view key) const;
  /// Keys of an object in order of the alphabet. throws CheckpointError when this is no object.
  std::vector<std::string> keys() const;

  /// Elements of an array. throws CheckpointError when this is none.
  std::size_t size() const;
  /// Element i of an array. throws CheckpointError when this is none, or has no such element.
  ConfigValue at(std::size_t i) const;

  /// This value as T: bool, an integer type, float, double or std::string.
  /// throws CheckpointError naming file, path and what was found: another type, an integer out of range.
  template <class T>
  T as() const {
    if constexpr (std::is_same_v<T, bool>) {
      return as_bool();
    } else if constexpr (std::is_integral_v<T>) {
      const std::int64_t value = as_integer();
      if (!std::in_range<T>(value)) out_of_range(value);
      return static_cast<T>(value);
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(as_double());
    } else {
      static_assert(std::is_same_v<T, std::string>, "m2lm::ConfigValue: ask for bool, an integer, float, double or std::string");
      return as_string();
    }
  }
  /// (*this)[key].as<T>().
  template <class T>
  T get(std::string_view key) const {
    return (*this)[key].template as<T>();
  }
  /// `fallback` when the key is missing or null, or this is null. throws as `get` when this is another thing than an object.
  template <class T>
  T get_or(std::string_view key, T fallback) const {
    if (!is_object() && !is_null()) wrong_type("an object");
    return has_value(key) ? get<T>(key) : fallback;
  }
  /// The same of a text.
  std::string get_or(std::string_view key, const char* fallback) const { return get_or<std::string>(key, fallback); }
  /// The array at `key` as a vector. throws as `get`.
  template <class T>
  std::vector<T> get_list(std::string_view key) const {
    const ConfigValue list = (*this)[key];
    std::vector<T> out;
    const std::size_t n = list.size();
    out.reserve(n);
    for (std::size_t i = 0; i < n; ++i) out.push_back(list.at(i).template as<T>());
    return out;
  }

  /// throws CheckpointError: "FILE: PATH: what". For checks of the values' meaning.
  [[noreturn]] void fail(std::string_view what) const;

 private:
  friend std::vector<ConfigValue> parse_json_lines(std::string_view path, const JsonLimits& limits);
  friend class Gguf;  // its metadata are read like a JSON file
  bool as_bool() const;
  std::int64_t as_integer() const;
  double as_double() const;
  std::string as_string() const;
  [[noreturn]] void wrong_type(std::string_view wanted) const;
  [[noreturn]] void out_of_range(std::int64_t value) const;
};

/// One JSON value per line; empty lines are left out. Messages name "FILE line N".
/// throws InputError for the file as a whole and for a line that is not JSON.
std::vector<ConfigValue> parse_json_lines(std::string_view path, const JsonLimits& limits = {});

/// The text as a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD.
std::string json_quote(std::string_view text);

/// Builds JSON text in order: w.begin_object().key("tokens").value(3).end_object().
class JsonWriter {
  std::string text_;
  bool comma_ = false;

 public:
  /// Members follow: `key`, then its value.
  JsonWriter& begin_object() { return open('{'); }
  /// Closes the innermost object.
  JsonWriter& end_object() { return close('}'); }
  /// Elements follow.
  JsonWriter& begin_array() { return open('['); }
  /// Closes the innermost array.
  JsonWriter& end_array() { return close(']'); }
  /// The name of the value that comes next.
  JsonWriter& key(std::string_view name);
  /// A string, quoted as json_quote does.
  JsonWriter& value(std::string_view text);
  /// The same.
  JsonWriter& value(const char* text) { return value(std::string_view(text)); }
  /// true or false.
  JsonWriter& value(bool b);
  /// The shortest digits that read back as the same number; null when it is not finite.
  JsonWriter& value(double number);
  /// An integer, in full.
  template <class T>
    requires(std::is_integral_v<T> && !std::is_same_v<T, bool>)
  JsonWriter& value(T number) {
    return raw(std::to_string(number));
  }
  /// The value null.
  JsonWriter& null() { return raw("null"); }
  /// key(name).value(v).
  template <class T>
  JsonWriter& member(std::string_view name, const T& v) {
    return key(name).value(v);
  }
  /// What was built so far.
  const std::string& text() const { return text_; }

 private:
  JsonWriter& open(char c);
  JsonWriter& close(char c);
  JsonWriter& raw(std::string_view text);
};

}  // namespace m2lm
