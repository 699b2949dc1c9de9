// Attention on a device against Reference<double>.
//
// The bound on an output, with u = 2^-24 and u_E = 2^-8 (bf16), 2^-11 (f16) or 2^-24 (f32), head_dim d, K keys. q, k and v are rounded to
// E before both computations, so they are exact in both.
//   s_j = scale·q·k_j   |δs_j| ≤ (2d + 8)·u·scale·Σ|q|·|k_j| =: at most S over the keys that the query sees (q may be scaled first; the
//                       scale has log2 e in it, which is rounded too)
//   p_j = 2^(s_j - m)   e^(δs_j); |s_j - m|·u ≤ 2·max|s|·u from the subtraction, 8u from ex2.approx, 3 roundings for each time the
//                       running maximum changes (tiles of 16 keys or more, splits): P = S + (2·max|s| + 8 + 3·(K/16 + 2))·u
//   y = Σ p·v / Σ p     numerator and denominator each carry e^P and K additions; p is rounded to E for tensor cores: u_E
//                       |δy| ≤ (e^(2P)·(1 + (3K + 8)·u + u_E) - 1)·Y, Y = Σ p·|v| / Σ p, which the oracle gives for |v|
//   and y itself is rounded: (1 + u_E)·|δy| + u_E·|y|. In f16 a probability below 2^-14 loses 2^-25 at most (the largest is 1 when it is
//   rounded), as does y; 2^-100 is for keys whose probability underflows.
#include <cuda/device_support.hpp>

#include <m2lm/backends/cuda/kernels/attention.cuh>
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/core/tensor.hpp>

#include <algorithm>

namespace {

using namespace m2lm_test;

constexpr double u32 = 0x1.0p-24;

template <std::size_t N>
std::int64_t one_of(Random& random, const std::int64_t (&values)[N]) {
  return values[random.integer(0, static_cast<std::int64_t>(N) - 1)];
}

struct Problem {
  std::int64_t tokens = 1, kv_heads = 1, group = 1, head_dim = 64, first = 0;
  std::int64_t keys_seen = 0;                                      ///< of a mask without order
  std::int64_t most_keys = 0;                                      ///< 0: what there are
  std::int64_t extra_capacity = 0, extra_columns = 0, offset = 0;  ///< of the rows of q and y, in elements
  AttentionMask mask{.causal = true, .window = 0};
  Sinks sinks{};
  bool position_on_device = false;
  cuda::PrefillKernel prefill = cuda::default_prefill_kernel;

  bool ordered() const { return mask.causal || mask.window > 0; }
  std::int64_t heads() const { return kv_heads * group; }
  std::int64_t keys() const { return ordered() ? first + tokens : keys_seen; }
  std::int64_t bucket() const { return most_keys != 0 ? most_keys : keys(); }
  std::int64_t capacity() const { return std::max(bucket(), keys()) + extra_capacity; }
  double sign = 1;  ///< of the scale

