// Definitions of io/config.hpp, and the JSON reader of the io floor.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/interop/json.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file_impl.hpp>

#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

namespace m2lm::inline M2LM_ABI {

namespace detail {

using Json = nlohmann::json;

/// Empties a value from its leaves up. The JSON library's own destructor of a value that holds others allocates, and ends the program
/// when there is no memory (nlohmann_json 3.11).
M2LM_IMPL void clear_json(Json& value) noexcept {
  if (auto* object = value.get_ptr<Json::object_t*>()) {
    for (auto& [key, member] : *object) clear_json(member);
    object->clear();
  } else if (auto* array = value.get_ptr<Json::array_t*>()) {
    for (Json& element : *array) clear_json(element);
    array->clear();
  }
}

/// A JSON value that frees itself without allocating.
struct OwnedJson {
  Json root;
  OwnedJson() = default;
  ~OwnedJson() { clear_json(root); }
  OwnedJson(const OwnedJson&) = delete;
  OwnedJson& operator=(const OwnedJson&) = delete;
};

/// Builds a document from the parser's events, within limits. Functions and their names are those that the JSON library calls.
class JsonBuilder {
  Json& root_;
  const JsonLimits& limits_;
  bool unique_keys_;
  std::vector<Json*> open_;  // containers around the next value
  Json* member_ = nullptr;   // where the value of the last key goes

  bool refuse(std::string why) {
    problem = std::move(why);
    return false;
  }
  Json* put(Json&& value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (auto* array = open_.back()->get_ptr<Json::array_t*>()) return &array->emplace_back(std::move(value));
    clear_json(*member_);  // of equal keys the last one counts
    *member_ = std::move(value);
    return member_;
  }
  bool scalar(Json&& value) {
    put(std::move(value));
    return true;
  }
  bool open(Json&& container) {
    if (static_cast<std::int64_t>(open_.size()) >= limits_.max_nesting)
      return refuse(concat("nested deeper than ", limits_.max_nesting, " levels (JsonLimits::max_nesting)"));
    Json* const at = put(std::move(container));
    open_.push_back(at);
    return true;
  }
  bool short_enough(const std::string& text) {
    return text.size() <= limits_.max_string_bytes ||
           refuse(concat("a string of ", text.size(), " bytes, \"", text.substr(0, 20), "...\", is longer than ", limits_.max_string_bytes,
                         " (JsonLimits::max_string_bytes)"));
  }

 public:
  std::string problem;

  JsonBuilder(Json& root, const JsonLimits& limits, bool unique_keys) : root_(root), limits_(limits), unique_keys_(unique_keys) {}
  bool null() { return scalar(Json()); }
  bool boolean(bool value) { return scalar(Json(value)); }
  bool number_integer(Json::number_integer_t value) { return scalar(Json(value)); }
  bool number_unsigned(Json::number_unsigned_t value) { return scalar(Json(value)); }
  bool number_float(Json::number_float_t value, const std::string&) { return scalar(Json(value)); }
  bool string(std::string& value) { return short_enough(value) && scalar(Json(std::move(value))); }
  bool binary(Json::binary_t&) { return refuse("binary values are not JSON"); }
  bool start_object(std::size_t) { return open(Json(Json::value_t::object)); }
  bool key(std::string& name) {
    if (!short_enough(name)) return false;
    const auto [at, fresh] = open_.back()->get_ref<Json::object_t&>().try_emplace(std::move(name));
    if (!fresh && unique_keys_) return refuse(concat("the key \"", at->first, "\" is there twice"));
    member_ = &at->second;
    return true;
  }
  bool end_object() { return close(); }
  bool start_array(std::size_t) { return open(Json(Json::value_t::array)); }
  bool end_array() { return close(); }
  bool parse_error(std::size_t, const std::string&, const Json::exception& error) {
    const std::string_view what = error.what();
    const std::size_t tag = what.find("] ");  // "[json.exception.parse_error.101] parse error at line 1, …"
    return refuse(std::string(tag == std::string_view::npos ? what : what.substr(tag + 2)));
  }

