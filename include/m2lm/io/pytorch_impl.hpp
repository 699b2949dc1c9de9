// Definitions of io/pytorch.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/pickle_impl.hpp>
#include <m2lm/io/pytorch.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/io/zip_impl.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

struct PytorchFile::File {
  ZipArchive archive;
  std::vector<std::string> names;
  std::unordered_map<std::string, AnyTensor> tensors;
};

namespace detail {

/// Elements that the extents span; the strides and the offset must keep them inside the storage. A stride of an extent of 1 means nothing.
M2LM_IMPL std::int64_t checked_elements(const PickledTensor& t, std::string_view where) {
  const auto check = [&](bool ok, const auto&... what) { require<CheckpointError>(ok, where, what...); };
  std::int64_t elements = 1, last = t.offset;
  bool overflow = false, outside = false;
  check(t.offset >= 0 && t.storage_elements >= 0, "its offset is ", t.offset, " in a storage of ", t.storage_elements, " elements");
  for (std::size_t i = 0; i < t.shape.size(); ++i) {
    check(t.shape[i] >= 0 && t.strides[i] >= 0, "its shape is ", shape_string(t.shape), " with strides ", shape_string(t.strides));
    overflow = __builtin_mul_overflow(elements, t.shape[i], &elements) || overflow;
    if (t.shape[i] < 2) continue;
    std::int64_t span = 0;
    outside = __builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &span) || __builtin_add_overflow(last, span, &last) || outside;
  }
  check(!overflow, "shape ", shape_string(t.shape), " has more elements than can be counted");
  if (elements == 0) return 0;
  check(!outside && last < t.storage_elements, "shape ", shape_string(t.shape), " with strides ", shape_string(t.strides), " from element ", t.offset,
        " on does not lie inside a storage of ", t.storage_elements, " elements");
  check(elements <= t.storage_elements, "shape ", shape_string(t.shape), " has more elements than its storage, ", t.storage_elements,
        ": an expanded tensor; save its clone()");
  return elements;
}

M2LM_IMPL bool is_contiguous(const PickledTensor& t) {
  std::int64_t expected = 1;
  if (M2LM_FAULT(51)) return true;
  for (std::size_t i = t.shape.size(); i-- > 0;) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

/// The elements in row-major order. requires checked_elements(t) = elements > 0.
M2LM_IMPL AnyTensor copy_in_order(const PickledTensor& t, const std::byte* storage, std::int64_t elements) {
  const std::size_t size = dtype_size(t.dtype);
  auto bytes = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(elements) * size);
  std::vector<std::int64_t> index(t.shape.size(), 0);
  std::int64_t source = t.offset;
  for (std::int64_t i = 0; i < elements; ++i) {
    std::memcpy(bytes->data() + static_cast<std::size_t>(i) * size, storage + static_cast<std::size_t>(source) * size, size);
    for (std::size_t d = t.shape.size(); d-- > 0;) {
      source += t.strides[d];
      if (++index[d] < t.shape[d]) break;
      source -= t.strides[d] * t.shape[d];
      index[d] = 0;
    }
  }
  const std::byte* data = bytes->data();
  return AnyTensor(t.dtype, Shape(t.shape), data, std::move(bytes));
}

}  // namespace detail