  double scale() const { return sign / std::sqrt(static_cast<double>(head_dim)); }
  std::string string() const {
    return concat("tokens=", tokens, " kv_heads=", kv_heads, " group=", group, " head_dim=", head_dim, " keys=", keys(), " first=", first,
                  " bucket=", bucket(), " capacity=", capacity(), " extra=", extra_columns, " offset=", offset, " causal=", mask.causal,
                  " window=", mask.window, sinks.zero_logit ? " with a sink" : "", position_on_device ? " position on the device" : "");
  }
};

template <class E>
struct Data {
  std::vector<E> q, k, v;  ///< [tokens, heads·d], [kv_heads, keys, d]
  Data(const Problem& p, std::uint64_t seed) {
    Random random(seed);
    q = random.elements<E>(p.tokens * p.heads() * p.head_dim, 1.5F);
    k = random.elements<E>(p.kv_heads * p.keys() * p.head_dim);
    v = random.elements<E>(p.kv_heads * p.keys() * p.head_dim);
  }
};

/// The oldest key that any query sees.
std::int64_t oldest_key(const Problem& p) { return p.mask.window > 0 ? std::max<std::int64_t>(0, p.first - p.mask.window + 1) : 0; }

/// y on the device. The cache holds NaN bytes wherever no query looks.
template <class E>
std::vector<E> attend(cuda::Device& device, const Problem& p, const Data<E>& data) {
  const std::int64_t d = p.head_dim, columns = p.heads() * d;
  const auto cache = [&](const std::vector<E>& rows) {
    std::vector<E> out(static_cast<std::size_t>(p.kv_heads * p.capacity() * d));
    std::memset(static_cast<void*>(out.data()), 0xFF, out.size() * sizeof(E));
    for (std::int64_t h = 0; h < p.kv_heads; ++h)
      for (std::int64_t j = oldest_key(p); j < p.keys(); ++j)
        std::copy_n(rows.begin() + (h * p.keys() + j) * d, d, out.begin() + (h * p.capacity() + j) * d);
    return out;
  };
  const DeviceArray<E> keys(device, cache(data.k)), values(device, cache(data.v));
  const DeviceMatrix<E> q(device, p.tokens, columns, data.q, p.extra_columns, p.offset), y(device, p.tokens, columns, p.extra_columns, p.offset);
  const KeyValues kv{
      dtype_of<E>, p.kv_heads, d, p.capacity(), reinterpret_cast<std::byte*>(keys.data()), reinterpret_cast<std::byte*>(values.data())};
  const DeviceArray<std::int32_t> length(device, std::vector<std::int32_t>{static_cast<std::int32_t>(p.first)});
  const cuda::Position position{
      .length = p.position_on_device ? length.data() : nullptr, .first = p.position_on_device ? -1 : p.first, .most_keys = p.bucket()};
  const DeviceArray<std::byte> scratch(device, cuda::attention_scratch<E>(device.properties(), p.tokens, p.heads(), kv, p.bucket()));
  cuda::attention<E>(device, q.const_view(), kv, position, p.mask, static_cast<float>(p.scale()), y.view(), p.sinks, scratch.data(), p.prefill);
  return y.read();
}

template <class E>
void check(cuda::Device& device, const Problem& p, std::uint64_t seed) {
  const Data<E> data(p, seed);
  const std::vector<E> y = attend(device, p, data);

  const auto tensor = [](const std::vector<E>& from, Shape shape) {
    Tensor<double> out(shape);
    for (std::size_t i = 0; i < from.size(); ++i) out.data()[i] = static_cast<double>(to_float(from[i]));
    return out;
  };
  const std::int64_t d = p.head_dim, columns = p.heads() * d;
  const Tensor<double> q = tensor(data.q, {p.tokens, columns}), k = tensor(data.k, {p.kv_heads, p.keys(), d}),
                       v = tensor(data.v, {p.kv_heads, p.keys(), d});
  Tensor<double> magnitude = v.clone();
  double largest_value = 0;
  for (double& x : magnitude.span()) largest_value = std::max(largest_value, x = std::abs(x));
  Tensor<double> expected(q.shape()), bound(q.shape());
  Reference<double> reference;
  Arena arena;
  Context<Reference<double>> ctx{reference, arena};
  const auto run = [&](const Tensor<double>& values, Tensor<double>& out) {
    const KeyValues kv{DType::native,
                       p.kv_heads,
                       d,
                       p.keys(),
                       const_cast<std::byte*>(reinterpret_cast<const std::byte*>(k.data())),
                       const_cast<std::byte*>(reinterpret_cast<const std::byte*>(values.data()))};
    ops::attention<Reference<double>>(ctx, q.view<2>(), kv, p.keys(), p.first, p.mask, static_cast<float>(p.scale()), out.view<2>(), p.sinks);
  };
  run(v, expected);
  run(magnitude, bound);

  Worst worst;
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads(); ++h) {
      double largest_sum = 0, largest_score = 0;
      const m2lm::detail::KeyRange seen = m2lm::detail::visible_keys(p.mask, p.first + t, p.keys());
      for (std::int64_t j = seen.begin; j < seen.end; ++j) {
        double sum = 0, score = 0;
        for (std::int64_t c = 0; c < d; ++c) {
          const double term = q.data()[t * columns + h * d + c] * k.data()[((h / p.group) * p.keys() + j) * d + c];
          sum += std::abs(term);
          score += term;
        }
        largest_sum = std::max(largest_sum, std::abs(p.scale()) * sum);
        largest_score = std::max(largest_score, std::abs(p.scale() * score));
      }
      const auto keys = static_cast<double>(p.keys());
      const double each = (2 * static_cast<double>(d) + 8) * u32 * largest_sum + (2 * largest_score + 8 + 3 * (keys / 16 + 2)) * u32;
      const double relative = std::exp(2 * each) * (1 + (3 * keys + 8) * u32 + roundoff<E>)-1;
      const double absolute = std::is_same_v<E, Half> ? 0x1.0p-25 * (1 + keys * largest_value) : 0;
      for (std::int64_t c = 0; c < d; ++c) {
        const auto at = t * columns + h * d + c;
        const double want = expected.data()[at], got = static_cast<double>(to_float(y[static_cast<std::size_t>(at)]));
        const double allowed = (1 + roundoff<E>)*(relative * bound.data()[at] + absolute) + roundoff<E> * std::abs(want) + 0x1.0p-100;
        worst.add(got, want, allowed, at);
      }
    }
  CHECK_MESSAGE(worst.passed(), dtype_name(dtype_of<E>), " ", p.string(), " at ", worst.where());
}

