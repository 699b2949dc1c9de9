// Choosing tokens on the device, as sampling/processors.hpp does on the host: repetition penalty, temperature, top-k, top-p, min-p, and a
// draw by inverse CDF in the order of the ids. Nothing is sorted: a limit is found by counting.
// Floor: backends. May include: core, ops.
#pragma once

// Four launches (the first and the last where all rows are greedy). The first three cut a row into chunks, one block for each, so that a
// vocabulary is read by many multiprocessors:
//   scale_logits       repetition penalty and temperature; the largest logit of each chunk
//   weigh_logits       the sum of exp(logit - largest) of each chunk; how many tokens, or how much weight, lie how far below the largest
//   select_candidates  from these bins: a distance that what top-k, top-p or min-p keeps surely lies within; the tokens within it
//   choose_token       one block per row: the exact limits among the candidates, a few hundred as a rule, and the draw
// A sort (cub::DeviceSegmentedRadixSort) would read and write every logit and its id several times to order tokens of which all but a few
// are removed; counting reads each logit three times, most of them from the L2 cache, and writes the candidates.
// What is summed in several orders is summed in integers, where order does not matter; sums of f64 have one order. So the same logits,
// options and state give the same token on every run. It is the token of the host's Sampler, unless a sum lies within rounding of a limit.

#include <m2lm/backends/cuda/device.cuh>
#include <m2lm/backends/cuda/kernels.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::cuda {

// ---- policies and selectors ---------------------------------------------------------------------------------------------------------

struct SamplingPolicy {
  unsigned chunk_threads = 256;
  int logits_per_thread = 4;  ///< one access of 16 bytes
  unsigned choosing_threads = 512;
  unsigned choosing_threads_small = 128;  ///< for vocabularies up to small_vocabulary
  std::int64_t small_vocabulary = 8192;
  int listed = 2048;       ///< candidates that shared memory holds; more stay where the logits are
  int most_chunks = 2048;  ///< whose offsets shared memory holds
};
inline constexpr SamplingPolicy sampling_policy;
inline constexpr std::int64_t sampling_chunk = std::int64_t{sampling_policy.chunk_threads} * sampling_policy.logits_per_thread;

constexpr std::int64_t sampling_chunks(std::int64_t vocab) { return (vocab + sampling_chunk - 1) / sampling_chunk; }
constexpr unsigned choosing_threads(std::int64_t vocab) {
  return vocab <= sampling_policy.small_vocabulary ? sampling_policy.choosing_threads_small : sampling_policy.choosing_threads;
}

namespace detail {

/// Counts, and sums in fixed point. (The integer of 64 bits that CUDA has atomic additions for.)
using Measure = unsigned long long;

// ---- sums and positions over a block, each in one order ------------------------------------------------------------------------------

template <class T>
M2LM_DEVICE T warp_total(T x) {
  M2LM_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class T>
M2LM_DEVICE T block_total(T x) {
  M2LM_SHARED T of_warp[32];
  x = warp_total(x);
  if (lane_index() == 0) of_warp[warp_index()] = x;
  __syncthreads();
  x = of_warp[0];
  for (unsigned w = 1; w < blockDim.x / warp_size; ++w) x += of_warp[w];
  __syncthreads();  // of_warp may be written again
  return x;
}

M2LM_DEVICE Measure block_largest(Measure x) {
  M2LM_SHARED Measure of_warp[32];
  M2LM_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const Measure other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  if (lane_index() == 0) of_warp[warp_index()] = x;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / warp_size; ++w) x = of_warp[w] > x ? of_warp[w] : x;
  __syncthreads();
  return x;
}

/// The sum over this lane and those below it.
template <class T>
M2LM_DEVICE T warp_running_total(T x) {
  const int lane = static_cast<int>(lane_index());
  M2LM_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = shuffle(x, lane >= distance ? lane - distance : lane);
    if (lane >= distance) x += below;
  }
  return x;
}

/// The sum over the threads below this one; `total` is that over all.
M2LM_DEVICE std::int32_t block_sum_below(std::int32_t x, std::int32_t& total) {
  M2LM_SHARED std::int32_t of_warp[32];
  const std::int32_t running = warp_running_total(x);
  if (lane_index() == warp_size - 1) of_warp[warp_index()] = running;
  __syncthreads();
  std::int32_t below = running - x;
  total = 0;
  for (unsigned w = 0; w < blockDim.x / warp_size; ++w) {
    if (w < warp_index()) below += of_warp[w];
    total += of_warp[w];
  }
  __syncthreads();
  return below;
}

