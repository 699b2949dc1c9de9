// Embedding: rows of a table by id, read as the checkpoint stores them.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/gradients.hpp>
#include <m2lm/ops/gather.hpp>
#include <m2lm/ops/transfer.hpp>

#include <span>

namespace m2lm::inline M2LM_ABI {

/// On the host the table stays in the checkpoint's own bytes: a lookup touches only the rows it needs. A device gets a copy.
template <class B>
class Embedding {
  using S = ScalarOf<B>;
  Tensor<S> device_table_;

 public:
  Parameter weight;

  Embedding() = default;
  /// A table [rows, width] without values.
  Embedding(std::int64_t rows, std::int64_t width) : weight(Shape{rows, width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
  }

  void prepare([[maybe_unused]] Context<B>& ctx) {
    if constexpr (!HostBackend<B>) device_table_ = ops::upload_tensor(ctx, weight.value);
  }

  /// The rows of ids that a device chose. requires prepare.
  void forward(Context<B>& ctx, Vector<const OnDevice<std::int32_t>> ids, Matrix<S> y) const
    requires(!HostBackend<B>)
  {
    ops::gather_rows(ctx, device_table_.template view<2>(), ids, y);
  }
  /// y[i] = weight[ids[i]]. throws InputError for an id outside the table.
  void forward(Context<B>& ctx, std::span<const std::int32_t> ids, Matrix<S> y) const {
    if constexpr (HostBackend<B>) {
      ops::gather_rows(ctx, weight.value, ids, y);
    } else {
      const Arena::Scope scope(ctx.arena);
      ops::require_ids(ids, weight.shape[0]);
      forward(ctx, ops::upload_ids(ctx, ids), y);
    }
  }
  /// Adds dy [ids, width] to the gradient of the rows that were looked up, if the table is trained.
  void backward(Context<B>& ctx, std::span<const std::int32_t> ids, Matrix<const S> dy, Gradients<S>& gradients) const {
    if (Tensor<S>* dw = gradients.find(weight)) ops::scatter_add_rows(ctx, dy, ids, dw->template view<2>());
  }
};

}  // namespace m2lm
