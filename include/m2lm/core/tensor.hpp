// Tensor: owning elements with run-time extents. AnyTensor: what a checkpoint holds, with a run-time dtype.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/blocks.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/memory.hpp>
#include <m2lm/core/view.hpp>

#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr std::size_t tensor_alignment = 64;

/// Buffers of the host from this size on lie on borders of huge pages: weights are read from one end to the other, and with pages of 4 KB the
/// search for their addresses takes a tenth of that time, and their first use more than reading the file.
inline constexpr std::size_t huge_page = std::size_t{1} << 21, huge_pages_from = 2 * huge_page;
/// Asks the system for huge pages. requires `begin` on such a border.
inline void advise_huge_pages([[maybe_unused]] std::byte* begin, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  // Whole pages only: the rest of the last one would count as used memory. A system without them answers with an error: as good as before.
  if (const std::size_t whole = bytes / huge_page * huge_page; whole > 0) (void)::madvise(begin, whole, MADV_HUGEPAGE);
#endif
}

struct AlignedDelete {
  MemoryResource* memory = nullptr;  // null: the host's
  std::size_t alignment = tensor_alignment;
  void operator()(std::byte* p) const {
    if (memory)
      memory->release(p);
    else
      ::operator delete(p, std::align_val_t{alignment});
  }
};
using AlignedBytes = std::unique_ptr<std::byte[], AlignedDelete>;

/// Uninitialised bytes on a 64-byte border, of the host's memory or a device's; many of the host's lie in huge pages.
inline AlignedBytes aligned_bytes(std::size_t n, MemoryResource* memory = nullptr) {
  if (memory) return {static_cast<std::byte*>(memory->allocate(n)), {memory}};
  const std::size_t alignment = n >= huge_pages_from ? huge_page : tensor_alignment;
  AlignedBytes bytes(static_cast<std::byte*>(::operator new(n ? n : 1, std::align_val_t{alignment})), {nullptr, alignment});
  if (n >= huge_pages_from) advise_huge_pages(bytes.get(), n);
  return bytes;
}

}  // namespace detail

/// Owning, row-major, contiguous, zero-initialised. Movable; copies are explicit (`clone`). Elements of a type OnDevice<T> lie in the
/// memory of a device, which must live longer than the tensor.
template <class T>
class Tensor {
  static_assert(!HostElement<T> || std::is_trivially_copyable_v<T>, "m2lm::Tensor: elements are plain values");
  Shape shape_;
  detail::AlignedBytes bytes_;

 public:
  Tensor() = default;
  /// Zero-initialised, in the memory of the host.
  explicit Tensor(Shape shape)
    requires HostElement<T>
      : shape_(shape), bytes_(detail::aligned_bytes(static_cast<std::size_t>(shape.elements()) * sizeof(T))) {
    std::uninitialized_value_construct_n(data(), static_cast<std::size_t>(shape.elements()));
  }
  /// Zero-initialised, in the memory of a device, which must outlive the tensor. throws CapacityError.
  Tensor(Shape shape, MemoryResource& memory)
    requires(!HostElement<T>)
      : shape_(shape), bytes_(static_cast<std::byte*>(memory.allocate_zeroed(static_cast<std::size_t>(shape.elements()) * sizeof(T))), {&memory}) {}