M2LM_IMPL PytorchFile PytorchFile::open(std::string_view path, const PytorchLimits& limits) {
  auto file = std::make_shared<File>();
  MappedFile mapping = MappedFile::open(path);
  const auto first = mapping.bytes().first(std::min<std::size_t>(mapping.bytes().size(), 2));
  require<CheckpointError>(first.size() < 2 || first[0] != std::byte{0x80} || first[1] != std::byte{2}, path,
                           ": is in the format that PyTorch used before 1.6; load it with PyTorch and save it again");
  file->archive = ZipArchive::open(std::move(mapping));
  const ZipArchive& archive = file->archive;
  const auto check = [&](bool ok, const auto&... what) { require<CheckpointError>(ok, path, ": ", what...); };

  // torch.save puts everything below one folder whose name is the file's; only the entry of the pickle tells it.
  constexpr std::string_view pickle_name = "data.pkl";
  const ZipArchive::Entry* pickle = nullptr;
  for (const ZipArchive::Entry& entry : archive.entries()) {
    const std::size_t slash = entry.name.find('/');
    if (slash == std::string::npos || std::string_view(entry.name).substr(slash + 1) != pickle_name) continue;
    check(pickle == nullptr, "holds two pickles, ", detail::shown(entry.name), " and ", pickle ? detail::shown(pickle->name) : "");
    pickle = &entry;
  }
  check(pickle != nullptr, "is a zip file, but none that torch.save made: it has no NAME/data.pkl");
  const std::string folder = pickle->name.substr(0, pickle->name.size() - pickle_name.size());
  check(archive.find(folder + "constants.pkl") == nullptr, "is a TorchScript module, which is a program; save its state dict instead");
  if (const ZipArchive::Entry* order = archive.find(folder + "byteorder")) {
    const auto bytes = archive.bytes(*order);
    check(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()) == "little", "was written on a machine of another byte order");
  }

  std::size_t copied = 0;
  // Tensors that share everything share the copy, too.
  using Key = std::tuple<std::string_view, DType, std::int64_t, std::vector<std::int64_t>, std::vector<std::int64_t>>;
  std::map<Key, AnyTensor> copies;
  for (const PickledTensor& t : read_pickled_tensors(archive.checked_bytes(*pickle), path, limits)) {
    const std::string name(t.name);
    const std::string where = concat(path, ": tensor \"", detail::shown(name, 200), "\": ");
    const std::int64_t elements = detail::checked_elements(t, where);
    const ZipArchive::Entry* storage = archive.find(concat(folder, "data/", t.storage));
    require<CheckpointError>(storage != nullptr, where, "its storage ", detail::shown(concat(folder, "data/", t.storage)), " is not in the file");
    const std::size_t size = dtype_size(t.dtype);
    require<CheckpointError>(storage->size % size == 0 && storage->size / size == static_cast<std::size_t>(t.storage_elements), where,
                             "its storage is said to have ", t.storage_elements, " elements of ", dtype_name(t.dtype), ", but takes ", storage->size,
                             " bytes");
    AnyTensor tensor;
    const std::byte* data = archive.bytes(*storage).data();
    if (elements == 0 || detail::is_contiguous(t)) {
      tensor = AnyTensor(t.dtype, Shape(t.shape), elements == 0 ? data : data + static_cast<std::size_t>(t.offset) * size, archive.file().owner());
    } else {
      AnyTensor& copy = copies[Key{t.storage, t.dtype, t.offset, t.shape, t.strides}];
      if (!copy.has_value()) {
        copied += static_cast<std::size_t>(elements) * size;
        require<CheckpointError>(copied <= archive.file().bytes().size(), where,
                                 "too many tensors lie in another order than their shape says: more than ", archive.file().bytes().size(),
                                 " bytes, the size of the file, would have to be copied");
        copy = detail::copy_in_order(t, data, elements);
      }
      tensor = copy;
    }
    require<CheckpointError>(file->tensors.emplace(name, std::move(tensor)).second, where, "is there twice");
    file->names.push_back(name);
  }
  PytorchFile out;
  out.file_ = std::move(file);
  return out;
}

M2LM_IMPL std::span<const std::string> PytorchFile::names() const { return file_->names; }
M2LM_IMPL bool PytorchFile::contains(std::string_view name) const { return file_->tensors.contains(std::string(name)); }
M2LM_IMPL const MappedFile& PytorchFile::mapping() const { return file_->archive.file(); }

M2LM_IMPL const AnyTensor& PytorchFile::tensor(std::string_view name) const {
  const auto found = file_->tensors.find(std::string(name));
  if (found == file_->tensors.end()) {
    const std::string nearest = detail::nearest_name(name, file_->names);
    throw CheckpointError(concat(mapping().path(), ": has no tensor \"", name, "\"", nearest.empty() ? "" : "; the nearest name is ", nearest));
  }
  return found->second;
}

}  // namespace m2lm