void check_all(cuda::Device& device, const Problem& p, std::uint64_t seed) {
  check<float>(device, p, seed);
  check<Half>(device, p, seed);
  check<Bf16>(device, p, seed);
}

#if defined(__SANITIZE_ADDRESS__)
constexpr int trials = 15;
#else
constexpr int trials = 100;
#endif

std::int64_t bucket_of(Random& random, std::int64_t keys) {
  if (random.coin()) return keys;
  std::int64_t bucket = 32;
  while (bucket < keys) bucket *= 2;
  return bucket << random.integer(0, 1);
}

Problem random_problem(Random& random, bool few) {
  static constexpr std::int64_t dims[] = {6, 16, 40, 64, 72, 80, 96, 128}, groups[] = {1, 2, 4, 8};
  Problem p;
  p.head_dim = one_of(random, dims);
  p.group = one_of(random, groups);
  p.kv_heads = random.integer(1, 2);
  p.tokens = few ? random.integer(1, 3) : random.integer(4, 70);
  if (!few && p.tokens * p.group > 70) p.kv_heads = 1, p.tokens = 1 + p.tokens / 4;
  const std::int64_t mask = random.integer(0, 3);
  p.mask.causal = mask == 1 || mask == 2;
  if (mask >= 2) p.mask.window = random.coin() ? random.integer(1, 20) : random.integer(20, 200);
  p.first = random.coin() ? 0 : random.integer(1, few ? 299 : 130);
  if (!p.ordered()) p.first = 0, p.keys_seen = random.integer(1, few ? 299 : 130);
  p.most_keys = p.ordered() ? bucket_of(random, p.keys()) : 0;
  p.extra_capacity = random.coin() ? random.integer(1, 70) : 0;
  static constexpr std::int64_t extras[] = {0, 0, 8, 16, 5};
  p.extra_columns = one_of(random, extras);
  if (random.integer(0, 5) == 0) p.offset = 1;
  p.sinks.zero_logit = random.integer(0, 2) == 0;
  p.position_on_device = random.coin();
  return p;
}

TEST_CASE("attention: few queries, random shapes") {
  cuda::Device device(0);
  Random random(501);
  for (int trial = 0; trial < 2 * trials; ++trial) check_all(device, random_problem(random, true), 5000 + static_cast<std::uint64_t>(trial));
}

TEST_CASE("attention: many queries, random shapes") {
  cuda::Device device(0);
  Random random(502);
  for (int trial = 0; trial < trials; ++trial) {
    const Problem p = random_problem(random, false);
    const auto seed = 6000 + static_cast<std::uint64_t>(trial);
    if (trial % 6 == 0) check<float>(device, p, seed);
    trial % 2 == 0 ? check<Half>(device, p, seed) : check<Bf16>(device, p, seed);
  }
}

