// Arena: scratch memory that is taken by moving a mark and given back all at once.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/core/view.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// A number that no other call in this program gives.
inline std::uint64_t next_number() {
  static std::uint64_t last = 0;
  return __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);  // std::atomic would cost every header 1,600 lines
}

/// Bump allocator, in the host's memory or a device's. Memory is uninitialised and 64-byte aligned (256 on a device). Once it has seen the largest piece of work it allocates
/// nothing more: after a growth the blocks are merged into one when the outermost Scope ends.
class Arena {
  struct Block {
    detail::AlignedBytes bytes;
    std::size_t size = 0;
  };
  std::vector<Block> blocks_;
  std::size_t block_ = 0, used_ = 0, peak_ = 0, taken_ = 0;
  MemoryResource* memory_ = nullptr;
  std::uint64_t generation_ = next_number();

 public:
  Arena() = default;
  /// requires `memory`, unless null, to live longer.
  explicit Arena(MemoryResource* memory) : memory_(memory) {}
  Arena(Arena&&) = default;
  Arena& operator=(Arena&&) = default;

  /// Everything taken during the life of a Scope is given back at its end.
  class Scope {
    Arena& arena_;
    std::size_t block_, used_, taken_;

   public:
    /// requires `arena` to outlive the scope; scopes of one arena end in the reverse order of their beginnings.
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_), taken_(arena.taken_) {}
    ~Scope() {
      arena_.block_ = block_;
      arena_.used_ = used_;
      arena_.taken_ = taken_;
      if (taken_ == 0) arena_.merge();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

  /// `count` uninitialised elements.
  template <class T>
  T* take(std::int64_t count) {
    static_assert(!HostElement<T> || std::is_trivially_copyable_v<T>, "m2lm::Arena::take: elements are plain values");
    return reinterpret_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T)));
  }
  /// An uninitialised, contiguous matrix [rows, cols].
  template <class T>
  Matrix<T> matrix(std::int64_t rows, std::int64_t cols) {
    return Matrix<T>(take<T>(rows * cols), {rows, cols});
  }

  /// Most bytes ever in use at once.
  std::size_t peak_bytes() const { return peak_; }
  /// Changes whenever memory was taken from the system or given back: as long as it stays, equal work gets equal addresses. No two
  /// arenas of a program have the same.
  std::uint64_t generation() const { return generation_; }

 private:
  std::byte* take_bytes(std::size_t n) {
    const std::size_t alignment = memory_ ? device_alignment : detail::tensor_alignment;
    n = (n + alignment - 1) / alignment * alignment;
    while (block_ < blocks_.size() && used_ + n > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const std::size_t size = n > minimum_block ? n : minimum_block;
      blocks_.push_back({detail::aligned_bytes(size, memory_), size});
      generation_ = next_number();
    }
    std::byte* p = blocks_[block_].bytes.get() + used_;
    used_ += n;
    taken_ += n;
    if (taken_ > peak_) peak_ = taken_;
    return p;
  }
  void merge() {
    if (blocks_.size() < 2) return;
    std::size_t total = 0;
    for (const auto& b : blocks_) total += b.size;
    blocks_.clear();
    generation_ = next_number();
    try {
      blocks_.push_back({detail::aligned_bytes(total, memory_), total});
    } catch (const std::bad_alloc&) {
      // Another thread took the memory: an arena without blocks is as good as new.
    } catch (const CapacityError&) {  // the same, on a device
    }
  }
  static constexpr std::size_t device_alignment = 256;
  static constexpr std::size_t minimum_block = std::size_t{1} << 16;
};

}  // namespace m2lm