  /// Rank 0 before anything is in it.
  const Shape& shape() const { return shape_; }
  /// 0 of a default-constructed or moved-from tensor.
  std::int64_t elements() const { return bytes_ ? shape_.elements() : 0; }
  /// True without elements.
  bool empty() const { return elements() == 0; }
  /// The first element; rows follow each other without gaps.
  T* data() { return reinterpret_cast<T*>(bytes_.get()); }
  /// The same, read-only.
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get()); }
  /// All elements, in row-major order.
  std::span<T> span()
    requires HostElement<T>
  {
    return {data(), static_cast<std::size_t>(elements())};
  }
  /// The same, read-only.
  std::span<const T> span() const
    requires HostElement<T>
  {
    return {data(), static_cast<std::size_t>(elements())};
  }

  /// The tensor as a view of its own rank. throws ShapeError if Rank differs.
  template <int Rank>
  View<T, Rank> view() {
    return View<T, Rank>(data(), extents<Rank>());
  }
  /// The same, read-only.
  template <int Rank>
  View<const T, Rank> view() const {
    return View<const T, Rank>(data(), extents<Rank>());
  }

  /// A copy in memory of its own.
  Tensor clone() const
    requires HostElement<T>
  {
    Tensor copy(shape_);
    if (elements() != 0) std::memcpy(static_cast<void*>(copy.data()), data(), static_cast<std::size_t>(elements()) * sizeof(T));
    return copy;
  }

 private:
  template <int Rank>
  std::array<std::int64_t, Rank> extents() const {
    require(shape_.rank() == Rank, "m2lm::Tensor::view: a view of rank ", Rank, " of a tensor of shape ", shape_.string());
    std::array<std::int64_t, Rank> e{};
    for (int i = 0; i < Rank; ++i) e[static_cast<std::size_t>(i)] = shape_[i];
    return e;
  }
};

namespace detail {

/// Which scalar of a Reference<T> a tensor of dtype `native` holds: one address per type.
struct NativeType {
  std::size_t size;
};
template <class T>
inline constexpr NativeType native_type{sizeof(T)};

}  // namespace detail

/// A read-only tensor with a run-time dtype. Shares ownership of its bytes (a mapped file, or a buffer). One in q8 or q4 has rows (all
/// dimensions but the first) of whole blocks, which lie behind each other.
class AnyTensor {
  DType dtype_ = DType::f32;
  const detail::NativeType* native_ = nullptr;  // of dtype `native` only
  Shape shape_;
  const std::byte* data_ = nullptr;
  std::shared_ptr<const void> owner_;

 public:
  AnyTensor() = default;
  /// Bytes that `owner` keeps alive. requires dtype_bytes(dtype, shape.elements()) of them at `data`.
  AnyTensor(DType dtype, Shape shape, const std::byte* data, std::shared_ptr<const void> owner)
      : dtype_(dtype), shape_(shape), data_(data), owner_(std::move(owner)) {}
  /// Takes a tensor over. A scalar that has no DType (a dual number) is stored as it is: dtype `native`.
  template <HostElement T>
  explicit AnyTensor(Tensor<T>&& tensor) : AnyTensor(std::make_shared<Tensor<T>>(std::move(tensor))) {}
  /// Shares a tensor: who owns it may go on changing its elements (an optimiser does).
  template <HostElement T>
  explicit AnyTensor(const std::shared_ptr<Tensor<T>>& tensor)
      : dtype_(dtype_of<T>), shape_(tensor->shape()), data_(reinterpret_cast<const std::byte*>(tensor->data())), owner_(tensor) {
    if constexpr (dtype_of<T> == DType::native) native_ = &detail::native_type<T>;
  }

  /// `native` of a scalar that no file has.
  DType dtype() const { return dtype_; }
  /// In elements, of q8 and q4 too.
  const Shape& shape() const { return shape_; }
  /// Null without a value. May be unaligned for its dtype, as tensors in files are.
  const std::byte* data() const { return data_; }
  /// False of a default-constructed one.
  bool has_value() const { return data_ != nullptr; }
  /// Size of the data.
  std::size_t bytes() const { return native_ ? static_cast<std::size_t>(shape_.elements()) * native_->size : dtype_bytes(dtype_, shape_.elements()); }
  /// Keeps the data alive.
  const std::shared_ptr<const void>& owner() const { return owner_; }