TEST_CASE("attention: chosen shapes") {
  cuda::Device device(0);
  SUBCASE("no query") { check_all(device, {.tokens = 0, .head_dim = 16, .first = 5}, 1); }
  SUBCASE("one key, which is the query's own") { check_all(device, {.tokens = 1, .kv_heads = 2, .head_dim = 64}, 2); }
  SUBCASE("only the sink") {
    check_all(
        device,
        {.tokens = 2, .group = 2, .head_dim = 64, .keys_seen = 0, .most_keys = 0, .extra_capacity = 8, .mask = {}, .sinks = {.zero_logit = true}}, 3);
  }
  SUBCASE("only the sink, many queries") {
    check_all(device, {.tokens = 20, .head_dim = 64, .keys_seen = 0, .most_keys = 0, .extra_capacity = 8, .mask = {}, .sinks = {.zero_logit = true}},
              4);
  }
  SUBCASE("a window of one key") { check_all(device, {.tokens = 40, .head_dim = 16, .first = 150, .mask = {.causal = true, .window = 1}}, 5); }
  SUBCASE("a window of one key, tensor cores") {
    check<Bf16>(device, {.tokens = 40, .head_dim = 64, .first = 150, .mask = {.causal = true, .window = 1}}, 6);
  }
  SUBCASE("rows whose first tiles are hidden") {
    check<Half>(device, {.tokens = 130, .head_dim = 64, .first = 7, .mask = {.causal = false, .window = 5}}, 7);
  }
  SUBCASE("several tiles of rows, a group that does not divide them") {
    check<Bf16>(device, {.tokens = 45, .group = 3, .head_dim = 64, .first = 20}, 8);
  }
  SUBCASE("a scale below 0, many queries") { check<Bf16>(device, {.tokens = 12, .head_dim = 64, .first = 30, .sign = -1}, 13); }
  SUBCASE("the largest head") { check<float>(device, {.tokens = 2, .head_dim = 512, .first = 30}, 9); }
  SUBCASE("a head of no whole piece, many queries") { check<Bf16>(device, {.tokens = 12, .group = 2, .head_dim = 70, .first = 30}, 10); }
  SUBCASE("many queries, keys are split") {
    check<Bf16>(device, {.tokens = 3, .group = 4, .head_dim = 64, .first = 290, .most_keys = 1024, .position_on_device = true}, 11);
  }
  SUBCASE("many queries, keys are split, with a sink and a window") {
    check<Half>(device,
                {.tokens = 3,
                 .group = 4,
                 .head_dim = 72,
                 .first = 290,
                 .most_keys = 2048,
                 .mask = {.causal = true, .window = 270},
                 .sinks = {.zero_logit = true}},
                12);
  }
}

TEST_CASE("attention: a NaN among keys and values shows where they are seen, and nowhere else") {
  cuda::Device device(0);
  // Rows of different tokens share a block of the kernel on FMA units; key 4 and later are hidden from the first tokens.
  const Problem p{.tokens = 6, .head_dim = 64};
  for (const bool in_keys : {false, true}) {
    Data<Bf16> data(p, 31);
    std::vector<Bf16>& poisoned = in_keys ? data.k : data.v;
    for (std::int64_t c = 0; c < p.head_dim; ++c)
      poisoned[static_cast<std::size_t>(4 * p.head_dim + c)] = to_bf16(std::numeric_limits<float>::quiet_NaN());
    const std::vector<Bf16> y = attend(device, p, data);
    for (std::int64_t t = 0; t < p.tokens; ++t)
      for (std::int64_t c = 0; c < p.head_dim; ++c) CHECK(std::isnan(to_float(y[static_cast<std::size_t>(t * p.head_dim + c)])) == (t >= 4));
  }
}

