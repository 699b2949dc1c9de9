// Tokens that the device chooses against those of Sampler: the same logits, options, seeds and histories give the same tokens. The two add
// in different orders, so a draw may fall between them where a sum lies within rounding of what it is compared with; `ambiguous` says
// where that is so.
#include "device_support.hpp"

#include <m2lm/backends/cuda/kernels/sampling.cuh>
#include <m2lm/core/rng.hpp>
#include <m2lm/sampling/processors.hpp>

#include <algorithm>
#include <span>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

template <class T>
M2LM_KERNEL void draw_uniforms(const std::uint64_t* seeds, const std::uint64_t* counters, T* out) {
  out[threadIdx.x] = detail::uniform_of(seeds[threadIdx.x], counters[threadIdx.x]);
}

template <class T>
M2LM_KERNEL void rank_logits(const T* logits, std::uint32_t* ranks, T* back, int* bins, float largest) {
  ranks[threadIdx.x] = detail::rank_of(logits[threadIdx.x]);
  back[threadIdx.x] = detail::logit_of(ranks[threadIdx.x]);
  bins[threadIdx.x] = detail::bin_of(largest, logits[threadIdx.x]);
}

}  // namespace
}  // namespace m2lm::cuda

namespace {

using namespace m2lm_test;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

/// A sequence on both sides.
struct Sequence {
  SamplingOptions options;
  std::uint64_t seed = 0;
  std::vector<std::int32_t> history;
};

SamplerRow row_of(const Sequence& s) {
  return {.seed = s.seed,
          .counter = 0,
          .temperature = static_cast<float>(s.options.temperature),
          .top_p = s.options.top_p,
          .min_p = static_cast<float>(s.options.min_p),
          .repetition_penalty = static_cast<float>(s.options.repetition_penalty),
          .top_k = s.options.top_k,
          .failed = 0};
}

/// Sequences that are sampled on a device, step by step.
class DeviceSampler {
  cuda::Device& device_;
  std::int64_t vocab_, extra_, offset_;
  std::size_t count_, words_;
  DeviceArray<SamplerRow> rows_;
  DeviceArray<std::uint32_t> seen_;
  DeviceArray<std::int32_t> ids_;
  DeviceArray<std::byte> scratch_;
  bool marks_;

  static std::vector<SamplerRow> rows_of(const std::vector<Sequence>& sequences) {
    std::vector<SamplerRow> out;
    for (const Sequence& s : sequences) out.push_back(row_of(s));
    return out;
  }
  static std::vector<std::uint32_t> seen_of(const std::vector<Sequence>& sequences, std::int64_t vocab, std::size_t words) {
    std::vector<std::uint32_t> out(sequences.size() * words);
    for (std::size_t r = 0; r < sequences.size(); ++r)
      for (const std::int32_t id : sequences[r].history)
        if (id >= 0 && id < vocab) out[r * words + static_cast<std::size_t>(id) / 32] |= std::uint32_t{1} << (id % 32);
    return out;
  }

 public:
  DeviceSampler(cuda::Device& device, const std::vector<Sequence>& sequences, std::int64_t vocab, std::int64_t extra = 0, std::int64_t offset = 0,
                bool marks = true)
      : device_(device),
        vocab_(vocab),
        extra_(extra),
        offset_(offset),
        count_(sequences.size()),
        words_(static_cast<std::size_t>(vocab + 31) / 32),
        rows_(device, rows_of(sequences)),
        seen_(device, seen_of(sequences, vocab, words_)),
        ids_(device, std::vector<std::int32_t>(count_, -7)),
        scratch_(device, std::vector<std::byte>(cuda::sample_scratch(static_cast<std::int64_t>(count_), vocab), std::byte{0xa5})),
        marks_(marks) {}