// ---- logits as integers --------------------------------------------------------------------------------------------------------------

/// Ascends as the logits descend. Equal for -0 and 0, as they compare.
M2LM_DEVICE std::uint32_t rank_of(float logit) {
  const std::uint32_t bits = logit == 0 ? 0 : bits_of_float(logit);
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000U);
}
M2LM_DEVICE float logit_of(std::uint32_t rank) { return float_of_bits((rank >> 31) != 0 ? rank : ~rank & 0x7fffffffU); }

/// A token that was found, such that the largest Measure is the largest logit, of equal ones that with the lowest id.
M2LM_DEVICE Measure found_token(float logit, std::int32_t id) { return Measure{~rank_of(logit)} << 32 | ~static_cast<std::uint32_t>(id); }
inline constexpr Measure unusable_token = ~Measure{0};  ///< NaN or +inf: larger than any found_token
M2LM_DEVICE float logit_of_token(Measure found) { return logit_of(~static_cast<std::uint32_t>(found >> 32)); }
M2LM_DEVICE std::int32_t id_of_token(Measure found) { return static_cast<std::int32_t>(~static_cast<std::uint32_t>(found)); }
/// Whether a token can be chosen where this is the largest one.
M2LM_DEVICE bool can_choose(Measure found) { return found != unusable_token && logit_of_token(found) != -INFINITY; }

/// How far a logit lies below the largest, in bins of 1/128 at the top that double in width with 1 + distance; the last one is open. It
/// never descends as the logit does, so that whole bins can be kept or removed. Neighbouring logits fall into different bins, which keeps
/// threads from adding to one place at the same time; the digits of the logits themselves would be nearly all the same.
inline constexpr int distance_bins = 1024;
M2LM_DEVICE int bin_of_distance(float distance) {
  const std::uint32_t bin = (bits_of_float(1.0F + distance) - bits_of_float(1.0F)) >> 16;
  return bin < distance_bins ? static_cast<int>(bin) : distance_bins - 1;
}
M2LM_DEVICE int bin_of(float largest, float logit) { return bin_of_distance(largest - logit); }

M2LM_DEVICE double weight_of(float largest, float logit) {
  return logit == -INFINITY ? 0 : exp(static_cast<double>(logit) - static_cast<double>(largest));
}
/// The probability rounded to f32, as the host has it, in units of 2^-62: exact down to 2^-39, and a sum of them is below 2^64.
M2LM_DEVICE Measure fixed_probability(double weight, double sum) {
  return static_cast<Measure>(static_cast<double>(static_cast<float>(weight / sum)) * 0x1.0p62);
}
M2LM_DEVICE float probability_of_fixed(Measure fixed) { return static_cast<float>(static_cast<double>(fixed) * 0x1.0p-62); }
/// A weight in units of 2^-41: those of 2^21 tokens stay below 2^64.
M2LM_DEVICE Measure fixed_weight(double weight) { return static_cast<Measure>(weight * 0x1.0p41); }

/// Of 64 random bits, as Rng::uniform: Philox4x32-10.
M2LM_DEVICE double uniform_of(std::uint64_t seed, std::uint64_t counter) {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c0, p1 = std::uint64_t{0xCD9E8D57U} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return static_cast<double>((std::uint64_t{c1} << 32 | c0) >> 11) * 0x1.0p-53;
}

// ---- what the kernels share ------------------------------------------------------------------------------------------------------------

struct Chunk {
  Measure largest;          ///< found_token
  Measure probability;      ///< Σ fixed_probability; where top-p limits alone
  double weight;            ///< Σ exp(logit - largest of the row)
  std::int32_t candidates;  ///< that lie at the chunk's beginning, of the logits and of `ids`
  std::int32_t unused;
};

/// Of one call. Everything but the logits lies in the scratch memory.
struct Sampling {
  float* logits;
  std::int64_t stride;
  std::int32_t vocab, chunks;
  bool whole_vectors;  ///< every chunk begins at a multiple of 16 bytes
  SamplerRow* rows;
  std::uint32_t* seen;
  std::int32_t* ids;
  Chunk* chunk;             ///< [rows, chunks]
  Measure* bins;            ///< [rows, distance_bins]
  double* weights;          ///< [rows]: Σ of the chunks' weights
  std::int32_t* candidate;  ///< [rows, vocab]: ids of the candidates of each chunk

