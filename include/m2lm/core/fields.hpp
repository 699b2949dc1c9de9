// The one list of parameters per struct, and the walk over it that load, save, count and print share.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/tensor.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// An update of a weight [outputs, inputs] that is kept apart from it: weight + scale·b·a. source: LoRA (arXiv 2106.09685).
struct LowRankUpdate {
  AnyTensor a;  ///< [rank, inputs]
  AnyTensor b;  ///< [outputs, rank]
  double scale = 1.0;
};

/// A named tensor of a model: the shape its config asks for, and the value a checkpoint gave.
struct Parameter {
  Shape shape;
  AnyTensor value;
  std::shared_ptr<const LowRankUpdate> update;  ///< null, except of a matrix with an adapter beside it

  Parameter() = default;
  /// Without a value: a checkpoint's tensor of this shape is expected.
  explicit Parameter(Shape expected) : shape(expected) {}
  /// Whether a value was loaded or set.
  bool present() const { return value.has_value(); }
};

namespace detail {

struct FieldsProbe {
  template <class... A>
  constexpr void operator()(std::string_view, A&...) const {}
};
template <class T>
inline constexpr bool is_vector = false;
template <class T>
inline constexpr bool is_vector<std::vector<T>> = true;

}  // namespace detail

/// A struct that lists its parameters once, named as in the Hugging Face checkpoint:
///   template <class V, class Self> static void fields(V&& visit, Self& self) { visit("q_proj", self.q_proj); … }
/// A listed member is a Parameter, another such struct, or a std::vector of such structs ("layers.0", "layers.1", …). An empty
/// name adds no path component. What a config switches off (a bias, a tied head) is simply not listed.
template <class P>
concept ParameterStruct = requires(std::remove_const_t<P>& p, detail::FieldsProbe visit) { std::remove_const_t<P>::fields(visit, p); };

namespace detail {

template <class F>
struct FieldsWalker {
  F& f;
  std::string path;

  template <class Member>
  void operator()(std::string_view name, Member& member) const {
    std::string child = path;
    if (!child.empty() && !name.empty()) child += '.';
    child += name;
    using Plain = std::remove_const_t<Member>;
    if constexpr (is_vector<Plain>) {
      for (std::size_t i = 0; i < member.size(); ++i) (FieldsWalker{f, child})(std::to_string(i), member[i]);
    } else if constexpr (std::is_same_v<Plain, Parameter>) {
      f(std::string_view(child), member);
    } else {
      static_assert(ParameterStruct<Plain>, "m2lm: a listed field is a Parameter, a struct with `fields`, or a vector of such structs");
      Plain::fields(FieldsWalker{f, child}, member);
    }
  }
};

}  // namespace detail

/// Calls f(name, Parameter&) for every parameter below `root`, in the order of the lists. `prefix` starts each name.
template <class F, ParameterStruct P>
void for_each_parameter(F&& f, P& root, std::string prefix = {}) {
  std::remove_const_t<P>::fields(detail::FieldsWalker<std::remove_reference_t<F>>{f, std::move(prefix)}, root);
}

}  // namespace m2lm
