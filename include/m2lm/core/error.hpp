// The exceptions of the library and the string builder of their messages.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <concepts>
#include <cstdint>
#include <exception>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace m2lm::inline M2LM_ABI {

/// Base of everything the library throws on purpose. The message names the file, tensor or option and says what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Two shapes, dtypes or sizes that must agree do not.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A file of a checkpoint is missing, damaged or contradicts another.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// A prompt, image or other input given by the user cannot be used.
class InputError : public Error {
 public:
  using Error::Error;
};

/// An option has a value outside its range or names something unknown.
class OptionError : public Error {
 public:
  using Error::Error;
};

/// The work would need more memory, or a longer context, than there is.
class CapacityError : public Error {
 public:
  using Error::Error;
};

/// A device is missing, cannot be used, or has failed: names the call or kernel and what its runtime said.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A computation gave NaN or infinity where a number is needed: damaged weights, or a precision that is too low for them.
class NumericError : public Error {
 public:
  using Error::Error;
};

namespace detail {

inline void append_piece(std::string& out, std::string_view s) { out += s; }
inline void append_piece(std::string& out, const char* s) { out += s; }
inline void append_piece(std::string& out, char c) { out += c; }
inline void append_piece(std::string& out, bool b) { out += b ? "true" : "false"; }
template <class T>
  requires(std::is_arithmetic_v<T>)
void append_piece(std::string& out, T value) {
  out += std::to_string(value);
}
/// Shapes and the like: written out only when the message is.
template <class T>
  requires requires(const T& value) { { value.string() } -> std::convertible_to<std::string>; }
void append_piece(std::string& out, const T& value) {
  out += value.string();
}

}  // namespace detail

/// Joins strings, numbers and what has a `string()`: concat("rows ", 3, " of ", 4).
template <class... Piece>
std::string concat(const Piece&... piece) {
  std::string out;
  (detail::append_piece(out, piece), ...);
  return out;
}

namespace detail {

/// Made before any memory is short: std::bad_alloc becomes this when not even a message can be allocated.
inline const std::exception_ptr out_of_memory = std::make_exception_ptr(CapacityError("m2lm: there is not enough memory"));

/// What public functions make of std::bad_alloc: a CapacityError that says what was being done. Call it in a handler.
[[noreturn]] inline void throw_out_of_memory(std::string_view doing) {
  try {
    throw CapacityError(concat("m2lm: there is not enough memory for ", doing, "; free some, or choose a smaller precision or context"));
  } catch (const std::bad_alloc&) {
    std::rethrow_exception(out_of_memory);
  }
}

}  // namespace detail

/// "[2, 3, 4]".
inline std::string shape_string(std::span<const std::int64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

/// Throws E with the joined pieces unless `condition` holds.
template <class E = ShapeError, class... Piece>
void require(bool condition, const Piece&... piece) {
  if (!condition) [[unlikely]]
    throw E(concat(piece...));
}

}  // namespace m2lm