  /// Rows [begin, end) of the first dimension; shares the bytes. throws ShapeError for rows that are not there.
  AnyTensor rows(std::int64_t begin, std::int64_t end) const {
    require(shape_.rank() >= 1 && 0 <= begin && begin <= end && end <= shape_[0], "m2lm::AnyTensor::rows(", begin, ", ", end, ") of ", shape_.string());
    AnyTensor part = *this;
    std::array<std::int64_t, max_rank> extents{end - begin};
    for (int i = 1; i < shape_.rank(); ++i) extents[static_cast<std::size_t>(i)] = shape_[i];
    part.shape_ = Shape(std::span<const std::int64_t>(extents.data(), static_cast<std::size_t>(shape_.rank())));
    if (shape_[0] > 0) part.data_ += bytes() / static_cast<std::size_t>(shape_[0]) * static_cast<std::size_t>(begin);
    return part;
  }

  /// Element i in row-major order, converted. throws ShapeError for a dtype that has no values of its own.
  double at(std::int64_t i) const {
    const auto load = [&]<class T>(T value) {
      std::memcpy(&value, data_ + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
      return value;
    };
    switch (dtype_) {
      case DType::f64: return load(double{});
      case DType::f32: return static_cast<double>(load(float{}));
      case DType::f16: return static_cast<double>(to_float(load(Half{})));
      case DType::bf16: return static_cast<double>(to_float(load(Bf16{})));
      case DType::i64: return static_cast<double>(load(std::int64_t{}));
      case DType::i32: return static_cast<double>(load(std::int32_t{}));
      case DType::i16: return static_cast<double>(load(std::int16_t{}));
      case DType::i8: return static_cast<double>(load(std::int8_t{}));
      case DType::u8:
      case DType::boolean: return static_cast<double>(load(std::uint8_t{}));
      case DType::q8: return static_cast<double>(dequantise(load_block<Q8Block>(data_, i / block_values), i % block_values));
      case DType::q4: return static_cast<double>(dequantise(load_block<Q4Block>(data_, i / block_values), i % block_values));
      case DType::q4_128:
      case DType::w8a8:
      case DType::inherit:
      case DType::native: break;
    }
    throw ShapeError(concat("m2lm::AnyTensor::at: elements of dtype ", dtype_name(dtype_), " cannot be read"));
  }

  /// Copies elements [begin, begin + count) in row-major order to `out`, converted to T (float, double, or a type made from double).
  /// A tensor of dtype `native` is copied to its own scalar only.
  template <class T>
  void copy_to(T* out, std::int64_t begin, std::int64_t count) const {
    if constexpr (dtype_of<T> == DType::native)
      if (native_ == &detail::native_type<T>) {
        std::memcpy(static_cast<void*>(out), data_ + static_cast<std::size_t>(begin) * sizeof(T), static_cast<std::size_t>(count) * sizeof(T));
        return;
      }
    if (dtype_ == DType::q8) return dequantise<Q8Block>(data_, begin, count, out);
    if (dtype_ == DType::q4) return dequantise<Q4Block>(data_, begin, count, out);
    if constexpr (std::is_same_v<T, float>) {
      const std::byte* source = data_ + static_cast<std::size_t>(begin) * dtype_size(dtype_);
      const auto n = static_cast<std::size_t>(count);
      if (dtype_ == DType::f32) {
        std::memcpy(out, source, n * sizeof(float));
        return;
      }
      if (dtype_ == DType::bf16 || dtype_ == DType::f16) {
        const auto widen = [&]<class Narrow>(Narrow narrow) {  // a loop for each: no question per element
          for (std::size_t i = 0; i < n; ++i) {
            std::memcpy(&narrow.bits, source + i * 2, 2);
            out[i] = to_float(narrow);
          }
        };
        if (dtype_ == DType::bf16)
          widen(Bf16{});
        else
          widen(Half{});
        return;
      }
    }
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(at(begin + i));
  }

  /// A copy as T, whatever the dtype: rounded where T is narrower, blocks times their scale.
  template <class T>
  Tensor<T> to() const {
    Tensor<T> out(shape_);
    copy_to(out.data(), 0, shape_.elements());
    return out;
  }
};

}  // namespace m2lm