TEST_CASE("attention: one recorded step serves every length of its bucket") {
  cuda::Device device(0);
  const std::int64_t bucket = 600, d = 64, heads = 4, kv_heads = 2, capacity = 640;
  Random random(77);
  const auto elements = [&](std::int64_t count) { return random.elements<Bf16>(count); };
  const DeviceArray<Bf16> k(device, elements(kv_heads * capacity * d)), v(device, elements(kv_heads * capacity * d));
  const DeviceMatrix<Bf16> q(device, 1, heads * d, elements(heads * d)), y(device, 1, heads * d), plain(device, 1, heads * d);
  const KeyValues kv{DType::bf16, kv_heads, d, capacity, reinterpret_cast<std::byte*>(k.data()), reinterpret_cast<std::byte*>(v.data())};
  DeviceArray<std::int32_t> length(device, 1);
  const DeviceArray<std::byte> scratch(device, cuda::attention_scratch<Bf16>(device.properties(), 1, heads, kv, bucket));
  const auto run = [&](cuda::Position position, const DeviceMatrix<Bf16>& to) {
    cuda::attention<Bf16>(device, q.const_view(), kv, position, {.causal = true, .window = 0}, 0.125F, to.view(), {}, scratch.data());
  };
  int bodies = 0;
  for (const std::int32_t first : {0, 63, 64, 127, 128, 300, 599}) {
    length.write({first});
    cuda::ReplayKey key;
    key.words[0] = 1;
    bodies += device.replay(key, [&] { run({.length = length.data(), .first = 0, .most_keys = bucket}, y); });
    run({.length = nullptr, .first = first, .most_keys = bucket}, plain);
    CHECK_MESSAGE(same_bits(y.read(), plain.read()), "after ", first, " keys");
  }
  CHECK(bodies == 2);
}

TEST_CASE("attention: launches fit the devices, whatever the sizes") {
  struct Target {
    int multiprocessors;
    std::size_t shared;  // opt-in, per block
  };
  constexpr Target targets[] = {{108, 163 * 1024}, {84, 99 * 1024}, {132, 227 * 1024}, {148, 227 * 1024}};
  Random random(9);
  for (const Target& target : targets)
    for (int trial = 0; trial < 2000; ++trial) {
      static constexpr std::int64_t dims[] = {1, 6, 16, 32, 40, 64, 72, 80, 88, 96, 100, 112, 128, 160, 192, 256, 512},
                                    groups[] = {1, 2, 3, 4, 7, 8, 16};
      cuda::AttentionSizes sizes;
      sizes.head_dim = one_of(random, dims);
      sizes.kv_heads = random.integer(1, 40);
      sizes.heads = sizes.kv_heads * one_of(random, groups);
      sizes.tokens = random.coin() ? random.integer(1, 9) : random.integer(1, 5000);
      sizes.most_keys = random.coin() ? random.integer(0, 300) : random.integer(0, 131072);
      sizes.window = random.coin() ? 0 : random.integer(1, 5000);
      sizes.element_bytes = random.coin() ? 2 : 4;
      sizes.vectors = random.coin() && sizes.head_dim % 8 == 0;
      const cuda::AttentionPlan plan = cuda::plan_attention(target.multiprocessors, target.shared, sizes);
      const std::string text = concat("head_dim ", sizes.head_dim, ", tokens ", sizes.tokens, ", keys ", sizes.most_keys, ", window ", sizes.window);
      // Beside its dynamic shared memory the kernel on FMA units has some of a known size.
      const std::size_t of_known_size = plan.tiles_head_dim != 0 ? 0 : static_cast<std::size_t>(plan.rows) * (4 + 4 + 4 * 4);
      CHECK_MESSAGE(plan.shared_bytes + of_known_size <= target.shared, text);
      CHECK_MESSAGE(plan.row_tiles * plan.rows >= sizes.rows(), text);
      CHECK_MESSAGE((plan.row_tiles - 1) * plan.rows < sizes.rows(), text);
      CHECK_MESSAGE(plan.keys_per_split % plan.key_tile == 0, text);
      // The keys that the rows of a block can see, from the beginning of a tile on.
      const std::int64_t seen = sizes.window > 0
                                    ? std::min(sizes.most_keys, sizes.window - 1 + (plan.rows - 1) / sizes.group() + 1 + 1 + plan.key_tile - 1)
                                    : sizes.most_keys;
      CHECK_MESSAGE(plan.splits * plan.keys_per_split >= seen, text);
      CHECK_MESSAGE(plan.splits <= plan.most_splits, text);
      CHECK_MESSAGE(plan.splits <= 65535, text);
      sizes.window = 0;
      const std::int64_t floats = cuda::attention_partial_floats(target.multiprocessors, target.shared, sizes);
      CHECK_MESSAGE((plan.splits == 1 || floats >= sizes.tokens * sizes.heads * plan.splits * (sizes.head_dim + 2)), text);
      CHECK_MESSAGE(floats <= (int64_t{1} << 28), text);
    }
  // Decode of a 7B model and of a grouped one fills the device; a prefill of that size is not split.
  const auto plan = [](std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t keys) {
    return cuda::plan_attention(132, 227 * 1024, {.tokens = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = 128, .most_keys = keys});
  };
  CHECK(plan(1, 32, 32, 4096).splits * 32 >= 132 * 2 * 9 / 10);
  CHECK(plan(1, 32, 8, 4096).splits * 8 >= 132 * 2 * 9 / 10);
  CHECK(plan(1, 32, 8, 4096).rows == 4);
  CHECK(plan(1, 32, 32, 100).splits == 1);
  CHECK(plan(4096, 32, 32, 4096).splits == 1);
  CHECK(plan(4096, 32, 32, 4096).tiles_head_dim == 128);
  CHECK(plan(4, 32, 4, 4096).tiles_head_dim == 128);
  CHECK(plan(4, 32, 4, 4096).splits * 4 >= 64);
  for (const int head_dim : cuda::attention_tiles_head_dims) {
    CAPTURE(head_dim);
    CHECK(cuda::make_attention_tiles_policy(head_dim).shared_bytes() <= 99 * 1024);       // a block of sm_86 and sm_89
    CHECK(cuda::make_attention_tiles_policy(head_dim).shared_bytes() * 2 <= 163 * 1024);  // two blocks on a multiprocessor of sm_80
  }
}