  M2LM_DEVICE float* row_logits(unsigned row) const { return logits + row * stride; }
  M2LM_DEVICE Chunk* row_chunks(unsigned row) const { return chunk + std::size_t{row} * static_cast<unsigned>(chunks); }
  M2LM_DEVICE Measure* row_bins(unsigned row) const { return bins + std::size_t{row} * distance_bins; }
  M2LM_DEVICE std::int32_t* row_candidates(unsigned row) const { return candidate + std::size_t{row} * static_cast<unsigned>(vocab); }
  M2LM_DEVICE std::size_t seen_words() const { return (static_cast<std::size_t>(vocab) + 31) / 32; }
};

M2LM_DEVICE bool limits_top_k(const SamplerRow& row, std::int32_t vocab) { return row.top_k > 0 && row.top_k < vocab; }
M2LM_DEVICE bool limits_top_p(const SamplerRow& row) { return row.top_p < 1; }
M2LM_DEVICE bool limits(const SamplerRow& row, std::int32_t vocab) { return limits_top_k(row, vocab) || limits_top_p(row) || row.min_p > 0; }

/// The largest token of a row.
M2LM_DEVICE Measure largest_of(const Sampling& s, unsigned row) {
  const Chunk* chunks = s.row_chunks(row);
  Measure largest = 0;
  for (unsigned c = threadIdx.x; c < static_cast<unsigned>(s.chunks); c += blockDim.x)
    if (chunks[c].largest > largest) largest = chunks[c].largest;
  return block_largest(largest);
}

/// The logits of this thread of a chunk; -inf behind the last.
struct ThreadLogits {
  static constexpr int count = sampling_policy.logits_per_thread;
  std::int32_t first;
  float value[count];
  M2LM_DEVICE ThreadLogits(const Sampling& s, const float* row) : first(static_cast<std::int32_t>((blockIdx.x * blockDim.x + threadIdx.x) * count)) {
    if (s.whole_vectors && first + count <= s.vocab) {
      load_vector<count>(row + first, value);
    } else {
      M2LM_UNROLL
      for (int i = 0; i < count; ++i) value[i] = first + i < s.vocab ? row[first + i] : -INFINITY;
    }
  }
  M2LM_DEVICE void write(const Sampling& s, float* row) const {
    if (s.whole_vectors && first + count <= s.vocab) {
      store_vector<count>(row + first, value);
    } else {
      M2LM_UNROLL
      for (int i = 0; i < count; ++i)
        if (first + i < s.vocab) row[first + i] = value[i];
    }
  }
};

struct Bin {
  int index;
  Measure before;  ///< what lies in the bins before it, and before all of them
};

/// The first bin of `bins` [count] that holds something and behind which `goes_on(everything so far)` is false; else the last.
/// requires count a multiple of 32.
template <class GoesOn>
M2LM_DEVICE Bin find_bin(const Measure* bins, int count, Measure before, const GoesOn& goes_on) {
  M2LM_SHARED Bin found[1];
  if (warp_index() == 0) {
    const int lane = static_cast<int>(lane_index());
    bool searching = true;
    for (int begin = 0; searching && begin < count; begin += 32) {
      const Measure mine = bins[begin + lane], running = warp_running_total(mine);
      const std::uint32_t ends = ballot(mine != 0 && !goes_on(before + running));
      searching = ends == 0;
      const bool is_first = (ends >> lane & 1U) != 0 && (ends & ((1U << lane) - 1)) == 0;
      const bool is_last = searching && begin + 32 == count && lane == 31;
      if (is_first || is_last) found[0] = {begin + lane, before + running - mine};
      before += shuffle(running, 31);
    }
  }
  __syncthreads();
  const Bin result = found[0];
  __syncthreads();
  return result;
}

/// One array of a block, whichever function asks for it.
M2LM_DEVICE Measure* shared_bins() {
  M2LM_SHARED Measure bins[distance_bins];
  return bins;
}

// ---- chunks (kernels are templates so that they may stand in a header) -----------------------------------------------------------------

