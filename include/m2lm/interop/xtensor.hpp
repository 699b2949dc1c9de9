// The one place that includes xtensor: views and tensors as xtensor arrays and the other way round, without copies. Not part of m2lm.hpp:
// include it, or <m2lm/xtensor.hpp> for pictures too, where xtensor is used (the CMake target m2lm::xtensor).
// Floor: interop. May include: core. Owns: xtensor.
#pragma once

#include <m2lm/core/tensor.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

// xtensor 0.26 moved its headers into directories.
#if __has_include(<xtensor/containers/xarray.hpp>)
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/containers/xarray.hpp>
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/core/xnoalias.hpp>
#include <xtensor/views/xstrided_view.hpp>
#elif __has_include(<xtensor/xarray.hpp>)
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xnoalias.hpp>
#include <xtensor/xstrided_view.hpp>
#include <xtensor/xtensor.hpp>
#else
#error "m2lm/interop/xtensor.hpp needs xtensor 0.24 or newer: Debian's libxtensor-dev, or find_package(m2lm COMPONENTS xtensor)"
#endif

namespace m2lm::inline M2LM_ABI {

/// Whatever xtensor can evaluate: containers, views, and expressions that nobody has computed yet.
template <class E>
concept XtensorExpression = std::derived_from<std::remove_cvref_t<E>, xt::xexpression<std::remove_cvref_t<E>>>;

namespace detail {

/// An expression whose elements lie in memory, with strides: a container, an adaptor, or a view of one.
template <class E>
concept XtensorMemory = XtensorExpression<E> && requires(E& e) {
  { e.data() } -> std::convertible_to<const typename std::remove_cvref_t<E>::value_type*>;
  e.data_offset();
  e.strides();
};

/// Containers that own row-major elements.
template <class E>
inline constexpr bool owns_elements = false;
template <class EC, class SC, class Tag>
inline constexpr bool owns_elements<xt::xarray_container<EC, xt::layout_type::row_major, SC, Tag>> = true;
template <class EC, std::size_t N, class Tag>
inline constexpr bool owns_elements<xt::xtensor_container<EC, N, xt::layout_type::row_major, Tag>> = true;

template <class E>
Shape shape_of_expression(const E& e) {
  std::array<std::int64_t, max_rank> extents{};
  require(e.dimension() <= extents.size(), "m2lm: an xtensor expression of ", e.dimension(), " dimensions; a tensor has at most ", max_rank);
  for (std::size_t i = 0; i < e.dimension(); ++i) extents[i] = static_cast<std::int64_t>(e.shape()[i]);
  return Shape(std::span<const std::int64_t>(extents.data(), e.dimension()));
}

template <class T>
auto adapt_shape(T* data, const Shape& shape) {
  xt::dynamic_shape<std::size_t> extents;
  for (const std::int64_t extent : shape.extents()) extents.push_back(static_cast<std::size_t>(extent));
  return xt::adapt<xt::layout_type::row_major>(std::move(data), static_cast<std::size_t>(shape.elements()), xt::no_ownership(), extents);
}

}  // namespace detail

/// The view's elements as an xtensor array of the same shape and strides; writes go to the view.
template <HostElement T, int Rank>
auto as_xtensor(View<T, Rank> view) {
  xt::dynamic_shape<std::size_t> extents;
  xt::dynamic_shape<std::ptrdiff_t> strides;
  std::int64_t last = view.elements() == 0 ? -1 : 0;
  for (int i = 0; i < Rank; ++i) {
    extents.push_back(static_cast<std::size_t>(view.extent(i)));
    // xtensor's own convention, on which its broadcasting relies: nothing is stepped over in a dimension of one.
    strides.push_back(view.extent(i) == 1 ? 0 : static_cast<std::ptrdiff_t>(view.stride(i)));
    if (view.elements() != 0) last += (view.extent(i) - 1) * view.stride(i);
  }
  // A strided view of a flat array and no adaptor with strides: xtensor 0.24 checks those against their number of elements, and scales
  // them (`x *= 2`) along with what lies between their rows.
  return xt::strided_view(detail::adapt_shape(view.data(), Shape{last + 1}), std::move(extents), std::move(strides), 0, xt::layout_type::dynamic);
}

/// The tensor's elements as an xtensor array of run-time rank, which must not outlive the tensor.
template <HostElement T>
auto as_xarray(Tensor<T>& tensor) {
  return detail::adapt_shape(tensor.data(), tensor.shape());
}
/// The same, read-only.
template <HostElement T>
auto as_xarray(const Tensor<T>& tensor) {
  return detail::adapt_shape(tensor.data(), tensor.shape());
}
template <class T>
void as_xarray(Tensor<T>&&) = delete;

/// The elements of a tensor read from a file as a read-only xtensor array, which must not outlive the tensor's bytes.
/// throws ShapeError when they are no T, or do not lie on a border of T (those of a file may not: AnyTensor::to<T> copies them).
template <HostElement T>
auto as_xarray(const AnyTensor& tensor) {
  require(tensor.has_value() && tensor.dtype() == dtype_of<T> && dtype_of<T> != DType::native, "m2lm::as_xarray: the tensor holds ",
          dtype_name(tensor.dtype()), ", asked for is ", dtype_name(dtype_of<T>), ": AnyTensor::to converts");
  require(reinterpret_cast<std::uintptr_t>(tensor.data()) % alignof(T) == 0, "m2lm::as_xarray: the tensor's elements lie unaligned in their file: "
                                                                             "AnyTensor::to copies them");
  return detail::adapt_shape(reinterpret_cast<const T*>(tensor.data()), tensor.shape());
}

/// A container, adaptor or strided view of xtensor as a view of the same elements; it must outlive the view. Rank is that of the type;
/// of an expression with run-time rank it is given: as_view<2>(array). throws ShapeError if it differs.
template <int Rank = -1, class E>
  requires detail::XtensorMemory<E>
auto as_view(E& expression) {
  constexpr std::size_t fixed = xt::get_rank<std::remove_cv_t<E>>::value;
  static_assert(Rank != -1 || fixed <= static_cast<std::size_t>(max_rank), "m2lm::as_view: the expression's rank is known when the program runs: as_view<RANK>(expression)");
  constexpr int rank = Rank != -1 ? Rank : static_cast<int>(fixed);
  using T = std::remove_reference_t<decltype(*expression.data())>;
  require(expression.dimension() == static_cast<std::size_t>(rank), "m2lm::as_view: a view of rank ", rank, " of an xtensor expression of shape ",
          detail::shape_of_expression(expression).string());
  std::array<std::int64_t, static_cast<std::size_t>(rank)> extents{}, strides{};
  std::int64_t contiguous = 1;
  for (std::size_t i = static_cast<std::size_t>(rank); i-- > 0;) {
    extents[i] = static_cast<std::int64_t>(expression.shape()[i]);
    // xtensor's stride of a dimension of one is 0; ours is what a row-major tensor would have.
    strides[i] = extents[i] == 1 ? contiguous : static_cast<std::int64_t>(expression.strides()[i]);
    contiguous = extents[i] * strides[i];
  }
  return View<T, rank>(expression.data() + expression.data_offset(), extents, strides);
}

/// The values of any expression, computed now, as a tensor of its shape. throws ShapeError for more than 6 dimensions.
template <XtensorExpression E>
auto to_tensor(const E& expression) {
  Tensor<std::remove_cv_t<typename E::value_type>> out(detail::shape_of_expression(expression));
  auto elements = as_xarray(out);
  xt::noalias(elements) = expression;
  return out;
}

/// The same with a run-time dtype, as weights, embeddings and files have it. A row-major container that is given away (std::move) hands its
/// memory over; everything else is computed into memory of its own.
template <class E>
  requires XtensorExpression<E>
AnyTensor to_any_tensor(E&& expression) {
  using Container = std::remove_cvref_t<E>;
  using T = std::remove_cv_t<typename Container::value_type>;
  static_assert(dtype_of<T> != DType::native, "m2lm::to_any_tensor: the elements are double, float, std::int64_t, 32, 16, 8, std::uint8_t or bool: xt::cast converts");
  if constexpr (detail::owns_elements<Container> && std::is_same_v<E, Container>) {
    const auto owner = std::make_shared<Container>(std::move(expression));
    return AnyTensor(dtype_of<T>, detail::shape_of_expression(*owner), reinterpret_cast<const std::byte*>(owner->data()), owner);
  } else {
    return AnyTensor(to_tensor(expression));
  }
}

}  // namespace m2lm
