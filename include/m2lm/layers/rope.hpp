// RopeConfig: the frequencies of rotary embedding, with the scalings that LLaMA-family checkpoints use.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/ops/rope.hpp>
#include <m2lm/ops/transfer.hpp>

#include <cmath>
#include <numbers>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// How a context longer than that of pre-training is reached: `rope_type` of config.json.
enum class RopeScaling : std::uint8_t { none, linear, llama3, factors };

/// Run-time values of config.json (`rope_theta`, `rope_scaling`, or `rope_parameters`).
struct RopeConfig {
  double theta = 10000.0;                       ///< pair i turns by theta^(-2i/head_dim) radians per position
  RopeScaling scaling = RopeScaling::none;      ///< which of the values below count
  double factor = 1.0;                          ///< linear, llama3: how many times longer the context is
  double low_freq_factor = 1.0;                 ///< llama3
  double high_freq_factor = 4.0;                ///< llama3
  double original_max_position_embeddings = 0;  ///< llama3
  std::vector<double> factors = {};             ///< factors: each frequency is divided by its own; [head_dim/2]
};

/// Angle per position of each pair: [head_dim/2]. source: transformers' modeling_rope_utils (default, linear, llama3), llama.cpp's
/// rope_freqs (factors).
/// Rounded to f32, as the checkpoints were trained with.
inline std::vector<float> rope_frequencies(const RopeConfig& config, std::int64_t head_dim) {
  std::vector<float> frequencies(static_cast<std::size_t>(head_dim / 2));
  require<CheckpointError>(config.scaling != RopeScaling::factors || config.factors.size() == frequencies.size(), "m2lm: ", config.factors.size(),
                           " RoPE factors for a head_dim of ", head_dim, "; one for each pair is wanted");
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double f = std::pow(config.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (config.scaling == RopeScaling::linear) f /= config.factor;
    if (config.scaling == RopeScaling::factors) f /= config.factors[i];
    if (config.scaling == RopeScaling::llama3 && !M2LM_FAULT(24)) {
      const double wavelength = 2.0 * std::numbers::pi / f;
      const double low = config.original_max_position_embeddings / config.low_freq_factor;
      const double high = config.original_max_position_embeddings / config.high_freq_factor;
      if (wavelength > low) {
        f /= config.factor;
      } else if (wavelength >= high) {
        const double smooth = (config.original_max_position_embeddings / wavelength - config.low_freq_factor) /
                              (config.high_freq_factor - config.low_freq_factor);
        f = (1.0 - smooth) * f / config.factor + smooth * f;
      }
    }
    frequencies[i] = static_cast<float>(f);
  }
  return frequencies;
}

/// Fills cos and sin [tokens, head_dim/2] for positions first, first + 1, …. The angle is an f32 product, as in the reference.
template <class S>
void rope_angles(std::span<const float> frequencies, std::int64_t first, Matrix<S> cos, Matrix<S> sin) {
  for (std::int64_t t = 0; t < cos.extent(0); ++t)
    for (std::int64_t i = 0; i < cos.extent(1); ++i) {
      const double angle = static_cast<double>(static_cast<float>(first + t) * frequencies[static_cast<std::size_t>(i)]);
      cos(t, i) = static_cast<S>(std::cos(angle));
      sin(t, i) = static_cast<S>(M2LM_FAULT(23) ? -std::sin(angle) : std::sin(angle));
    }
}

/// The frequencies of a decoder, and the angles of positions where the backend computes.
template <class B>
class RopeFrequencies {
  std::vector<float> host_;
  Tensor<ElementOf<B, float>> device_;

 public:
  RopeFrequencies() = default;
  /// Those of rope_frequencies(config, head_dim). throws as it.
  RopeFrequencies(const RopeConfig& config, std::int64_t head_dim) : host_(rope_frequencies(config, head_dim)) {}

  void prepare([[maybe_unused]] Context<B>& ctx) {
    if constexpr (!HostBackend<B>) {
      Tensor<float> values(Shape{static_cast<std::int64_t>(host_.size())});
      for (std::size_t i = 0; i < host_.size(); ++i) values.data()[i] = host_[i];
      device_ = ops::upload_tensor<B, OnDevice<float>>(ctx, AnyTensor(std::move(values)));
    }
  }
  /// Fills cos and sin [tokens, head_dim/2] for positions first, first + 1, …. A device reads `first` from *length, unless that is null.
  void angles([[maybe_unused]] Context<B>& ctx, std::int64_t first, [[maybe_unused]] const OnDevice<std::int32_t>* length, Matrix<AccumulatorOf<B>> cos,
              Matrix<AccumulatorOf<B>> sin) const {
    if constexpr (HostBackend<B>)
      rope_angles<ScalarOf<B>>(host_, first, cos, sin);
    else
      ops::Impl<ops::RopeAngles, B>::run(ctx, device_, first, length, cos, sin);
  }
};

}  // namespace m2lm