  std::vector<std::int32_t> step(const std::vector<float>& logits, bool greedy = false) {
    const auto rows = static_cast<std::int64_t>(count_);
    const DeviceMatrix<float> matrix(device_, rows, vocab_, logits, extra_, offset_);
    const std::uint64_t waits = device_.waits();
    cuda::sample(device_, matrix.view(), rows_.data(), marks_ ? seen_.data() : nullptr, ids_.data(), scratch_.data(), greedy);
    CHECK(device_.waits() == waits);
    (void)matrix.read();  // checks what lies between the rows
    return ids_.read();
  }
  std::vector<SamplerRow> rows() const { return rows_.read(); }
  std::vector<std::uint32_t> seen() const { return seen_.read(); }
  bool marked(std::size_t row, std::int32_t id) const {
    return (seen_.read()[row * words_ + static_cast<std::size_t>(id) / 32] >> (id % 32) & 1U) != 0;
  }
};

/// Whether the host's token hangs on the rounding of a sum of f64: `before` are the logits before its processors, u is what it drew. A sum
/// of n terms has a relative error of n·2^-53 on either side; 2^-40 is more than that for every vocabulary here.
bool ambiguous(const SamplingOptions& options, std::vector<float> logits, const std::vector<std::int32_t>& history, double u) {
  constexpr double slack = 0x1.0p-40;
  const auto vocab = static_cast<std::int64_t>(logits.size());
  const auto processed = [&](double top_p, double min_p) {
    SamplingOptions o = options;
    o.top_p = top_p;
    o.min_p = min_p;
    std::vector<float> out = logits;
    const std::span<const std::int32_t> histories[] = {history};
    Sampler sampler(o, vocab);
    sampler.process({out.data(), {1, vocab}}, histories);
    return out;
  };
  // Limits: would the set be another one if top_p or min_p were the neighbouring f32 comparisons?
  const auto set_of = [](const std::vector<float>& x) {
    std::vector<bool> kept;
    for (const float l : x) kept.push_back(l != -infinity);
    return kept;
  };
  const auto kept = set_of(processed(options.top_p, options.min_p));
  if (options.top_p < 1)
    for (const double step : {-1.0, 1.0}) {
      const double nudged = options.top_p + step * 0x1.0p-24 * (1 - options.top_p) * 2;
      if (nudged < 1 && nudged > 0 && set_of(processed(nudged, options.min_p)) != kept) return true;
    }
  if (options.min_p > 0)
    for (const double factor : {1 - 0x1.0p-23, 1 + 0x1.0p-23})
      if (options.min_p * factor <= 1 && set_of(processed(options.top_p, options.min_p * factor)) != kept) return true;
  // The draw.
  const auto final_logits = processed(options.top_p, options.min_p);
  const float largest = *std::max_element(final_logits.begin(), final_logits.end());
  double sum = 0, running = 0;
  for (const float l : final_logits) sum += std::exp(static_cast<double>(l) - static_cast<double>(largest));
  for (const float l : final_logits) {
    running += std::exp(static_cast<double>(l) - static_cast<double>(largest));
    if (std::abs(running - u * sum) <= slack * sum) return true;
  }
  return false;
}

struct Tally {
  std::int64_t drawn = 0, ambiguous = 0, wrong = 0;
};

enum class Kind { spread, ties, flat, equal, sparse };

std::vector<float> logits_of(Random& random, Kind kind, std::int64_t vocab) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < vocab; ++i) {
    const float x = random.value();
    switch (kind) {
      case Kind::spread: out.push_back(4 * x); break;
      case Kind::ties: out.push_back(std::round(2 * x) * (random.coin() ? 0.5F : -0.5F)); break;  // -0 among them
      case Kind::flat: out.push_back(0.01F * x - 20); break;
      case Kind::equal: out.push_back(1.5F); break;
      case Kind::sparse: out.push_back(random.integer(0, 3) == 0 ? 3 * x : -infinity); break;
    }
  }
  if (kind == Kind::sparse) out[static_cast<std::size_t>(random.integer(0, vocab - 1))] = 1;
  return out;
}