 private:
  bool close() {
    open_.pop_back();
    return true;
  }
};

/// Reads JSON into `out`; returns what is wrong with it, or an empty string. Without `unique_keys` the last of equal keys counts.
M2LM_IMPL std::string try_parse_json(std::string_view text, bool unique_keys, const JsonLimits& limits, OwnedJson& out) {
  JsonBuilder builder(out.root, limits, unique_keys);
  if (Json::sax_parse(text.begin(), text.end(), &builder)) return {};
  return builder.problem.empty() ? std::string("it cannot be read") : builder.problem;
}

}  // namespace detail

struct ConfigValue::Document : detail::OwnedJson {
  std::string file;
};

namespace detail {

M2LM_IMPL const Json& json_of(const void* value) {
  static const Json null;
  return value ? *static_cast<const Json*>(value) : null;
}

}  // namespace detail

M2LM_IMPL ConfigValue ConfigValue::parse_text(std::string_view text, std::string_view name, const JsonLimits& limits) {
  auto document = std::make_shared<Document>();
  document->file = std::string(name);
  const std::string problem = detail::try_parse_json(text, false, limits, *document);
  if (!problem.empty()) throw CheckpointError(concat(name, ": is not valid JSON: ", problem));
  ConfigValue out;
  out.value_ = &document->root;
  out.document_ = std::move(document);
  return out;
}

M2LM_IMPL ConfigValue ConfigValue::parse_file(std::string_view path, const JsonLimits& limits) {
  std::string text;
  const std::string problem = detail::try_read_file(path, limits.max_bytes, text);
  if (!problem.empty()) throw CheckpointError(problem);
  return parse_text(text, path, limits);
}

M2LM_IMPL bool ConfigValue::is_null() const { return detail::json_of(value_).is_null(); }
M2LM_IMPL bool ConfigValue::is_object() const { return detail::json_of(value_).is_object(); }
M2LM_IMPL bool ConfigValue::is_array() const { return detail::json_of(value_).is_array(); }
M2LM_IMPL bool ConfigValue::is_string() const { return detail::json_of(value_).is_string(); }
M2LM_IMPL bool ConfigValue::is_bool() const { return detail::json_of(value_).is_boolean(); }
M2LM_IMPL bool ConfigValue::is_number() const { return detail::json_of(value_).is_number(); }
M2LM_IMPL bool ConfigValue::is_integer() const { return detail::json_of(value_).is_number_integer(); }

M2LM_IMPL std::string_view ConfigValue::type_name() const {
  if (is_null()) return "null";
  if (is_object()) return "object";
  if (is_array()) return "array";
  if (is_string()) return "string";
  if (is_bool()) return "bool";
  return is_integer() ? "integer" : "number";
}

M2LM_IMPL const std::string& ConfigValue::file() const {
  static const std::string none = "(no file)";
  return document_ ? document_->file : none;
}

M2LM_IMPL void ConfigValue::fail(std::string_view what) const {
  throw CheckpointError(concat(file(), ": ", where_, where_.empty() ? "" : ": ", what));
}

M2LM_IMPL void ConfigValue::wrong_type(std::string_view wanted) const {
  std::string found(type_name());
  if (!is_object() && !is_array() && !is_null()) {
    std::string text = detail::json_of(value_).dump(-1, ' ', true, detail::Json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    found += " " + text;
  }
  fail(concat("must be ", wanted, ", found ", found));
}

M2LM_IMPL void ConfigValue::out_of_range(std::int64_t value) const { fail(concat("the number ", value, " is out of range here")); }

M2LM_IMPL bool ConfigValue::contains(std::string_view key) const {
  const detail::Json& json = detail::json_of(value_);
  return json.is_object() && json.find(std::string(key)) != json.end();
}

M2LM_IMPL bool ConfigValue::has_value(std::string_view key) const {
  const detail::Json& json = detail::json_of(value_);
  if (!json.is_object()) return false;
  const auto found = json.find(std::string(key));
  return found != json.end() && !found->is_null();
}

M2LM_IMPL ConfigValue ConfigValue::operator[](std::string_view key) const {
  const detail::Json& json = detail::json_of(value_);
  if (!json.is_object()) wrong_type(concat("an object with the key \"", key, "\""));
  const auto found = json.find(std::string(key));
  ConfigValue out;
  out.document_ = document_;
  out.where_ = where_.empty() ? std::string(key) : concat(where_, ".", key);
  if (found == json.end()) out.fail("is missing");
  out.value_ = &*found;
  return out;
}

M2LM_IMPL std::vector<std::string> ConfigValue::keys() const {
  if (!is_object()) wrong_type("an object");
  std::vector<std::string> out;
  for (const auto& item : detail::json_of(value_).items()) out.push_back(item.key());
  return out;
}

M2LM_IMPL std::string ConfigValue::text() const {
  return value_ == nullptr ? std::string("null") : detail::json_of(value_).dump(2, ' ', false, detail::Json::error_handler_t::replace);
}

M2LM_IMPL std::size_t ConfigValue::size() const {
  if (!is_array()) wrong_type("an array");
  return detail::json_of(value_).size();
}

M2LM_IMPL ConfigValue ConfigValue::at(std::size_t i) const {
  const std::size_t n = size();
  if (i >= n) fail(concat("element ", i, " is missing; the array has ", n));
  ConfigValue out;
  out.document_ = document_;
  out.where_ = where_.empty() ? std::to_string(i) : concat(where_, ".", i);
  out.value_ = &detail::json_of(value_)[i];
  return out;
}

M2LM_IMPL bool ConfigValue::as_bool() const {
  if (!is_bool()) wrong_type("true or false");
  return detail::json_of(value_).get<bool>();
}

M2LM_IMPL std::int64_t ConfigValue::as_integer() const {
  if (!is_integer()) wrong_type("an integer");
  const detail::Json& json = detail::json_of(value_);
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
    fail(concat("the number ", json.get<std::uint64_t>(), " is out of range here"));
  return json.get<std::int64_t>();
}

M2LM_IMPL double ConfigValue::as_double() const {
  if (!is_number()) wrong_type("a number");
  return detail::json_of(value_).get<double>();
}

M2LM_IMPL std::string ConfigValue::as_string() const {
  if (!is_string()) wrong_type("a string");
  return detail::json_of(value_).get<std::string>();
}

M2LM_IMPL std::vector<ConfigValue> parse_json_lines(std::string_view path, const JsonLimits& limits) {
  const std::string text = read_file(path, limits.max_bytes);
  std::vector<ConfigValue> out;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t newline = text.find('\n', begin);
    const std::size_t end = newline == std::string::npos ? text.size() : newline;
    std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    auto document = std::make_shared<ConfigValue::Document>();
    document->file = concat(path, " line ", number);
    const std::string problem = detail::try_parse_json(line, false, limits, *document);
    if (!problem.empty()) throw InputError(concat(document->file, ": is not valid JSON: ", problem));
    ConfigValue value;
    value.value_ = &document->root;
    value.document_ = std::move(document);
    out.push_back(std::move(value));
  }
  return out;
}

M2LM_IMPL std::string json_quote(std::string_view text) {
  return detail::Json(std::string(text)).dump(-1, ' ', false, detail::Json::error_handler_t::replace);
}

M2LM_IMPL JsonWriter& JsonWriter::raw(std::string_view text) {
  if (comma_) text_ += ", ";
  text_ += text;
  comma_ = true;
  return *this;
}

M2LM_IMPL JsonWriter& JsonWriter::open(char c) {
  raw(std::string_view(&c, 1));
  comma_ = false;
  return *this;
}

M2LM_IMPL JsonWriter& JsonWriter::close(char c) {
  text_ += c;
  comma_ = true;
  return *this;
}

M2LM_IMPL JsonWriter& JsonWriter::key(std::string_view name) {
  raw(json_quote(name));
  text_ += ": ";
  comma_ = false;
  return *this;
}

M2LM_IMPL JsonWriter& JsonWriter::value(std::string_view text) { return raw(json_quote(text)); }
M2LM_IMPL JsonWriter& JsonWriter::value(bool b) { return raw(b ? "true" : "false"); }
M2LM_IMPL JsonWriter& JsonWriter::value(double number) {
  if (!std::isfinite(number)) return null();
  char digits[40];
  const auto result = std::to_chars(digits, digits + sizeof(digits), number);
  return raw(std::string_view(digits, static_cast<std::size_t>(result.ptr - digits)));
}

}  // namespace m2lm