template <class S>
M2LM_KERNEL void scale_logits(S s) {
  const unsigned row = blockIdx.y;
  const SamplerRow options = s.rows[row];
  const bool greedy = options.temperature == 0, penalised = s.seen != nullptr && options.repetition_penalty != 1,
             tempered = !greedy && options.temperature != 1;
  ThreadLogits logits(s, s.row_logits(row));
  if (penalised && logits.first < s.vocab) {
    // The bits of a thread are in one word.
    const std::uint32_t seen = s.seen[row * s.seen_words() + static_cast<unsigned>(logits.first) / 32] >> (logits.first % 32);
    M2LM_UNROLL
    for (int i = 0; i < ThreadLogits::count; ++i) {
      float& x = logits.value[i];
      if ((seen >> i & 1U) != 0) x = x < 0 ? x * options.repetition_penalty : x / options.repetition_penalty;
    }
  }
  Measure largest = 0;
  M2LM_UNROLL
  for (int i = 0; i < ThreadLogits::count; ++i) {
    float& x = logits.value[i];
    if (tempered) x /= options.temperature;
    const Measure found = x < INFINITY ? found_token(x, logits.first + i) : unusable_token;
    largest = found > largest ? found : largest;
  }
  if (!greedy && (penalised || tempered)) logits.write(s, s.row_logits(row));
  largest = block_largest(largest);
  if (threadIdx.x == 0) s.row_chunks(row)[blockIdx.x].largest = largest;
  for (unsigned b = blockIdx.x * blockDim.x + threadIdx.x; b < distance_bins; b += gridDim.x * blockDim.x) s.row_bins(row)[b] = 0;
}

template <class S>
M2LM_KERNEL void weigh_logits(S s) {
  const unsigned row = blockIdx.y;
  const SamplerRow options = s.rows[row];
  if (options.temperature == 0) return;
  const Measure found = largest_of(s, row);
  if (!can_choose(found)) return;
  const float largest = logit_of_token(found);
  const ThreadLogits logits(s, s.row_logits(row));
  const bool counts = limits_top_k(options, s.vocab), weighs = limits_top_p(options) && !counts;
  Measure* bins = shared_bins();
  if (counts || weighs) {
    for (int b = static_cast<int>(threadIdx.x); b < distance_bins; b += static_cast<int>(blockDim.x)) bins[b] = 0;
    __syncthreads();
  }
  double sum = 0;
  M2LM_UNROLL
  for (int i = 0; i < ThreadLogits::count; ++i) {
    const double weight = weight_of(largest, logits.value[i]);
    sum += weight;
    if ((counts || weighs) && logits.first + i < s.vocab)
      atomic_add(&bins[bin_of(largest, logits.value[i])], counts ? Measure{1} : fixed_weight(weight));
  }
  sum = block_total(sum);
  if (threadIdx.x == 0) s.row_chunks(row)[blockIdx.x].weight = sum;
  if (counts || weighs)  // block_total has waited for all additions
    for (int b = static_cast<int>(threadIdx.x); b < distance_bins; b += static_cast<int>(blockDim.x))
      if (bins[b] != 0) atomic_add(&s.row_bins(row)[b], bins[b]);
}

/// The last bin of which something may be kept.
M2LM_DEVICE int last_bin(const Sampling& s, unsigned row, const SamplerRow& options) {
  const Measure* bins = s.row_bins(row);
  if (limits_top_k(options, s.vocab)) {
    const auto k = static_cast<Measure>(options.top_k);
    return find_bin(bins, distance_bins, 0, [&](Measure count) { return count < k; }).index;
  }
  if (limits_top_p(options)) {
    Measure total = 0;
    for (unsigned b = threadIdx.x; b < distance_bins; b += blockDim.x) total += bins[b];
    // More than the weights have lost in fixed point (2^21·2^-41) and probabilities and their sum when they were rounded to f32.
    constexpr double margin = 1e-5;
    const double enough = (options.top_p + margin) * static_cast<double>(block_total(total));
    return find_bin(bins, distance_bins, 0, [&](Measure weight) { return static_cast<double>(weight) < enough; }).index;
  }
  constexpr float margin = 1e-3F;  // more than the rounding of the distance and of three probabilities
  return bin_of_distance(margin - logf(options.min_p));
}

