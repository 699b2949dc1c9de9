// Gathering rows of a table and adding to them, and cutting a picture into patches.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

#include <span>

namespace m2lm::inline M2LM_ABI::ops {

struct GatherRows;
struct Patchify;
struct AddRows;
struct ScatterAddRows;

/// throws InputError for an id outside a table of `rows` rows.
inline void require_ids(std::span<const std::int32_t> ids, std::int64_t rows) {
  for (const std::int32_t id : ids) require<InputError>(id >= 0 && id < rows, "m2lm: token id ", id, " is outside the embedding table of ", rows, " rows");
}

/// y[i] = table[ids[i]]. requires table [rows, n] of a floating dtype, y [ids, n]. throws InputError for an id outside the table.
template <class B>
void gather_rows(Context<B>& ctx, const AnyTensor& table, std::span<const std::int32_t> ids, Matrix<ScalarOf<B>> y) {
  require(table.shape().rank() == 2 && y.extent(0) == static_cast<std::int64_t>(ids.size()) && y.extent(1) == table.shape()[1],
          "m2lm::ops::gather_rows: table ", table.shape(), ", ", ids.size(), " ids, y ", y.shape());
  require_ids(ids, table.shape()[0]);
  Impl<GatherRows, B>::run(ctx, table, ids, y);
}

/// The same on a device, from a table and ids that lie there. An id outside the table gives a row of NaN.
template <class B>
  requires(!HostBackend<B>)
void gather_rows(Context<B>& ctx, Matrix<const ScalarOf<B>> table, Vector<const OnDevice<std::int32_t>> ids, Matrix<ScalarOf<B>> y) {
  require(y.extent(0) == ids.extent(0) && y.extent(1) == table.extent(1), "m2lm::ops::gather_rows: table ", table.shape(), ", ", ids.extent(0), " ids, y ",
          y.shape());
  if (y.elements() != 0) Impl<GatherRows, B>::run(ctx, table, ids, y);
}

/// Cuts pixels [channels, height, width] into patches: y[row·columns + column] = the patch, channel-major (as the weight of a
/// convolution with kernel = stride = patch is laid out). As with the convolution, rows and columns that do not fill a patch are
/// left out. requires y [⌊height/patch⌋·⌊width/patch⌋, channels·patch·patch].
template <class B>
void patchify(Context<B>& ctx, View<const ScalarOf<B>, 3> pixels, std::int64_t patch, Matrix<ScalarOf<B>> y) {
  require(patch > 0, "m2lm::ops::patchify: patch = ", patch);
  const std::int64_t rows = pixels.extent(1) / patch, columns = pixels.extent(2) / patch;
  require(y.extent(0) == rows * columns && y.extent(1) == pixels.extent(0) * patch * patch, "m2lm::ops::patchify: y is ", y.shape());
  Impl<Patchify, B>::run(ctx, pixels, patch, y);
}

/// x += addend, element by element. requires equal shapes.
template <class B>
void add_rows(Context<B>& ctx, Matrix<ScalarOf<B>> x, Matrix<const ScalarOf<B>> addend) {
  require(x.shape() == addend.shape(), "m2lm::ops::add_rows: x is ", x.shape(), ", the addend ", addend.shape());
  Impl<AddRows, B>::run(ctx, x, addend);
}

/// table[ids[i]] += rows[i], in the order of i: the gradient of gather_rows. requires rows [ids, n], table [rows, n].
/// throws InputError for an id outside the table.
template <class B>
void scatter_add_rows(Context<B>& ctx, Matrix<const ScalarOf<B>> rows, std::span<const std::int32_t> ids, Matrix<ScalarOf<B>> table) {
  require(rows.extent(0) == static_cast<std::int64_t>(ids.size()) && rows.extent(1) == table.extent(1), "m2lm::ops::scatter_add_rows: table ",
          table.shape(), ", ", ids.size(), " ids, rows ", rows.shape());
  require_ids(ids, table.extent(0));
  Impl<ScatterAddRows, B>::run(ctx, rows, ids, table);
}

}  // namespace m2lm::ops
