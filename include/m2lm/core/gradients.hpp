// Gradients: one tensor for each trained parameter of a model, kept outside the model.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/fields.hpp>

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What backward passes add to. A parameter that was not added here is frozen: `find` is null, and its layer computes nothing
/// for it. S is the scalar of a backend's activations. The parameters are known by address: the model must stay where it is.
template <class S>
class Gradients {
 public:
  /// A trained parameter: its full name, its address and its gradient.
  struct Entry {
    std::string name;
    const Parameter* parameter = nullptr;
    Tensor<S> value;  ///< of the parameter's shape
  };

 private:
  std::vector<Entry> entries_;  // in the order of the `fields` walk
  std::map<const Parameter*, std::size_t> by_address_;

 public:
  Gradients() = default;
  /// For every parameter below `root`.
  template <ParameterStruct P>
  explicit Gradients(const P& root, std::string prefix = {}) {
    add(root, [](std::string_view) { return true; }, std::move(prefix));
  }

  /// Trains one more parameter: its gradient starts as zero. Adding it twice changes nothing.
  void add(std::string name, const Parameter& parameter) {
    if (!by_address_.try_emplace(&parameter, entries_.size()).second) return;
    entries_.push_back({std::move(name), &parameter, Tensor<S>(parameter.shape)});
  }
  /// … and all below `root` whose full name `wanted(name)` accepts.
  template <ParameterStruct P, class Wanted>
  void add(const P& root, Wanted&& wanted, std::string prefix = {}) {
    for_each_parameter(
        [&](std::string_view name, const Parameter& p) {
          if (wanted(name)) add(std::string(name), p);
        },
        root, std::move(prefix));
  }

  /// The gradient of a trained parameter, null for a frozen one.
  Tensor<S>* find(const Parameter& parameter) {
    const auto at = by_address_.find(&parameter);
    return at != by_address_.end() ? &entries_[at->second].value : nullptr;
  }
  /// Whether the parameter was added.
  bool trains(const Parameter& parameter) const { return by_address_.count(&parameter) != 0; }
  /// Whether any parameter below `root` is trained.
  template <ParameterStruct P>
  bool trains(const P& root) const {
    bool any = false;
    for_each_parameter([&](std::string_view, const Parameter& p) { any = any || trains(p); }, root);
    return any;
  }

  /// In the order in which they were added: that of the walk over `fields`.
  std::vector<Entry>& entries() { return entries_; }
  /// The same, read-only.
  const std::vector<Entry>& entries() const { return entries_; }
  /// True while nothing is trained.
  bool empty() const { return entries_.empty(); }

  /// Sets all to zero.
  void clear() {
    for (Entry& e : entries_)
      for (S& x : e.value.span()) x = S(0);
  }
  /// Euclidean norm over all of them, summed in f64.
  double norm() const {
    double squares = 0;
    for (const Entry& e : entries_)
      for (const S& x : e.value.span()) squares += static_cast<double>(x) * static_cast<double>(x);
    return std::sqrt(squares);
  }
};

/// Index of the first of `layers` below which nothing is trained: a backward pass that needs no gradient of its input ends there.
template <class Layers, class S>
std::size_t first_trained(const Layers& layers, const Gradients<S>& gradients) {
  std::size_t i = 0;
  while (i < layers.size() && !gradients.trains(layers[i])) ++i;
  return i;
}

/// A gradient as the matrix that its layer works with: [rows, product of the other dimensions]; a vector is one column.
template <class S>
Matrix<S> gradient_matrix(Tensor<S>& gradient) {
  const std::int64_t rows = gradient.shape()[0];
  return Matrix<S>(gradient.data(), {rows, rows == 0 ? 0 : gradient.elements() / rows});
}

}  // namespace m2lm