template <class S>
M2LM_KERNEL void select_candidates(S s) {
  const unsigned row = blockIdx.y;
  const SamplerRow options = s.rows[row];
  const bool limited = limits(options, s.vocab);
  if (options.temperature == 0 || !limited) return;
  const Measure found = largest_of(s, row);
  if (!can_choose(found)) return;
  const float largest = logit_of_token(found);
  Chunk* chunks = s.row_chunks(row);
  const int last = last_bin(s, row, options);

  double all_weights = 0;
  for (unsigned c = threadIdx.x; c < static_cast<unsigned>(s.chunks); c += blockDim.x) all_weights += chunks[c].weight;
  all_weights = block_total(all_weights);
  if (blockIdx.x == 0 && threadIdx.x == 0) s.weights[row] = all_weights;

  const ThreadLogits logits(s, s.row_logits(row));
  std::int32_t kept = 0;
  M2LM_UNROLL
  for (int i = 0; i < ThreadLogits::count; ++i) kept += logits.value[i] > -INFINITY && bin_of(largest, logits.value[i]) <= last ? 1 : 0;
  std::int32_t total = 0, at = block_sum_below(kept, total);  // all have read their logits
  float* row_logits = s.row_logits(row) + std::size_t{blockIdx.x} * sampling_chunk;
  std::int32_t* ids = s.row_candidates(row) + std::size_t{blockIdx.x} * sampling_chunk;
  M2LM_UNROLL
  for (int i = 0; i < ThreadLogits::count; ++i)
    if (logits.value[i] > -INFINITY && bin_of(largest, logits.value[i]) <= last) {
      row_logits[at] = logits.value[i];
      ids[at] = logits.first + i;
      ++at;
    }
  Measure probability = 0;
  if (limits_top_p(options) && !limits_top_k(options, s.vocab)) {
    M2LM_UNROLL
    for (int i = 0; i < ThreadLogits::count; ++i) probability += fixed_probability(weight_of(largest, logits.value[i]), all_weights);
    probability = block_total(probability);
  }
  if (threadIdx.x == 0) {
    chunks[blockIdx.x].candidates = total;
    chunks[blockIdx.x].probability = probability;
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------------------------------

/// Tokens of one row in the order of their ids. A removed one has the logit -inf.
struct Candidates {
  float* logits;
  std::int32_t* ids;
  int count;
  float largest;
  M2LM_DEVICE double weight(int i) const { return weight_of(largest, logits[i]); }
  /// f(i) for the candidates of this thread, which are apart from each other.
  template <class F>
  M2LM_DEVICE void visit(const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) f(i);
  }
  M2LM_DEVICE double total_weight() const {
    double sum = 0;
    visit([&](int i) { sum += weight(i); });
    return block_total(sum);
  }
};

/// The candidates of all chunks, one after another: in shared memory, or, if they are too many, moved forward where they are.
M2LM_DEVICE Candidates gather_candidates(const Sampling& s, unsigned row, float largest) {
  M2LM_SHARED std::int32_t begins[sampling_policy.most_chunks + 1];
  M2LM_SHARED float listed_logits[sampling_policy.listed];
  M2LM_SHARED std::int32_t listed_ids[sampling_policy.listed];
  const Chunk* chunks = s.row_chunks(row);
  std::int32_t count = 0;
  for (int batch = 0; batch < s.chunks; batch += static_cast<int>(blockDim.x)) {
    const int c = batch + static_cast<int>(threadIdx.x);
    std::int32_t total = 0;
    const std::int32_t below = block_sum_below(c < s.chunks ? chunks[c].candidates : 0, total);
    if (c < s.chunks) begins[c] = count + below;
    count += total;
  }
  if (threadIdx.x == 0) begins[s.chunks] = count;
  __syncthreads();
  float* logits = s.row_logits(row);
  std::int32_t* ids = s.row_candidates(row);
  if (count <= sampling_policy.listed) {
    const Candidates list{listed_logits, listed_ids, count, largest};
    list.visit([&](int i) {
      int low = 0, high = s.chunks;  // begins[low] <= i < begins[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (begins[middle] <= i ? low : high) = middle;
      }
      const std::int64_t from = low * sampling_chunk + i - begins[low];
      listed_logits[i] = logits[from];
      listed_ids[i] = ids[from];
    });
    __syncthreads();
    return list;
  }
  for (int c = 0; c < s.chunks; ++c) {
    const std::int32_t here = begins[c + 1] - begins[c];
    // Never moved back, so that nothing is overwritten which a later round reads.
    for (std::int32_t round = 0; round < here; round += static_cast<std::int32_t>(blockDim.x)) {
      const std::int32_t i = round + static_cast<std::int32_t>(threadIdx.x);
      const std::int64_t from = c * sampling_chunk + i;
      const float logit = i < here ? logits[from] : 0;
      const std::int32_t id = i < here ? ids[from] : 0;
      __syncthreads();
      if (i < here) {
        logits[begins[c] + i] = logit;
        ids[begins[c] + i] = id;
      }
    }
  }
  __syncthreads();
  return {logits, ids, count, largest};
}

/// Where an order by descending logit ends: within the tokens of this rank.
struct Cut {
  std::uint32_t rank;
  Measure before;  ///< of all tokens above
};

