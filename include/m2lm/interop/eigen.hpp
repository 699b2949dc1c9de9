// Views as Eigen maps and Eigen matrices as views, without copies. Not part of m2lm.hpp: include it where Eigen is used.
// Floor: interop. May include: core. Owns: Eigen.
#pragma once

#include <m2lm/core/view.hpp>

#include <Eigen/Core>

#include <type_traits>

namespace m2lm::inline M2LM_ABI {

/// A row-major Eigen map of any strides; of const elements if T is const.
template <class T>
using EigenMap = Eigen::Map<std::conditional_t<std::is_const_v<T>, const Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>,
                                               Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>,
                            Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

/// The view's elements as an Eigen matrix of the same shape; writes go to the view.
template <class T>
EigenMap<T> as_eigen(Matrix<T> view) {
  return EigenMap<T>(view.data(), view.extent(0), view.extent(1), Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(view.stride(0), view.stride(1)));
}

/// A column vector of the view's elements.
template <class T>
auto as_eigen(Vector<T> view) {
  using Column = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, 1>;
  return Eigen::Map<std::conditional_t<std::is_const_v<T>, const Column, Column>, Eigen::Unaligned, Eigen::InnerStride<>>(
      view.data(), view.extent(0), Eigen::InnerStride<>(view.stride(0)));
}

namespace detail {

template <class Dense>
auto view_of_eigen(Dense& m) {
  using Derived = std::remove_const_t<Dense>;
  using T = std::remove_reference_t<decltype(m(0, 0))>;
  const Eigen::Index row = Derived::IsRowMajor ? m.outerStride() : m.innerStride();
  const Eigen::Index column = Derived::IsRowMajor ? m.innerStride() : m.outerStride();
  return Matrix<T>(m.rows() * m.cols() == 0 ? nullptr : &m(0, 0), {m.rows(), m.cols()}, {row, column});
}

}  // namespace detail

/// A dense Eigen matrix, vector, block or map of any storage order as a view [rows, columns]; its elements must outlive the view.
template <class Derived>
auto as_view(Eigen::DenseBase<Derived>& matrix) {
  return detail::view_of_eigen(matrix.derived());
}
/// The same, read-only. A matrix that would be gone at the end of the line is refused; blocks and maps of one that stays are not.
template <class Derived>
auto as_view(const Eigen::DenseBase<Derived>& matrix) {
  return detail::view_of_eigen(matrix.derived());
}
template <class Derived>
void as_view(const Eigen::PlainObjectBase<Derived>&& matrix) = delete;

}  // namespace m2lm