/// Steps all sequences on both sides and counts where the tokens differ. The history is the host's: after an ambiguous token the device's
/// sequence goes its own way, so it is left out.
void compare(cuda::Device& device, Random& random, std::vector<Sequence> sequences, Kind kind, std::int64_t vocab, int steps, Tally& tally,
             std::int64_t extra = 0, std::int64_t offset = 0) {
  DeviceSampler on_device(device, sequences, vocab, extra, offset);
  std::vector<Sampler> samplers;
  std::vector<Rng> rngs;
  for (const Sequence& s : sequences) {
    samplers.emplace_back(s.options, vocab);
    rngs.emplace_back(s.seed);
  }
  std::vector<bool> apart(sequences.size());
  for (int step = 0; step < steps; ++step) {
    std::vector<float> all;
    for (std::size_t r = 0; r < sequences.size(); ++r) {
      const auto row = logits_of(random, kind, vocab);
      all.insert(all.end(), row.begin(), row.end());
    }
    const auto ids = on_device.step(all);
    for (std::size_t r = 0; r < sequences.size(); ++r) {
      Sequence& s = sequences[r];
      const auto begin = all.begin() + static_cast<std::ptrdiff_t>(r) * vocab;
      const std::vector<float> row(begin, begin + vocab);
      std::vector<float> scratch = row;
      const Rng before = rngs[r];
      const std::int32_t expected = samplers[r].sample(scratch, s.history, rngs[r]);
      if (apart[r]) continue;
      ++tally.drawn;
      if (ids[r] != expected) {
        Rng copy = before;
        const bool excused = samplers[r].greedy() ? false : ambiguous(s.options, row, s.history, copy.uniform());
        ++(excused ? tally.ambiguous : tally.wrong);
        apart[r] = true;
        if (!excused)
          MESSAGE("vocab ", vocab, " kind ", static_cast<int>(kind), " T ", s.options.temperature, " k ", s.options.top_k, " p ", s.options.top_p,
                  " min ", s.options.min_p, " penalty ", s.options.repetition_penalty, ": token ", ids[r], " instead of ", expected);
      }
      s.history.push_back(expected);
    }
  }
  const auto rows = on_device.rows();
  for (std::size_t r = 0; r < sequences.size(); ++r) {
    CHECK(rows[r].failed == 0);
    CHECK(rows[r].seed == sequences[r].seed);
    CHECK(rows[r].counter == (samplers[r].greedy() ? 0U : static_cast<std::uint64_t>(steps)));
    if (!apart[r]) CHECK(on_device.marked(r, sequences[r].history.back()));
  }
}

/// All combinations of options, or, at random, one of `every`.
std::vector<Sequence> grid(Random& random, std::int64_t vocab, std::int64_t every) {
  std::vector<Sequence> out;
  for (const double temperature : {0.0, 0.3, 1.0, 1.7})
    for (const std::int64_t top_k : {std::int64_t{0}, std::int64_t{1}, std::int64_t{5}, vocab / 2, vocab, vocab + 3})
      for (const double top_p : {1.0, 0.999, 0.9, 0.5, 0.05, 0.0})
        for (const double min_p : {0.0, 0.05, 0.5, 1.0})
          for (const double penalty : {1.0, 1.3, 0.7}) {
            if (random.integer(1, every) != 1) continue;
            Sequence s{.options = {.temperature = temperature,
                                   .top_k = static_cast<std::int32_t>(top_k),
                                   .top_p = top_p,
                                   .min_p = min_p,
                                   .repetition_penalty = penalty},
                       .seed = static_cast<std::uint64_t>(random.integer(0, std::int64_t{1} << 62)),
                       .history = {}};
            for (int i = 0; i < 6; ++i) s.history.push_back(static_cast<std::int32_t>(random.integer(-1, vocab)));
            out.push_back(std::move(s));
          }
  return out;
}

void check(const Tally& tally) {
  MESSAGE(tally.drawn, " tokens, ", tally.ambiguous, " of them ambiguous");
  CHECK(tally.wrong == 0);
  CHECK(tally.ambiguous * 500 <= tally.drawn);
}

}  // namespace

TEST_CASE("the device draws the numbers of Rng") {
  cuda::Device device(0);
  Random random(1);
  std::vector<std::uint64_t> seeds, counters;
  std::vector<double> expected;
  for (int i = 0; i < 64; ++i) {
    seeds.push_back(static_cast<std::uint64_t>(random.integer(0, std::numeric_limits<std::int64_t>::max() - 1)) * 2);
    counters.push_back(static_cast<std::uint64_t>(i % 5));
    Rng rng(seeds.back());
    for (std::uint64_t c = 0; c < counters.back(); ++c) rng.next();
    expected.push_back(rng.uniform());
  }
  const DeviceArray<std::uint64_t> s(device, seeds), c(device, counters);
  const DeviceArray<double> out(device, std::vector<double>(64));
  cuda::launch(device, "draw_uniforms", cuda::draw_uniforms<double>, {.block_x = 64}, s.data(), c.data(), out.data());
  CHECK(out.read() == expected);
}