/// The first rank behind which goes_on(Σ measure so far) is false. First the bin, then, among the few tokens in it, the digits of the rank.
template <class MeasureOf, class GoesOn>
M2LM_DEVICE Cut find_cut(const Candidates& list, const MeasureOf& measure, const GoesOn& goes_on) {
  Measure* bins = shared_bins();
  const auto count_bins = [&](int count, const auto& bin_of_logit) {  // of the logits for which it is not negative
    for (int b = static_cast<int>(threadIdx.x); b < count; b += static_cast<int>(blockDim.x)) bins[b] = 0;
    __syncthreads();
    list.visit([&](int i) {
      const float logit = list.logits[i];
      if (logit == -INFINITY) return;
      const int bin = bin_of_logit(logit);
      if (bin >= 0) atomic_add(&bins[bin], measure(logit));
    });
    __syncthreads();
  };
  count_bins(distance_bins, [&](float logit) { return bin_of(list.largest, logit); });
  Bin bin = find_bin(bins, distance_bins, 0, goes_on);
  const int distance = bin.index;
  std::uint32_t rank = 0;
  for (int digit = 0; digit < 4; ++digit) {  // of 8 bits, from the highest
    const int shift = 24 - 8 * digit;
    count_bins(256, [&](float logit) {
      const std::uint32_t r = rank_of(logit);
      const bool same_so_far = digit == 0 || (r ^ rank) >> (shift + 8) == 0;
      return same_so_far && bin_of(list.largest, logit) == distance ? static_cast<int>(r >> shift & 255U) : -1;
    });
    bin = find_bin(bins, 256, bin.before, goes_on);
    rank |= static_cast<std::uint32_t>(bin.index) << shift;
  }
  return {rank, bin.before};
}

/// All tokens equal to the k-th stay.
M2LM_DEVICE void keep_top_k(const Candidates& list, std::int32_t k) {
  if (list.count <= k) return;
  const Cut cut = find_cut(
      list, [](float) { return Measure{1}; }, [&](Measure count) { return count < static_cast<Measure>(k); });
  list.visit([&](int i) {
    if (rank_of(list.logits[i]) > cut.rank) list.logits[i] = -INFINITY;
  });
  __syncthreads();
}

/// Tokens stay while the probability of those not above them, rounded to f32, exceeds `limit`; the first always does. Of equal logits the
/// higher id is above. `sum` is that of all weights, `everything` that of all probabilities.
M2LM_DEVICE void keep_top_p(const Candidates& list, float limit, double sum, Measure everything) {
  const auto measure = [&](float logit) { return fixed_probability(weight_of(list.largest, logit), sum); };
  const auto goes_on = [&](Measure above) { return above < everything && probability_of_fixed(everything - above) > limit; };
  const Cut cut = find_cut(list, measure, goes_on);
  std::int32_t equal = 0;
  list.visit([&](int i) { equal += rank_of(list.logits[i]) == cut.rank ? 1 : 0; });
  equal = block_total(equal);
  // How many of the equal ones stay: at least one, and so many that the last has a rest above the limit.
  const Measure each = measure(logit_of(cut.rank));
  std::int32_t kept = 1, beyond = equal + 1;
  while (beyond - kept > 1) {
    const std::int32_t middle = kept + (beyond - kept) / 2;
    (goes_on(cut.before + static_cast<Measure>(middle - 1) * each) ? kept : beyond) = middle;
  }
  // Consecutive candidates for a thread, so that the equal ones can be counted in the order of their ids.
  const int threads = static_cast<int>(blockDim.x), share = (list.count + threads - 1) / threads;
  const int begin = share * static_cast<int>(threadIdx.x), end = begin + share < list.count ? begin + share : list.count;
  std::int32_t mine = 0, total = 0;
  for (int i = begin; i < end; ++i) mine += rank_of(list.logits[i]) == cut.rank ? 1 : 0;
  std::int32_t place = block_sum_below(mine, total);
  for (int i = begin; i < end; ++i) {
    const std::uint32_t rank = rank_of(list.logits[i]);
    if (rank > cut.rank || (rank == cut.rank && place++ < equal - kept)) list.logits[i] = -INFINITY;
  }
  __syncthreads();
}

M2LM_DEVICE void keep_min_p(const Candidates& list, float min_p, double sum) {
  const float limit = min_p * static_cast<float>(1 / sum);
  list.visit([&](int i) {
    if (static_cast<float>(list.weight(i) / sum) < limit) list.logits[i] = -INFINITY;
  });
  __syncthreads();
}

