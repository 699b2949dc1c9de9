// NumPy's files: one array (.npy) or several by name (.npz), read without copies and written atomically.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/safetensors.hpp>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// The array of a .npy file. A row-major little-endian one is a view of the mapped file, others are copies. Its elements are f64, f32, f16,
/// i64, i32, i16, i8, u8 or boolean. Source: numpy.lib.format, versions 1.0 to 3.0.
/// throws CheckpointError naming the file: missing, truncated, longer than its array, with a header that is not what numpy.save writes,
/// with elements of another type (Python objects among them: nothing is ever unpickled) or more than 6 dimensions.
AnyTensor load_npy(std::string_view path);

/// The same of bytes that `owner` keeps; `name` stands for the file in messages.
AnyTensor parse_npy(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, std::string_view name);

/// Writes a tensor as numpy.save does, atomically. throws CheckpointError for one without value or in a dtype that numpy has not
/// (bf16, q8, q4: convert with AnyTensor::to<float>()), otherwise as FileWriter.
void save_npy(std::string_view path, const AnyTensor& tensor);

/// The arrays of a .npz file, named without ".npy", in the order of its directory; every checksum is compared. Those of
/// numpy.savez_compressed are unpacked, up to 2 GiB each. throws CheckpointError as load_npy and ZipArchive::open do.
std::vector<NamedTensor> load_npz(std::string_view path);

/// Writes tensors as numpy.savez does, atomically, their data on 64-byte borders of the file. requires distinct names that are not empty.
/// throws CheckpointError as save_npy, and beyond the 4 GiB of a zip archive.
void save_npz(std::string_view path, std::span<const NamedTensor> tensors);

namespace detail {

/// What numpy.save writes before the elements: a multiple of 64 bytes. throws as save_npy; `path` is named in the message.
std::string npy_header(const AnyTensor& tensor, std::string_view path);

}  // namespace detail

}  // namespace m2lm
