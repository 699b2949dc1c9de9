// Definitions of io/config.hpp, and the JSON reader of the io floor.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/interop/json.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file_impl.hpp>

#include <charconv>
#include <cmath>
#include <limits>
#include <set>

namespace m2lm {

namespace detail {

using Json = nlohmann::json;

inline constexpr int max_json_depth = 64;
inline constexpr std::size_t max_json_bytes = std::size_t{1} << 28;

/// Reads JSON into `out`; returns what is wrong with it, or an empty string. Without `unique_keys` the last of equal keys counts.
M2LM_IMPL std::string try_parse_json(std::string_view text, bool unique_keys, Json& out) {
  struct Refused {
    std::string why;
  };
  int depth = 0;
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        if (++depth > max_json_depth) throw Refused{concat("nested deeper than ", max_json_depth, " levels")};
        if (unique_keys) keys.emplace_back();
        break;
      case Json::parse_event_t::object_end:
      case Json::parse_event_t::array_end:
        --depth;
        if (unique_keys) keys.pop_back();
        break;
      case Json::parse_event_t::key:
        if (unique_keys && !keys.back().insert(parsed.get_ref<const std::string&>()).second)
          throw Refused{concat("the key \"", parsed.get_ref<const std::string&>(), "\" is there twice")};
        break;
      case Json::parse_event_t::value: break;
    }
    return true;
  };
  try {
    out = Json::parse(text.begin(), text.end(), check);
    return {};
  } catch (const Refused& refused) {
    return refused.why;
  } catch (const Json::exception& error) {
    const std::string_view what = error.what();
    const std::size_t tag = what.find("] ");  // "[json.exception.parse_error.101] parse error at line 1, …"
    return std::string(tag == std::string_view::npos ? what : what.substr(tag + 2));
  }
}

}  // namespace detail

struct ConfigValue::Document {
  detail::Json root;
  std::string file;
};

namespace detail {

M2LM_IMPL const Json& json_of(const void* value) {
  static const Json null;
  return value ? *static_cast<const Json*>(value) : null;
}

}  // namespace detail

M2LM_IMPL ConfigValue ConfigValue::parse_text(std::string_view text, std::string_view name) {
  auto document = std::make_shared<Document>();
  document->file = std::string(name);
  const std::string problem = detail::try_parse_json(text, false, document->root);
  if (!problem.empty()) throw CheckpointError(concat(name, ": is not valid JSON: ", problem));
  ConfigValue out;
  out.value_ = &document->root;
  out.document_ = std::move(document);
  return out;
}

M2LM_IMPL ConfigValue ConfigValue::parse_file(std::string_view path) {
  std::string text;
  const std::string problem = detail::try_read_file(path, detail::max_json_bytes, text);
  if (!problem.empty()) throw CheckpointError(problem);
  return parse_text(text, path);
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

M2LM_IMPL std::vector<ConfigValue> parse_json_lines(std::string_view path) {
  const std::string text = read_file(path, detail::max_json_bytes);
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
    const std::string problem = detail::try_parse_json(line, false, document->root);
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