/// The sums of consecutive weights, in shared memory: of each thread's share, and of each warp's.
struct RunningWeights {
  double* of_thread;
  double* of_warp;
  int share;
  double total;
};
M2LM_DEVICE RunningWeights shared_running_weights() {
  M2LM_SHARED double of_thread[sampling_policy.choosing_threads];
  M2LM_SHARED double of_warp[32];
  return {of_thread, of_warp, 0, 0};
}

template <class Weight>
M2LM_DEVICE RunningWeights add_weights(int count, const Weight& weight) {
  RunningWeights sums = shared_running_weights();
  const int threads = static_cast<int>(blockDim.x);
  sums.share = (count + threads - 1) / threads;
  const int begin = sums.share * static_cast<int>(threadIdx.x), end = begin + sums.share < count ? begin + sums.share : count;
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += weight(i);
  sums.of_thread[threadIdx.x] = sum;
  sum = warp_total(sum);
  if (lane_index() == 0) sums.of_warp[warp_index()] = sum;
  __syncthreads();
  for (int w = 0; w < threads / 32; ++w) sums.total += sums.of_warp[w];
  return sums;
}

/// The first of [begin, end) behind which the running sum, from `before`, exceeds the target; if rounding leaves none, the last that
/// weighs something. `before` becomes the sum up to it.
template <class Weight>
M2LM_DEVICE int first_beyond(int begin, int end, double target, double& before, const Weight& weight) {
  int found = begin;
  double running = before;
  for (int i = begin; i < end; ++i) {
    const double w = weight(i);
    if (w == 0) continue;
    found = i;
    before = running;
    running += w;
    if (running > target) break;
  }
  return found;
}

/// The one of `count` weights that the target falls on. All threads walk the same way: over warps, threads, and one thread's share.
template <class Weight>
M2LM_DEVICE int find_weight(const RunningWeights& sums, int count, double target, double& before, const Weight& weight) {
  const int warp = first_beyond(0, static_cast<int>(blockDim.x / warp_size), target, before, [&](int w) { return sums.of_warp[w]; });
  const int thread = first_beyond(warp * 32, warp * 32 + 32, target, before, [&](int t) { return sums.of_thread[t]; });
  const int begin = thread * sums.share, end = begin + sums.share < count ? begin + sums.share : count;
  const int found = first_beyond(begin, end, target, before, weight);
  __syncthreads();  // the sums may be written again
  return found;
}

/// A draw without limits: the chunk, then the token in it.
M2LM_DEVICE std::int32_t draw_from_chunks(const Sampling& s, unsigned row, float largest, double uniform) {
  const Chunk* chunks = s.row_chunks(row);
  double before = 0;
  const auto chunk_weight = [&](int c) { return chunks[c].weight; };
  const RunningWeights of_chunks = add_weights(s.chunks, chunk_weight);
  const double target = uniform * of_chunks.total;
  const int chunk = find_weight(of_chunks, s.chunks, target, before, chunk_weight);
  const std::int64_t first = chunk * sampling_chunk;
  const int count = static_cast<int>(first + sampling_chunk < s.vocab ? sampling_chunk : s.vocab - first);
  const float* logits = s.row_logits(row) + first;
  const auto weight = [&](int i) { return weight_of(largest, logits[i]); };
  return static_cast<std::int32_t>(first) + find_weight(add_weights(count, weight), count, target, before, weight);
}

M2LM_DEVICE std::int32_t draw_from_candidates(const Sampling& s, unsigned row, const SamplerRow& options, float largest, double uniform) {
  const Candidates list = gather_candidates(s, row, largest);
  const bool top_k = limits_top_k(options, s.vocab), top_p = limits_top_p(options);
  double sum = s.weights[row];
  if (top_k) {
    keep_top_k(list, options.top_k);
    sum = list.total_weight();
  }
  if (top_p) {
    Measure everything = 0;
    if (top_k) {
      list.visit([&](int i) { everything += fixed_probability(list.weight(i), sum); });
    } else {
      for (unsigned c = threadIdx.x; c < static_cast<unsigned>(s.chunks); c += blockDim.x) everything += s.row_chunks(row)[c].probability;
    }
    keep_top_p(list, static_cast<float>(1 - options.top_p), sum, block_total(everything));
    sum = list.total_weight();
  }
  if (options.min_p > 0) keep_min_p(list, options.min_p, sum);
  double before = 0;
  const auto weight = [&](int i) { return list.weight(i); };
  const RunningWeights sums = add_weights(list.count, weight);
  return list.ids[find_weight(sums, list.count, uniform * sums.total, before, weight)];
}

