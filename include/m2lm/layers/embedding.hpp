// Embedding: rows of a table by id, read as the checkpoint stores them.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/gradients.hpp>
#include <m2lm/ops/gather.hpp>

#include <span>

namespace m2lm {

/// The table stays in the checkpoint's own bytes: a lookup touches only the rows it needs.
template <class B>
struct Embedding {
  using S = ScalarOf<B>;
  Parameter weight;

  Embedding() = default;
  Embedding(std::int64_t rows, std::int64_t width) : weight(Shape{rows, width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
  }

  /// y[i] = weight[ids[i]]. throws InputError for an id outside the table.
  void forward(Context<B>& ctx, std::span<const std::int32_t> ids, Matrix<S> y) const { ops::gather_rows(ctx, weight.value, ids, y); }
  /// Adds dy [ids, width] to the gradient of the rows that were looked up, if the table is trained.
  void backward(Context<B>& ctx, std::span<const std::int32_t> ids, Matrix<const S> dy, Gradients<S>& gradients) const {
    if (Tensor<S>* dw = gradients.find(weight)) ops::scatter_add_rows(ctx, dy, ids, dw->template view<2>());
  }
};

}  // namespace m2lm
