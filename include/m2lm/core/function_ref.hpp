// FunctionRef: a callback parameter that owns nothing and allocates nothing.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <memory>
#include <type_traits>
#include <utility>

namespace m2lm::inline M2LM_ABI {

template <class Signature>
class FunctionRef;

/// Non-owning reference to a callable. It lives as long as the full expression or scope of the callable it was made from.
template <class R, class... A>
class FunctionRef<R(A...)> {
  void* object_ = nullptr;
  R (*call_)(void*, A...) = nullptr;

 public:
  constexpr FunctionRef() = default;

  /// Refers to a callable, which must outlive every call; a lambda written into a call does.
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef> && !std::is_function_v<std::remove_reference_t<F>> && std::is_invocable_r_v<R, F&, A...>)
  constexpr FunctionRef(F&& f)  // NOLINT: implicit on purpose, so that a lambda can be passed
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, A... arguments) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<A>(arguments)...);
        }) {}

  /// Refers to a function.
  template <class F>
    requires(std::is_function_v<F> && std::is_invocable_r_v<R, F&, A...>)
  FunctionRef(F& f)  // NOLINT: implicit on purpose
      : object_(reinterpret_cast<void*>(&f)), call_([](void* object, A... arguments) -> R {
          return reinterpret_cast<F*>(object)(std::forward<A>(arguments)...);
        }) {}

  /// False of a default-constructed one, which must not be called.
  explicit constexpr operator bool() const { return call_ != nullptr; }
  /// Calls what it refers to. throws what that throws.
  constexpr R operator()(A... arguments) const { return call_(object_, std::forward<A>(arguments)...); }
};

}  // namespace m2lm