TEST_CASE("ranks order logits as they compare, and bins never cross that order") {
  cuda::Device device(0);
  Random random(2);
  std::vector<float> logits{0.0F, -0.0F, 1e-40F, -1e-40F, 88.0F, 87.99999F, -infinity, -3e38F};
  while (logits.size() < 128) logits.push_back(random.value() * 30);
  const DeviceArray<float> in(device, logits), back(device, logits);
  const DeviceArray<std::uint32_t> ranks(device, std::vector<std::uint32_t>(128));
  const DeviceArray<int> bins(device, std::vector<int>(128));
  const float largest = *std::max_element(logits.begin(), logits.end());
  cuda::launch(device, "rank_logits", cuda::rank_logits<float>, {.block_x = 128}, in.data(), ranks.data(), back.data(), bins.data(), largest);
  const auto rank = ranks.read();
  const auto bin = bins.read();
  CHECK(back.read() == logits);
  bool ordered = true;
  for (std::size_t i = 0; i < 128; ++i)
    for (std::size_t j = 0; j < 128; ++j) {
      ordered &= (logits[i] < logits[j]) == (rank[i] > rank[j]);
      ordered &= logits[i] < logits[j] ? bin[i] >= bin[j] : true;
    }
  CHECK(ordered);
  CHECK(*std::min_element(bin.begin(), bin.end()) == 0);
  CHECK(*std::max_element(bin.begin(), bin.end()) == cuda::detail::distance_bins - 1);
}

TEST_CASE("every combination of options gives Sampler's token") {
  cuda::Device device(0);
  Random random(3);
  Tally tally;
  for (const std::int64_t vocab : {1, 2, 7, 40, 300})
    compare(device, random, grid(random, vocab, vocab == 40 ? 1 : 5), Kind::spread, vocab, 1, tally);
  for (const Kind kind : {Kind::ties, Kind::equal, Kind::sparse}) compare(device, random, grid(random, 33, 5), kind, 33, 1, tally);
  check(tally);
  CHECK(tally.drawn > 3500);
}

TEST_CASE("sequences go on: penalties for what was chosen, one number per draw; strides and addresses that are not whole vectors") {
  cuda::Device device(0);
  Random random(4);
  Tally tally;
  for (const std::int64_t vocab : {5, 64, 1500})
    for (const std::int64_t extra : {0, 3}) {
      compare(device, random, grid(random, vocab, 80), extra == 0 ? Kind::spread : Kind::ties, vocab, 10, tally, extra, extra / 3);
    }
  check(tally);
}

TEST_CASE("more candidates than shared memory holds, and vocabularies of several chunks") {
  cuda::Device device(0);
  Random random(5);
  Tally tally;
  const auto sequence = [&](double temperature, std::int32_t top_k, double top_p, double min_p) {
    return Sequence{.options = {.temperature = temperature, .top_k = top_k, .top_p = top_p, .min_p = min_p, .repetition_penalty = 1.1},
                    .seed = static_cast<std::uint64_t>(random.integer(0, 1 << 30)),
                    .history = {0, 1, 2}};
  };
  for (const std::int64_t vocab : {5000, 9001}) {
    const std::vector<Sequence> sequences{sequence(1, 0, 1, 0),        sequence(1, 0, 0.95, 0),    sequence(0.8, 3000, 1, 0),
                                          sequence(0.8, 3000, 0.9, 0), sequence(1.2, 0, 1, 0.1),   sequence(1, 50, 0.9, 0.02),
                                          sequence(0, 0, 1, 0),        sequence(2, 2048, 0.999, 0)};
    for (const Kind kind : {Kind::flat, Kind::spread, Kind::ties}) compare(device, random, sequences, kind, vocab, 3, tally);
  }
  check(tally);
}