template <class S>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(sampling_policy.choosing_threads, 1) void choose_token(S s) {
  const unsigned row = blockIdx.x;
  const SamplerRow options = s.rows[row];
  const Measure found = largest_of(s, row);
  if (options.failed != 0 || !can_choose(found)) {
    if (threadIdx.x == 0) {
      s.rows[row].failed = 1;
      s.ids[row] = -1;
    }
    return;
  }
  std::int32_t id = id_of_token(found);
  if (options.temperature != 0) {
    const double uniform = uniform_of(options.seed, options.counter);
    const float largest = logit_of_token(found);
    id = limits(options, s.vocab) ? draw_from_candidates(s, row, options, largest, uniform) : draw_from_chunks(s, row, largest, uniform);
  }
  if (threadIdx.x != 0) return;
  s.ids[row] = id;
  if (options.temperature != 0) s.rows[row].counter = options.counter + 1;
  if (s.seen != nullptr) s.seen[row * s.seen_words() + static_cast<unsigned>(id) / 32] |= 1U << (id % 32);
}

/// What `sample` puts into its scratch memory, from the strictest alignment to the loosest.
struct SamplingScratch {
  std::size_t chunk = 0, bins = 0, weights = 0, candidates = 0, bytes = 0;
  constexpr SamplingScratch(std::int64_t rows, std::int64_t vocab) {
    const auto count = static_cast<std::size_t>(rows);
    bins = chunk + count * static_cast<std::size_t>(sampling_chunks(vocab)) * sizeof(Chunk);
    weights = bins + count * distance_bins * sizeof(Measure);
    candidates = weights + count * sizeof(double);
    bytes = candidates + count * static_cast<std::size_t>(vocab) * sizeof(std::int32_t);
  }
};

}  // namespace detail

// ---- what the host calls ---------------------------------------------------------------------------------------------------------------

inline std::size_t sample_scratch(std::int64_t rows, std::int64_t vocab) { return detail::SamplingScratch(rows, vocab).bytes; }

inline void sample(Device& device, Matrix<float> logits, SamplerRow* rows, std::uint32_t* seen, std::int32_t* ids, void* scratch, bool greedy) {
  const std::int64_t count = logits.extent(0), vocab = logits.extent(1), chunks = sampling_chunks(vocab);
  if (count == 0) return;
  require(vocab > 0, "m2lm::cuda::sample: there are no logits to choose from: ", logits.shape());
  require<CapacityError>(chunks <= sampling_policy.most_chunks && count <= 65535, "m2lm::cuda::sample: logits ", logits.shape(), "; at most [65535, ",
                         sampling_policy.most_chunks * sampling_chunk, "] can be sampled on a device");
  const detail::SamplingScratch layout(count, vocab);
  auto* memory = static_cast<std::byte*>(scratch);
  const detail::Sampling s{.logits = logits.data(),
                           .stride = logits.stride(0),
                           .vocab = static_cast<std::int32_t>(vocab),
                           .chunks = static_cast<std::int32_t>(chunks),
                           .whole_vectors = reinterpret_cast<std::uintptr_t>(logits.data()) % 16 == 0 && (count == 1 || logits.stride(0) % 4 == 0),
                           .rows = rows,
                           .seen = seen,
                           .ids = ids,
                           .chunk = reinterpret_cast<detail::Chunk*>(memory + layout.chunk),
                           .bins = reinterpret_cast<detail::Measure*>(memory + layout.bins),
                           .weights = reinterpret_cast<double*>(memory + layout.weights),
                           .candidate = reinterpret_cast<std::int32_t*>(memory + layout.candidates)};
  const LaunchShape wide{.grid_x = static_cast<unsigned>(chunks), .grid_y = static_cast<unsigned>(count), .block_x = sampling_policy.chunk_threads};
  launch(device, "scale_logits", detail::scale_logits<detail::Sampling>, wide, s);
  if (!greedy) {
    launch(device, "weigh_logits", detail::weigh_logits<detail::Sampling>, wide, s);
    launch(device, "select_candidates", detail::select_candidates<detail::Sampling>, wide, s);
  }
  launch(device, "choose_token", detail::choose_token<detail::Sampling>,
         LaunchShape{.grid_x = static_cast<unsigned>(count), .block_x = choosing_threads(vocab)}, s);
}

}  // namespace m2lm::cuda
