// Embedding: rows of a table by id, read as the checkpoint stores them.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/fields.hpp>
#include <m2lm/ops/gather.hpp>

#include <span>

namespace m2lm {

/// The table stays in the checkpoint's own bytes: a lookup touches only the rows it needs.
template <class B>
struct Embedding {
  Parameter weight;

  Embedding() = default;
  Embedding(std::int64_t rows, std::int64_t width) : weight(Shape{rows, width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
  }

  /// y[i] = weight[ids[i]]. throws InputError for an id outside the table.
  void forward(Context<B>& ctx, std::span<const std::int32_t> ids, Matrix<ScalarOf<B>> y) const { ops::gather_rows(ctx, weight.value, ids, y); }
};

}  // namespace m2lm
