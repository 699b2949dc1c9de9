// DeviceDecoding: what a device needs to choose tokens and feed them to the decoder by itself.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/rng.hpp>
#include <m2lm/ops/sample.hpp>
#include <m2lm/ops/transfer.hpp>
#include <m2lm/sampling/options.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace m2lm::inline M2LM_ABI::detail {

/// One sequence that goes on.
struct DeviceRow {
  const SamplingOptions* options = nullptr;
  const Rng* rng = nullptr;
  std::span<const std::int32_t> history;  ///< ids of the sequence so far
};

/// Buffers at addresses that stay, so that a step can be recorded. Tokens reach the host behind the device's back: while they travel,
/// the next step is computed.
template <class B>
class DeviceDecoding {
  using S = ScalarOf<B>;
  using A = AccumulatorOf<B>;
  std::int64_t rows_, vocab_;
  Tensor<S> hidden_;
  Tensor<A> logits_;
  Tensor<OnDevice<std::int32_t>> ids_;
  Tensor<OnDevice<SamplerRow>> samplers_;
  Tensor<OnDevice<std::uint32_t>> seen_;
  bool penalised_ = false, greedy_ = true;
  typename B::Mailbox mailbox_;
  int posted_ = 0, read_ = 0;  // messages so far
  std::uint64_t number_ = next_number();

  std::int64_t words() const { return (vocab_ + 31) / 32; }

 public:
  DeviceDecoding(Context<B>& ctx, std::int64_t rows, std::int64_t hidden_size, std::int64_t vocab)
      : rows_(rows),
        vocab_(vocab),
        hidden_(make_tensor<S>(ctx.backend, Shape{rows, hidden_size})),
        logits_(make_tensor<A>(ctx.backend, Shape{rows, vocab})),
        ids_(make_tensor<OnDevice<std::int32_t>>(ctx.backend, Shape{rows})),
        samplers_(make_tensor<OnDevice<SamplerRow>>(ctx.backend, Shape{rows})),
        mailbox_(ctx.backend, rows) {}

  std::int64_t rows() const { return rows_; }
  Matrix<S> hidden(std::int64_t count) { return hidden_.template view<2>().rows(0, count); }
  Matrix<A> logits(std::int64_t count) { return logits_.template view<2>().rows(0, count); }
  Vector<const OnDevice<std::int32_t>> ids(std::int64_t count) { return Vector<const OnDevice<std::int32_t>>(ids_.data(), {count}); }

  /// From here on the rows are these sequences; messages that were not read are forgotten.
  void begin(Context<B>& ctx, std::span<const DeviceRow> rows) {
    read_ = posted_;
    std::vector<SamplerRow> samplers;
    penalised_ = false;
    greedy_ = true;
    for (const DeviceRow& row : rows) {
      const SamplingOptions& o = *row.options;
      samplers.push_back({.seed = row.rng->seed(),
                          .counter = row.rng->counter(),
                          .temperature = static_cast<float>(o.temperature),
                          .top_p = o.top_p,
                          .min_p = static_cast<float>(o.min_p),
                          .repetition_penalty = static_cast<float>(o.repetition_penalty),
                          .top_k = o.top_k,
                          .failed = 0});
      penalised_ = penalised_ || o.repetition_penalty != 1;
      greedy_ = greedy_ && o.temperature == 0;
    }
    ops::upload_values(ctx, std::span<const SamplerRow>(samplers), samplers_.data());
    if (!penalised_) return;
    if (seen_.empty()) seen_ = make_tensor<OnDevice<std::uint32_t>>(ctx.backend, Shape{rows_, words()});
    std::vector<std::uint32_t> seen(rows.size() * static_cast<std::size_t>(words()));
    for (std::size_t r = 0; r < rows.size(); ++r)
      for (const std::int32_t id : rows[r].history)
        if (id >= 0 && id < vocab_) seen[r * static_cast<std::size_t>(words()) + static_cast<std::size_t>(id) / 32] |= std::uint32_t{1} << (id % 32);
    ops::upload_values(ctx, std::span<const std::uint32_t>(seen), seen_.data());
  }
  /// The tokens that the next step feeds, where the host has chosen the rows anew.
  void feed(Context<B>& ctx, std::span<const std::int32_t> ids) { ops::upload_values(ctx, ids, ids_.data()); }

  /// Chooses the tokens of the first `count` rows from their logits.
  void choose(Context<B>& ctx, std::int64_t count) {
    ops::sample(ctx, logits(count), samplers_.data(), penalised_ ? seen_.data() : nullptr, ids_.data(), greedy_);
  }
  /// Sends the tokens to the host. At most two messages are on their way.
  void post(Context<B>& ctx, std::int64_t count) { mailbox_.post(ctx.backend, ids_.data(), count, posted_++ % 2); }
  /// The oldest message that was not read yet.
  std::span<const std::int32_t> read() { return mailbox_.read(read_++ % 2); }

  /// What a recorded step depends on besides the caches.
  ops::StepKey key(std::int64_t count) const {
    return {{number_, static_cast<std::uint64_t>(count),
             (penalised_ ? std::uint64_t{1} : std::uint64_t{0}) | (greedy_ ? std::uint64_t{2} : std::uint64_t{0})}};
  }
};

}  // namespace m2lm::detail