/// For the kernel of warpgroups: at least a block of rows.
Problem problem(std::int64_t tokens, std::int64_t group, std::int64_t head_dim, std::int64_t first,
                AttentionMask mask = {.causal = true, .window = 0}) {
  Problem p{.tokens = tokens, .group = group, .head_dim = head_dim, .first = first, .mask = mask};
  if (!p.ordered()) p.first = 0, p.keys_seen = first + tokens;
  p.prefill = cuda::PrefillKernel::warpgroups;
  return p;
}

/// One multiprocessor, so that keys are not split however small the grid is. A real device has as many as it has, and few of these problems.
struct SmallDevice {
#if !defined(__CUDACC__)
  static cuda::emulation::Machine machine() {
    cuda::emulation::Machine machine;
    machine.multiprocessors = 1;
    return machine;
  }
  cuda::emulation::MachineScope scope{machine()};
#endif
  cuda::Device device{0};
};

TEST_CASE("attention by warpgroups: chosen shapes") {
  SmallDevice small;
  cuda::Device& device = small.device;
  SUBCASE("one tile") { check<Bf16>(device, problem(128, 1, 64, 0), 1); }
  SUBCASE("heads of 128, several tiles, a part of a tile of rows and of keys") { check<Bf16>(device, problem(300, 1, 128, 41), 2); }
  SUBCASE("f16, groups that share keys") { check<Half>(device, problem(80, 4, 64, 200), 3); }
  SUBCASE("a group that does not divide the rows of a block, heads of 128") { check<Half>(device, problem(47, 3, 128, 0), 4); }
  SUBCASE("every query sees every key, which are no whole tiles") { check<Bf16>(device, problem(150, 1, 64, 283, {}), 5); }
  SUBCASE("a window: first and last tiles are cut") { check<Bf16>(device, problem(140, 1, 64, 300, {.causal = true, .window = 130}), 6); }
  SUBCASE("a sink, rows of q and y apart, position on the device, a bucket beyond the keys") {
    Problem p = problem(130, 1, 64, 100);
    p.kv_heads = 2;
    p.sinks.zero_logit = true;
    p.position_on_device = true;
    p.most_keys = 512;
    p.extra_columns = 8;
    p.extra_capacity = 37;
    check<Half>(device, p, 7);
  }
  SUBCASE("only the sink") {
    Problem p = problem(128, 1, 64, 0, {});
    p.keys_seen = 0;
    p.extra_capacity = 16;
    p.sinks.zero_logit = true;
    check<Bf16>(device, p, 8);
  }
}