TEST_CASE("a row that cannot be sampled fails alone, and stays failed") {
  cuda::Device device(0);
  Random random(6);
  constexpr std::int64_t vocab = 70;
  for (const double temperature : {0.0, 1.0, 1e-5}) {
    const Sequence s{.options = {.temperature = temperature, .top_k = 10, .top_p = 0.9}, .seed = 5, .history = {1, 2}};
    const std::vector<Sequence> sequences(6, s);
    DeviceSampler sampler(device, sequences, vocab);
    const auto seen = sampler.seen();
    auto logits = logits_of(random, Kind::spread, 6 * vocab);
    const auto at = [&](std::int64_t row, std::int64_t id) -> float& { return logits[static_cast<std::size_t>(row * vocab + id)]; };
    at(0, 69) = nan_value;
    at(1, 0) = infinity;
    for (std::int64_t i = 0; i < vocab; ++i) at(2, i) = -infinity;
    at(3, 7) = -nan_value;
    at(4, 7) = 3e38F;  // +inf after the lowest temperature
    const auto ids = sampler.step(logits);
    const auto rows = sampler.rows();
    const auto seen_after = sampler.seen();
    for (std::size_t r = 0; r < 6; ++r) {
      const bool fails = r < 4 || (r == 4 && temperature == 1e-5);
      CAPTURE(r);
      CHECK((rows[r].failed == 1) == fails);
      CHECK((ids[r] == -1) == fails);
      CHECK(rows[r].counter == (fails || temperature == 0 ? 0U : 1U));
      const std::size_t words = seen.size() / 6;
      if (fails)
        CHECK(std::equal(seen.begin() + static_cast<std::ptrdiff_t>(r * words), seen.begin() + static_cast<std::ptrdiff_t>((r + 1) * words),
                         seen_after.begin() + static_cast<std::ptrdiff_t>(r * words)));
    }
    const auto again = sampler.step(logits_of(random, Kind::spread, 6 * vocab));
    CHECK(again[0] == -1);
    CHECK(again[5] >= 0);
  }
}

TEST_CASE("the lowest id wins among equal logits, wherever the chunks end") {
  cuda::Device device(0);
  constexpr std::int64_t vocab = 2100;
  const std::vector<Sequence> sequences(4);
  DeviceSampler sampler(device, sequences, vocab, 0, 0, false);
  std::vector<float> logits(4 * vocab, -1);
  const std::int64_t where[4][2] = {{0, 2099}, {1023, 1024}, {2047, 2048}, {5, 4}};
  for (std::size_t r = 0; r < 4; ++r)
    for (const std::int64_t id : where[r]) logits[r * vocab + static_cast<std::size_t>(id)] = 9;
  logits[3 * vocab + 4] = -0.0F, logits[3 * vocab + 5] = 0.0F;  // equal, as numbers
  for (const bool greedy : {false, true}) CHECK(sampler.step(logits, greedy) == std::vector<std::int32_t>{0, 1023, 2047, 4});
  CHECK(std::ranges::count(sampler.seen(), 0U) == 4 * 66);  // none was marked
}

TEST_CASE("shapes, and what is refused") {
  static_assert(cuda::sampling_chunks(1) == 1 && cuda::sampling_chunks(1024) == 1 && cuda::sampling_chunks(1025) == 2);
  static_assert(cuda::choosing_threads(32000) == 512 && cuda::choosing_threads(300) == 128);
  CHECK(cuda::sample_scratch(3, 32000) == 3 * (32 * 32 + 1024 * 8 + 8 + 32000 * 4));
  cuda::Device device(0);
  const DeviceMatrix<float> logits(device, 1, 1);
  const Matrix<float> huge(logits.view().data(), {1, (std::int64_t{1} << 21) + 1}), none(logits.view().data(), {1, 0});
  CHECK_THROWS_AS(cuda::sample(device, huge, nullptr, nullptr, nullptr, nullptr), CapacityError);
  CHECK_THROWS_AS(cuda::sample(device, none, nullptr, nullptr, nullptr, nullptr), ShapeError);
  CHECK_NOTHROW(cuda::sample(device, Matrix<float>(logits.view().data(), {0, 5}), nullptr, nullptr, nullptr, nullptr));
}
