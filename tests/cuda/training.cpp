// Gradients on the Cuda backend: the ops reach the kernels of backward.cuh with all that they were given. (backward.cpp has the numbers.)
#include "device_support.hpp"

#include <m2lm/backends/cuda/kernels/backward.cuh>
#include <m2lm/backends/cuda/training.hpp>

namespace {

using namespace m2lm_test;
using Backend = BasicCuda<Bf16>;
using Element = OnDevice<Bf16>;

/// A view of kernels as the ops see it.
template <class T, int Rank>
View<OnDevice<T>, Rank> opaque(View<T, Rank> view) {
  return {reinterpret_cast<OnDevice<T>*>(view.data()), view.extents(), view.strides()};
}
template <class T>
Vector<OnDevice<T>> opaque_row(const DeviceMatrix<T>& m) {
  return {reinterpret_cast<OnDevice<T>*>(m.view().data()), {m.view().extent(1)}};
}

struct Fixture {
  Backend backend;
  Arena arena{&backend.memory()}, tape{&backend.memory()};
  Context<Backend> ctx{backend, arena, nullptr, &tape};
  cuda::Device& device = backend.device();
  Random random{11};

  DeviceMatrix<Bf16> matrix(std::int64_t rows, std::int64_t cols, std::int64_t extra = 0) {
    return DeviceMatrix<Bf16>(device, rows, cols, random.elements<Bf16>(rows * cols), extra);
  }
  DeviceMatrix<float> angles(std::int64_t rows, std::int64_t cols) {
    return DeviceMatrix<float>(device, rows, cols, random.elements<float>(rows * cols));
  }
  DeviceMatrix<Bf16> copy(const DeviceMatrix<Bf16>& m) { return DeviceMatrix<Bf16>(device, m.view().extent(0), m.view().extent(1), m.read()); }
  std::byte* scratch(std::size_t bytes) { return arena.take<std::byte>(static_cast<std::int64_t>(bytes)); }
};

/// What an op and a kernel have made of the same: equal, and not what was there before.
void check_same(const DeviceMatrix<Bf16>& op, const DeviceMatrix<Bf16>& kernel, const DeviceMatrix<Bf16>& before) {
  CHECK(same_bits(op.read(), kernel.read()));
  CHECK(!same_bits(op.read(), before.read()));
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "linear layers") {
  const auto x = matrix(5, 24, 3), dy = matrix(5, 10, 1), w = matrix(10, 24), dw = matrix(10, 24), db = matrix(1, 10), dx = matrix(5, 24, 2);
  PackedMatrix packed;
  packed.format = DType::bf16;
  packed.rows = 10;
  packed.cols = 24;
  packed.data = std::shared_ptr<const std::byte>(std::shared_ptr<const void>(), reinterpret_cast<const std::byte*>(w.view().data()));
  for (const bool accumulate : {false, true}) {
    const auto by_op = copy(dx), by_kernel = copy(dx);
    ops::linear_input_gradient(ctx, Matrix<const Element>(opaque(dy.view())), packed, opaque(by_op.view()), accumulate);
    cuda::linear_input_gradient<Bf16>(device, dy.const_view(), packed, by_kernel.view(), accumulate, nullptr);
    check_same(by_op, by_kernel, dx);
  }
  const auto dw_op = copy(dw), dw_kernel = copy(dw), db_op = copy(db), db_kernel = copy(db);
  ops::linear_weight_gradient(ctx, Matrix<const Element>(opaque(x.view())), Matrix<const Element>(opaque(dy.view())), opaque(dw_op.view()),
                              opaque_row(db_op));
  cuda::linear_weight_gradient<Bf16>(device, x.const_view(), dy.const_view(), dw_kernel.view(), db_kernel.view().data());
  check_same(dw_op, dw_kernel, dw);
  check_same(db_op, db_kernel, db);
}

TEST_CASE_FIXTURE(Fixture, "activations and the rotation") {
  const auto dy = matrix(3, 16), z = matrix(3, 32), before = matrix(3, 32);
  const auto by_op = copy(before), by_kernel = copy(before);
  ops::activation_backward(ctx, Matrix<const Element>(opaque(dy.view())), Matrix<const Element>(opaque(z.view())), Activation::silu,
                           opaque(by_op.view()));
  cuda::activation_backward<Bf16>(device, dy.const_view(), z.const_view(), Activation::silu, by_kernel.view());
  check_same(by_op, by_kernel, before);

  const auto cos = angles(3, 8), sin = angles(3, 8);
  const auto rotated = copy(z), rotated_by_kernel = copy(z);
  ops::rope_backward(ctx, opaque(rotated.view()), 16, Matrix<const OnDevice<float>>(opaque(cos.view())),
                     Matrix<const OnDevice<float>>(opaque(sin.view())));
  cuda::rope_backward<Bf16>(device, rotated_by_kernel.view(), 16, cos.const_view(), sin.const_view());
  check_same(rotated, rotated_by_kernel, z);
}

TEST_CASE_FIXTURE(Fixture, "norms") {
  const auto x = matrix(4, 40), dy = matrix(4, 40), weight = matrix(1, 40), dx = matrix(4, 40), dweight = matrix(1, 40), dbias = matrix(1, 40);
  constexpr double eps = 0.25;
  for (const bool centred : {false, true}) {
    const auto dx_op = copy(dx), dx_kernel = copy(dx), dw_op = copy(dweight), dw_kernel = copy(dweight), db_op = copy(dbias), db_kernel = copy(dbias);
    const Matrix<const Element> dys = opaque(dy.view()), xs = opaque(x.view());
    const Vector<const Element> weights = opaque_row(weight);
    std::byte* statistics = scratch(cuda::norm_backward_scratch(4));
    const Bf16* w = weight.view().data();
    if (centred) {
      ops::layer_norm_backward(ctx, dys, xs, weights, eps, opaque(dx_op.view()), true, opaque_row(dw_op), opaque_row(db_op));
      cuda::layer_norm_backward<Bf16>(device, dy.const_view(), x.const_view(), w, 0.25F, dx_kernel.view(), true, dw_kernel.view().data(),
                                      db_kernel.view().data(), statistics);
      check_same(db_op, db_kernel, dbias);
    } else {
      ops::rms_norm_backward(ctx, dys, xs, weights, eps, opaque(dx_op.view()), true, opaque_row(dw_op));
      cuda::rms_norm_backward<Bf16>(device, dy.const_view(), x.const_view(), w, 0.25F, dx_kernel.view(), true, dw_kernel.view().data(), statistics);
    }
    check_same(dx_op, dx_kernel, dx);
    check_same(dw_op, dw_kernel, dweight);
  }
}

TEST_CASE_FIXTURE(Fixture, "attention") {
  const auto q = matrix(9, 32), k = matrix(9, 16), v = matrix(9, 16), y = matrix(9, 32), dy = matrix(9, 32), wide = matrix(9, 32),
             narrow = matrix(9, 16);
  const auto dq = copy(wide), dk = copy(narrow), dv = copy(narrow), dq_kernel = copy(wide), dk_kernel = copy(narrow), dv_kernel = copy(narrow);
  const AttentionMask mask{.causal = true, .window = 4};
  const auto in = [](const DeviceMatrix<Bf16>& m) { return Matrix<const Element>(opaque(m.view())); };
  ops::attention_backward(ctx, in(q), in(k), in(v), in(y), in(dy), 8, mask, 0.5, opaque(dq.view()), opaque(dk.view()), opaque(dv.view()));
  cuda::attention_backward<Bf16>(device, q.const_view(), k.const_view(), v.const_view(), y.const_view(), dy.const_view(), 8, mask, 0.5F,
                                 dq_kernel.view(), dk_kernel.view(), dv_kernel.view(), scratch(cuda::attention_backward_scratch(9, 4)));
  check_same(dq, dq_kernel, wide);
  check_same(dk, dk_kernel, narrow);
  check_same(dv, dv_kernel, narrow);
}

TEST_CASE_FIXTURE(Fixture, "rows of a table, and the loss, from ids of the host") {
  const std::vector<std::int32_t> ids{3, 0, 3, 4};
  const DeviceArray<std::int32_t> ids_there(device, ids);
  const auto rows = matrix(4, 20), table = matrix(5, 20);
  const auto by_op = copy(table), by_kernel = copy(table);
  ops::scatter_add_rows(ctx, Matrix<const Element>(opaque(rows.view())), ids, opaque(by_op.view()));
  cuda::scatter_add_rows<Bf16>(device, rows.const_view(), ids_there.data(), by_kernel.view());
  check_same(by_op, by_kernel, table);

  const auto d = copy(rows), d_kernel = copy(rows);
  const DeviceArray<float> losses(device, 4), losses_kernel(device, 4);
  ops::cross_entropy(ctx, Matrix<const Element>(opaque(rows.view())), ids, 0.5,
                     Vector<OnDevice<float>>(reinterpret_cast<OnDevice<float>*>(losses.data()), {4}), opaque(d.view()));
  cuda::cross_entropy<Bf16>(device, rows.const_view(), ids_there.data(), 0.5F, losses_kernel.data(), d_kernel.view());
  check_same(d, d_kernel, rows);
  CHECK(same_bits(losses.read(), losses_kernel.read()));
  CHECK(losses.read()[0] > 0);
}