#if !defined(__CUDACC__)
TEST_CASE("attention by warpgroups: what is launched") {
  const auto launched = [](const Problem& p, int compute_capability) -> std::string {
    cuda::emulation::Machine machine = SmallDevice::machine();
    machine.compute_capability = compute_capability;
    machine.faulty_launch = cuda::emulation::launches();  // whatever it is, the message names it
    const cuda::emulation::MachineScope scope(machine);
    cuda::Device device(0);
    try {
      attend(device, p, Data<Bf16>(p, 1));
    } catch (const DeviceError& error) {
      return error.what();
    }
    return "";
  };
  const auto has = [](const std::string& text, const char* piece) { return text.find(piece) != std::string::npos; };
  Problem p = problem(128, 1, 64, 0);
  CHECK(has(launched(p, 90), "attention_warpgroups<64>"));
  CHECK(has(launched(problem(64, 2, 128, 9), 90), "attention_warpgroups<128>"));
  CHECK(has(launched(p, 80), "attention_tiles<64>"));
  CHECK(has(launched(p, 100), "attention_tiles<64>"));
  CHECK(has(launched(problem(127, 1, 64, 0), 90), "attention_tiles<64>"));  // not a block of rows
  CHECK(has(launched(problem(128, 1, 96, 0), 90), "attention_tiles<96>"));  // a size of heads without an instance
  p.prefill = cuda::default_prefill_kernel;
  CHECK(has(launched(p, 90), "attention_tiles<64>"));
}
#endif

TEST_CASE("attention by warpgroups: its blocks fit a multiprocessor of sm_90, and only whole problems take it") {
  for (const int head_dim : cuda::attention_warpgroups_head_dims) {
    CAPTURE(head_dim);
    const cuda::AttentionWarpgroupsPolicy policy = cuda::make_attention_warpgroups_policy(head_dim);
    CHECK(policy.shared_bytes() + 128 <= 227 * 1024);  // and its barriers
    CHECK(policy.tile_bytes() == policy.keys * head_dim * 2);
    CHECK(policy.box_bytes() % 1024 == 0);
    CHECK(policy.keys <= 256);             // of a box
    CHECK(policy.tile_bytes() < 1 << 20);  // that a barrier may expect
    CHECK(128 * (policy.warpgroups * policy.registers + policy.copying_registers) <= 65536);
  }
  const auto chosen = [](std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim) {
    const cuda::AttentionSizes sizes{.tokens = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .most_keys = 4096};
    return cuda::warpgroups_head_dim(90, 227 * 1024, sizes, cuda::plan_attention(132, 227 * 1024, sizes));
  };
  CHECK(chosen(4096, 32, 32, 128) == 128);
  CHECK(chosen(577, 16, 16, 64) == 64);  // CLIP-L: 5 × 16 blocks, keys are not split for the rest
  CHECK(chosen(4, 32, 8, 128) == 0);
  CHECK(chosen(4096, 32, 32, 80) == 0);
}

TEST_CASE("attention: errors name both sides") {
  cuda::Device device(0);
  const DeviceMatrix<Bf16> memory(device, 1, 2048);
  auto* const bytes = reinterpret_cast<std::byte*>(memory.view().data());
  const auto message = [&](const KeyValues& kv, std::int64_t columns, std::int64_t most_keys) -> std::string {
    try {
      const Matrix<Bf16> q(memory.view().data(), {1, columns});
      cuda::attention<Bf16>(device, q, kv, {.length = nullptr, .first = 0, .most_keys = most_keys}, {.causal = true, .window = 0}, 1.0F, q, {},
                            nullptr);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const KeyValues kv{DType::bf16, 2, 8, 16, bytes, bytes};
  const auto has = [](const std::string& text, const char* piece) { return text.find(piece) != std::string::npos; };
  KeyValues other = kv;
  other.format = DType::f32;
  CHECK(has(message(other, 16, 16), "f32, activations are bf16"));
  CHECK(has(message(kv, 24, 16), "q is [1, 24]"));
  CHECK(has(message(kv, 24, 16), "2 heads of 8"));
  CHECK(has(message(kv, 16, 17), "17 keys of 16"));
  other = kv;
  other.head_dim = 1024;
  CHECK(has(message(other, 2048, 16), "heads of 1024"));
}

}  // namespace
