// Views as Eigen maps and Eigen matrices as views, without copies. Not part of m2lm.hpp: include it where Eigen is used.
// Floor: interop. May include: core. Owns: Eigen.
#pragma once

#include <m2lm/core/view.hpp>

#include <Eigen/Core>

namespace m2lm {

template <class T>
using EigenMap = Eigen::Map<std::conditional_t<std::is_const_v<T>, const Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>,
                                               Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>,
                            Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

/// The view's elements as an Eigen matrix of the same shape; writes go to the view.
template <class T>
EigenMap<T> as_eigen(Matrix<T> view) {
  return EigenMap<T>(view.data(), view.extent(0), view.extent(1), Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(view.stride(0), view.stride(1)));
}

/// A dense Eigen matrix (or block, or map) of any storage order as a view; it must outlive the view.
template <class Derived>
auto as_view(Eigen::DenseBase<Derived>& matrix) {
  auto& m = matrix.derived();
  using T = std::remove_reference_t<decltype(m(0, 0))>;
  const Eigen::Index row = Derived::IsRowMajor ? m.outerStride() : m.innerStride();
  const Eigen::Index column = Derived::IsRowMajor ? m.innerStride() : m.outerStride();
  return Matrix<T>(m.rows() * m.cols() == 0 ? nullptr : &m(0, 0), {m.rows(), m.cols()}, {row, column});
}

}  // namespace m2lm
