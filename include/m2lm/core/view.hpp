// Shape and View: a strided, non-owning window on elements.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/error.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>

namespace m2lm::inline M2LM_ABI {

/// Dimensions that a tensor has at most.
inline constexpr int max_rank = 6;

/// Run-time extents, row-major, rank 0 to 6. A rank of 0 is a scalar (one element).
class Shape {
  std::array<std::int64_t, max_rank> extent_{};
  int rank_ = 0;

 public:
  constexpr Shape() = default;
  /// From a list, Shape{2, 3}. throws ShapeError for more than six extents.
  constexpr Shape(std::initializer_list<std::int64_t> extents) : Shape(std::span(extents.begin(), extents.size())) {}
  /// throws ShapeError for more than six extents.
  constexpr explicit Shape(std::span<const std::int64_t> extents) : rank_(static_cast<int>(extents.size())) {
    if (extents.size() > static_cast<std::size_t>(max_rank)) throw ShapeError("m2lm: a tensor has at most 6 dimensions");
    for (std::size_t i = 0; i < extents.size(); ++i) extent_[i] = extents[i];
  }

  /// Number of dimensions.
  constexpr int rank() const { return rank_; }
  /// Extent of dimension i. requires 0 <= i < 6; 0 from rank() on.
  constexpr std::int64_t operator[](int i) const { return extent_[static_cast<std::size_t>(i)]; }
  /// One for each dimension, the slowest first.
  constexpr std::span<const std::int64_t> extents() const { return {extent_.data(), static_cast<std::size_t>(rank_)}; }
  /// Product of the extents; 1 of a scalar.
  constexpr std::int64_t elements() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= (*this)[i];
    return n;
  }
  /// "[2, 3]", as messages have it.
  std::string string() const { return shape_string(extents()); }
  friend constexpr bool operator==(const Shape&, const Shape&) = default;
};

/// Non-owning window: data, extents, strides (in elements; the last one is 1 unless stated otherwise).
template <class T, int Rank>
class View {
  static_assert(Rank >= 1 && Rank <= max_rank, "m2lm::View: the rank is between 1 and 6");
  T* data_ = nullptr;
  std::array<std::int64_t, Rank> extent_{};
  std::array<std::int64_t, Rank> stride_{};

 public:
  using Element = T;
  constexpr View() = default;
  /// Contiguous, row-major.
  constexpr View(T* data, std::array<std::int64_t, Rank> extents) : data_(data), extent_(extents) {
    std::int64_t stride = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      stride_[static_cast<std::size_t>(i)] = stride;
      stride *= extents[static_cast<std::size_t>(i)];
    }
  }
  /// With strides in elements. requires what they reach to lie in memory.
  constexpr View(T* data, std::array<std::int64_t, Rank> extents, std::array<std::int64_t, Rank> strides)
      : data_(data), extent_(extents), stride_(strides) {}
  /// A view of non-const elements is a view of const ones.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  constexpr View(const View<U, Rank>& other)  // NOLINT: implicit like T* to const T*
      : data_(other.data()), extent_(other.extents()), stride_(other.strides()) {}

  /// The first element; null of a default-constructed view.
  constexpr T* data() const { return data_; }
  /// Of dimension i. requires 0 <= i < Rank.
  constexpr std::int64_t extent(int i) const { return extent_[static_cast<std::size_t>(i)]; }
  /// Elements from one index of dimension i to the next.
  constexpr std::int64_t stride(int i) const { return stride_[static_cast<std::size_t>(i)]; }
  /// Of all dimensions, the slowest first.
  constexpr const std::array<std::int64_t, Rank>& extents() const { return extent_; }
  /// Of all dimensions, in elements.
  constexpr const std::array<std::int64_t, Rank>& strides() const { return stride_; }
  /// The extents as a Shape.
  constexpr Shape shape() const { return Shape(std::span<const std::int64_t>(extent_)); }
  /// Product of the extents.
  constexpr std::int64_t elements() const {
    std::int64_t n = 1;
    for (std::int64_t e : extent_) n *= e;
    return n;
  }
  /// Whether the elements lie behind each other in row-major order.
  constexpr bool contiguous() const {
    std::int64_t stride = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      if (extent(i) > 1 && this->stride(i) != stride) return false;
      stride *= extent(i);
    }
    return true;
  }

  /// The element at one index per dimension, unchecked. requires 0 <= index < extent.
  template <class... Index>
    requires(sizeof...(Index) == Rank)
  constexpr T& operator()(Index... index) const {
    std::int64_t offset = 0;
    std::size_t i = 0;
    ((offset += static_cast<std::int64_t>(index) * stride_[i++]), ...);
    return data_[offset];
  }

  /// Rows [begin, end) of the first dimension.
  constexpr View rows(std::int64_t begin, std::int64_t end) const {
    require(0 <= begin && begin <= end && end <= extent(0), "m2lm::View::rows(", begin, ", ", end, ") of ", extent(0), " rows");
    auto extents = extent_;
    extents[0] = end - begin;
    return View(data_ + begin * stride_[0], extents, stride_);
  }
  /// Columns [begin, end) of the last dimension.
  constexpr View columns(std::int64_t begin, std::int64_t end) const {
    require(0 <= begin && begin <= end && end <= extent(Rank - 1), "m2lm::View::columns(", begin, ", ", end, ") of ", extent(Rank - 1));
    auto extents = extent_;
    extents[Rank - 1] = end - begin;
    return View(data_ + begin * stride_[Rank - 1], extents, stride_);
  }
  /// Where row i of the first dimension begins, unchecked.
  constexpr T* row(std::int64_t i) const { return data_ + i * stride_[0]; }
};

/// [rows, columns].
template <class T>
using Matrix = View<T, 2>;
/// Elements in one dimension.
template <class T>
using Vector = View<T, 1>;

/// to = from, element by element. requires equal shapes and contiguous rows.
template <class T>
void copy_rows(Matrix<const T> from, Matrix<T> to) {
  require(from.shape() == to.shape(), "m2lm::copy_rows: from ", from.shape().string(), " to ", to.shape().string());
  for (std::int64_t i = 0; i < from.extent(0); ++i)
    for (std::int64_t j = 0; j < from.extent(1); ++j) to(i, j) = from(i, j);
}

}  // namespace m2lm
