// What the tests of parts and models share: model types, goldens as tensors, and one way to compare them.
#pragma once

#include <m2lm/m2lm.hpp>
#include <m2lm/testing/synthetic.hpp>
#include <m2lm/testing/tolerance.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm_test {

using m2lm::AnyTensor;
using m2lm::Cpu;
using m2lm::DType;
using m2lm::IsaLevel;
using m2lm::Precision;
using m2lm::Safetensors;
using m2lm::Shape;
using m2lm::Tensor;

inline constexpr Precision in_f32{.weights = DType::f32};

template <class B>
using TextModel = m2lm::Model<B, in_f32, m2lm::LlamaDecoder<>>;
template <class B>
using ImageModel = m2lm::Model<B, in_f32, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
using Lm = TextModel<Cpu>;
using Vlm = ImageModel<Cpu>;

/// Every level of this machine, lowest first.
inline std::vector<IsaLevel> isa_levels() {
  std::vector<IsaLevel> out;
  for (int level = 0; level <= static_cast<int>(m2lm::default_isa()); ++level) out.push_back(static_cast<IsaLevel>(level));
  return out;
}

inline Cpu cpu_at(IsaLevel level, int threads = 1, std::optional<bool> bf16_dot = {}) {
  return Cpu({.threads = threads, .max_isa = level, .bf16_dot = bf16_dot});
}

/// Both ways to multiply bf16.
inline constexpr bool both_dots[] = {false, true};

inline std::vector<std::int32_t> ids_of(const AnyTensor& tensor) {
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) out.push_back(static_cast<std::int32_t>(tensor.at(i)));
  return out;
}

/// Element i of the first dimension: a matrix of [n, rows, cols], a picture of [n, 3, height, width].
template <class T = float>
Tensor<T> slice(const AnyTensor& tensor, std::int64_t i) {
  const Shape shape(tensor.shape().extents().subspan(1));
  Tensor<T> out(shape);
  tensor.copy_to(out.data(), i * shape.elements(), shape.elements());
  return out;
}

/// A golden's ids with its recorded projected features in the place of pictures.
template <class M>
typename M::PromptType with_features(const M& model, const Safetensors& golden, std::string_view name) {
  auto prompt = model.prompt(ids_of(golden.tensor("input_ids")));
  const AnyTensor features = golden.tensor(name);
  for (std::int64_t i = 0; i < features.shape()[0]; ++i) prompt.template attach_embeddings<"image">(AnyTensor(slice<float>(features, i)));
  return prompt;
}

template <class T>
bool same_bits(const Tensor<T>& a, const Tensor<T>& b) {
  return a.shape() == b.shape() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.elements()) * sizeof(T)) == 0;
}

/// Ids from 3 on that go through the whole vocabulary without a pattern.
inline std::vector<std::int32_t> some_ids(std::int64_t count, std::int64_t vocab, std::uint64_t seed = 7) {
  m2lm::Rng rng(seed);
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < count; ++i) out.push_back(static_cast<std::int32_t>(3 + rng.next() % static_cast<std::uint64_t>(vocab - 4)));
  return out;
}

inline void copy_directory(const std::string& from, const TemporaryDirectory& to) {
  for (const auto& entry : std::filesystem::directory_iterator(from)) {
    const std::string target = to / entry.path().filename().string();
    std::filesystem::remove(target);
    std::filesystem::copy_file(entry.path(), target);
    std::filesystem::permissions(target, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  }
}

/// Writes model.safetensors anew with what `change` leaves of the tensors.
template <class F>
void change_tensors(const TemporaryDirectory& directory, F&& change) {
  std::vector<m2lm::NamedTensor> tensors;
  {
    const Safetensors file = Safetensors::open(directory / "model.safetensors");
    for (const std::string& name : file.names()) tensors.push_back({name, file.tensor(name)});
    change(tensors);
    m2lm::write_safetensors(directory / "changed.safetensors", tensors);
  }
  std::filesystem::rename(directory / "changed.safetensors", directory / "model.safetensors");
}

/// Replaces text in a file of the directory; it must occur.
inline void change_text(const TemporaryDirectory& directory, std::string_view file, std::string_view old_text, std::string_view new_text) {
  std::string text = m2lm::read_file(directory / file);
  const std::size_t at = text.find(old_text);
  REQUIRE_MESSAGE(at != std::string::npos, std::string(old_text));
  text.replace(at, old_text.size(), new_text);
  directory.write(file, text);
}

}  // namespace m2lm_test

/// relative_error(a, golden) <= tolerance, with the numbers in the message.
#define M2LM_CHECK_CLOSE(a, golden, tolerance, what)                                                                    \
  do {                                                                                                                  \
    const double m2lm_error = m2lm::testing::relative_error((a), (golden));                                             \
    CHECK_MESSAGE(m2lm_error <= (tolerance), std::string(what), ": ", m2lm_error, " > ", (tolerance));                  \
  } while (false)
