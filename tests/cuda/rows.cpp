// The kernels of rows.cuh against plain loops in double. Bounds: those of tests/unit/ops_rows.cpp for sums in f32, plus the rounding of
// the result to E. Copies are equal to the bit; so are vectors of 16 bytes and single elements, where each element is computed alone.
#include "device_support.hpp"

#include <m2lm/backends/cuda/kernels/rows.cuh>
#include <m2lm/backends/reference/reference.hpp>

#include <algorithm>

namespace {

using namespace m2lm_test;

template <class E>
std::string name_of() {
  return std::string(dtype_name(dtype_of<E>));
}

/// The reference backend on matrices of double.
struct Oracle {
  Reference<double> backend;
  Arena arena;
  Context<Reference<double>> ctx{backend, arena};
};
Matrix<const double> matrix(const std::vector<double>& x, std::int64_t rows, std::int64_t cols) { return {x.data(), {rows, cols}}; }
Matrix<double> matrix(std::vector<double>& x, std::int64_t rows, std::int64_t cols) { return {x.data(), {rows, cols}}; }
Vector<const double> vector(const std::vector<double>& x) { return {x.data(), {static_cast<std::int64_t>(x.size())}}; }

/// Rounding of a result to E, after a computation in f32.
template <class E>
double rounding(double expected) {
  return std::is_same_v<E, float> ? 0 : 1.01 * roundoff<E> * std::abs(expected) + underflow<E>;
}

constexpr double u32 = roundoff<float>;

struct NormCase {
  std::int64_t rows, cols, extra = 0, offset = 0;
  std::string string() const { return concat(rows, " rows of ", cols, ", ", extra, " apart, offset ", offset); }
};
/// Widths at which vectors, warps, blocks and the registers of a block end; rows that do and do not fill the 16 emulated multiprocessors.
std::vector<NormCase> norm_cases() {
  return {{1, 1},          {3, 2, 5},         {2, 7, 1},    {2, 8},          {1, 64},   {5, 72, 8},    {3, 129},    {4, 256, 8, 1}, {1, 1000},
          {2, 1032, 0, 8}, {1, 8192},         {1, 8200},    {2, 1027, 2, 1}, {1, 2051}, {33, 24},      {34, 25, 1}, {33, 1032},     {33, 2056, 8},
          {33, 2057},      {33, 16392, 0, 0}, {33, 512, 4}, {40, 96, 0, 3},  {0, 16},   {100, 3, 2, 1}};
}

}  // namespace

TEST_CASE("launch shapes cover every row and column once, in blocks of whole warps") {
  for (const std::int64_t rows : {1, 2, 3, 7, 130, 1000})
    for (const std::int64_t vectors : {1, 2, 3, 8, 31, 127, 128, 129, 4096}) {
      const cuda::RowTiles t = cuda::row_tiles(rows, vectors);
      CAPTURE(rows);
      CAPTURE(vectors);
      CHECK(t.block_x * t.block_y == cuda::RowTilePolicy{}.threads);
      CHECK(std::int64_t{t.tiles_per_row} * t.block_x >= vectors);
      CHECK(std::int64_t{t.tiles_per_row - 1} * t.block_x < vectors);
      CHECK(t.blocks % t.tiles_per_row == 0);
      const std::int64_t high = t.blocks / t.tiles_per_row;
      CHECK(high * t.block_y >= rows);
      CHECK((high - 1) * t.block_y < rows);
      CHECK(t.shape().grid_x == t.blocks);
    }
}

TEST_CASE("a norm takes the short way for few rows, and blocks that its registers allow") {
  constexpr cuda::NormPolicy policy;
  // A decode step of a 7B model: 4,096 elements of 16 bits.
  static_assert(cuda::norm_shape(132, 1, 512).threads == 512 && cuda::norm_shape(132, 1, 512).held == 1);
  static_assert(cuda::norm_shape(132, 2048, 512).threads == 128 && cuda::norm_shape(132, 2048, 512).held == 4);
  for (const std::int64_t rows : {1, 264, 265, 5000})
    for (const std::int64_t vectors : {1, 31, 32, 33, 1023, 1024, 1025, 2048, 100000}) {
      const cuda::NormShape s = cuda::norm_shape(132, rows, vectors);
      CAPTURE(rows);
      CAPTURE(vectors);
      CHECK(s.threads % 32 == 0);
      CHECK(s.threads >= 32);
      CHECK((s.held == policy.held_when_few || s.held == policy.held_when_many));
      CHECK(s.threads <= (s.held == policy.held_when_few ? policy.most_threads_when_few : policy.most_threads_when_many));
      if (s.held == policy.held_when_few) CHECK(vectors <= s.threads);
      if (rows > 264) CHECK(s.held == policy.held_when_many);
    }
}

TEST_CASE_TEMPLATE("rms_norm", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(1);
  for (const NormCase& c : norm_cases()) {
    CAPTURE(c.string());
    const auto x = random.elements<E>(c.rows * c.cols), w = random.elements<E>(c.cols);
    const double eps = 1e-5;
    const auto xd = doubles(x), wd = doubles(w);
    std::vector<double> expected(xd.size());
    ops::rms_norm(oracle.ctx, matrix(xd, c.rows, c.cols), vector(wd), eps, matrix(expected, c.rows, c.cols));
    const DeviceMatrix<E> in(device, c.rows, c.cols, x, c.extra, c.offset), out(device, c.rows, c.cols, c.extra, c.offset);
    const DeviceArray<E> weight(device, w, c.offset);
    cuda::rms_norm<E>(device, in.const_view(), weight.data(), static_cast<float>(eps), out.view());
    const auto y = out.read();
    Worst worst;
    for (std::size_t i = 0; i < y.size(); ++i)
      worst.add(to_float(y[i]), expected[i], (static_cast<double>(c.cols + 2) / 2 + 6) * u32 * std::abs(expected[i]) + rounding<E>(expected[i]),
                static_cast<std::int64_t>(i));
    CHECK_MESSAGE(worst.passed(), name_of<E>(), " ", worst.where());
    cuda::rms_norm<E>(device, in.const_view(), weight.data(), static_cast<float>(eps), in.view());
    CHECK(same_bits(in.read(), y));
  }
}

TEST_CASE_TEMPLATE("layer_norm", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(2);
  for (const NormCase& c : norm_cases()) {
    CAPTURE(c.string());
    const auto x = random.elements<E>(c.rows * c.cols, 1, random.coin() ? 2.0F : 0.0F), w = random.elements<E>(c.cols),
               b = random.elements<E>(c.cols);
    const double eps = 1e-5;
    const auto xd = doubles(x), wd = doubles(w), bd = doubles(b);
    std::vector<double> expected(xd.size());
    ops::layer_norm(oracle.ctx, matrix(xd, c.rows, c.cols), vector(wd), vector(bd), eps, matrix(expected, c.rows, c.cols));
    const DeviceMatrix<E> in(device, c.rows, c.cols, x, c.extra, c.offset), out(device, c.rows, c.cols, c.extra, c.offset);
    const DeviceArray<E> weight(device, w, c.offset), bias(device, b, c.offset);
    cuda::layer_norm<E>(device, in.const_view(), weight.data(), bias.data(), static_cast<float>(eps), out.view());
    const auto y = out.read();
    Worst worst;
    const double n = static_cast<double>(c.cols);
    for (std::int64_t i = 0; i < c.rows; ++i) {
      double mean = 0, magnitude = 0, variance = 0;
      for (std::int64_t j = 0; j < c.cols; ++j) {
        mean += xd[static_cast<std::size_t>(i * c.cols + j)] / n;
        magnitude += std::abs(xd[static_cast<std::size_t>(i * c.cols + j)]) / n;
      }
      for (std::int64_t j = 0; j < c.cols; ++j) variance += std::pow(xd[static_cast<std::size_t>(i * c.cols + j)] - mean, 2) / n;
      const double e = (n + 1) * u32 * magnitude, f = 1 / std::sqrt(variance + eps), r = ((n + 8) * u32 + e * e / (variance + eps)) / 2 + 4 * u32;
      for (std::int64_t j = 0; j < c.cols; ++j) {
        const auto at = static_cast<std::size_t>(i * c.cols + j);
        const double centred = std::abs(xd[at] - mean);
        worst.add(to_float(y[at]), expected[at],
                  std::abs(wd[static_cast<std::size_t>(j)]) * f * (e + (r + 4 * u32) * (centred + e)) + 2 * u32 * std::abs(expected[at]) +
                      rounding<E>(expected[at]),
                  static_cast<std::int64_t>(at));
      }
    }
    CHECK_MESSAGE(worst.passed(), name_of<E>(), " ", worst.where());
    cuda::layer_norm<E>(device, in.const_view(), weight.data(), bias.data(), static_cast<float>(eps), in.view());
    CHECK(same_bits(in.read(), y));
  }
}

TEST_CASE_TEMPLATE("a NaN spoils its own row of a norm only", E, float, Bf16) {
  cuda::Device device(0);
  Random random(3);
  auto x = random.elements<E>(3 * 40);
  x[40 + 7] = element<E>(std::numeric_limits<float>::quiet_NaN());
  const DeviceMatrix<E> in(device, 3, 40, x), out(device, 3, 40);
  const DeviceArray<E> weight(device, random.elements<E>(40));
  cuda::rms_norm<E>(device, in.const_view(), weight.data(), 1e-5F, out.view());
  const auto y = out.read();
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(to_float(y[i])) == (i / 40 == 1));
}

TEST_CASE("rope_angles at positions that the host or the device knows") {
  cuda::Device device(0);
  Random random(4);
  for (const std::int64_t half : {1, 3, 32, 48, 64}) {
    std::vector<float> frequencies;
    for (std::int64_t i = 0; i < half; ++i)
      frequencies.push_back(static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half))));
    const DeviceArray<float> f(device, frequencies);
    for (const std::int32_t first : {0, 5, 131000}) {
      const std::int64_t tokens = random.integer(1, 9);
      const DeviceArray<std::int32_t> length(device, std::vector<std::int32_t>{first});
      const DeviceMatrix<float> cos(device, tokens, half, 1), sin(device, tokens, half, 1);
      for (const bool on_device : {false, true}) {
        cuda::rope_angles(device, f.data(), on_device ? cuda::Position{.length = length.data(), .first = 77} : cuda::Position{.first = first},
                          cos.view(), sin.view());
        const auto c = cos.read(), s = sin.read();
        Worst worst;
        for (std::int64_t i = 0; i < tokens * half; ++i) {
          const double angle = static_cast<double>(static_cast<float>(first + i / half) * frequencies[static_cast<std::size_t>(i % half)]);
          // 2 ulp, as the CUDA programming guide states for sinf and cosf: 4·u.
          worst.add(c[static_cast<std::size_t>(i)], std::cos(angle), 4 * u32, i);
          worst.add(s[static_cast<std::size_t>(i)], std::sin(angle), 4 * u32, i);
        }
        CHECK_MESSAGE(worst.passed(), worst.where());
      }
    }
  }
}

namespace {

struct Heads {
  std::int64_t tokens, heads, kv_heads, head_dim, extra, offset;
};
std::vector<Heads> head_cases() {
  return {{1, 4, 2, 64, 0, 0},  {3, 6, 2, 80, 8, 0}, {2, 3, 3, 96, 0, 0}, {5, 8, 1, 128, 16, 0}, {2, 2, 1, 6, 0, 0},
          {4, 4, 2, 128, 3, 0}, {1, 2, 2, 64, 0, 1}, {7, 1, 1, 2, 0, 0},  {1, 32, 8, 128, 0, 0}, {129, 2, 1, 24, 0, 0}};
}
std::vector<float> turns(Random& random, std::int64_t count) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < count; ++i) out.push_back(static_cast<float>(2 * random.uniform() - 1));
  return out;
}

}  // namespace

TEST_CASE_TEMPLATE("rope, and rope_append with what it leaves in the cache", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(5);
  for (const Heads& h : head_cases()) {
    const std::int64_t half = h.head_dim / 2, q = h.heads * h.head_dim, k = h.kv_heads * h.head_dim, width = q + 2 * k, capacity = h.tokens + 9;
    CAPTURE(h.head_dim);
    CAPTURE(h.tokens);
    const auto x = random.elements<E>(h.tokens * width);
    const std::vector<float> c = turns(random, h.tokens * half), s = turns(random, h.tokens * half);
    const auto xd = doubles(x), cd = doubles(c), sd = doubles(s);
    auto expected = xd;
    ops::rope(oracle.ctx, matrix(expected, h.tokens, width).columns(0, q + k), h.head_dim, matrix(cd, h.tokens, half), matrix(sd, h.tokens, half));

    const DeviceMatrix<float> cos(device, h.tokens, half, c, h.extra), sin(device, h.tokens, half, s, h.extra);
    const DeviceMatrix<E> alone(device, h.tokens, width, x, h.extra, h.offset);
    cuda::rope<E>(device, alone.view().columns(0, q + k), h.head_dim, cos.const_view(), sin.const_view());
    const auto y = alone.read();
    Worst worst;
    for (std::int64_t i = 0; i < h.tokens * width; ++i) {
      const std::int64_t t = i / width, j = i % width, pair = j % half, partner = j % h.head_dim < half ? j + half : j - half;
      const auto at = static_cast<std::size_t>(i);
      const double size = j >= q + k
                              ? 0
                              : std::abs(xd[at] * cd[static_cast<std::size_t>(t * half + pair)]) +
                                    std::abs(xd[static_cast<std::size_t>(t * width + partner)] * sd[static_cast<std::size_t>(t * half + pair)]);
      worst.add(to_float(y[at]), expected[at], 3 * u32 * size + (j >= q + k ? 0 : rounding<E>(expected[at])), i);
    }
    CHECK_MESSAGE(worst.passed(), name_of<E>(), " ", worst.where());

    for (const bool on_device : {false, true}) {
      const std::int32_t first = 4;
      const DeviceMatrix<E> qkv(device, h.tokens, width, x, h.extra, h.offset);
      const DeviceArray<std::int32_t> length(device, std::vector<std::int32_t>{first});
      const DeviceMatrix<E> keys(device, h.kv_heads * capacity, h.head_dim), values(device, h.kv_heads * capacity, h.head_dim);
      const auto untouched = keys.read();
      const KeyValues kv{dtype_of<E>,
                         h.kv_heads,
                         h.head_dim,
                         capacity,
                         reinterpret_cast<std::byte*>(keys.view().data()),
                         reinterpret_cast<std::byte*>(values.view().data())};
      const cuda::Position position{.length = on_device ? length.data() : nullptr, .first = on_device ? 1 : first};
      cuda::rope_append<E>(device, qkv.view(), h.heads, cos.const_view(), sin.const_view(), position, kv);
      CHECK(same_bits(qkv.read(), y));
      const auto key = keys.read(), value = values.read();
      std::size_t wrong = 0;
      for (std::int64_t i = 0; i < h.kv_heads * capacity * h.head_dim; ++i) {
        const std::int64_t head = i / h.head_dim / capacity, t = i / h.head_dim % capacity - first, column = head * h.head_dim + i % h.head_dim;
        const bool stored = t >= 0 && t < h.tokens;
        const auto at = static_cast<std::size_t>(i);
        const E k_wanted = stored ? y[static_cast<std::size_t>(t * width + q + column)] : untouched[at];
        const E v_wanted = stored ? x[static_cast<std::size_t>(t * width + q + k + column)] : untouched[at];
        wrong += std::memcmp(&key[at], &k_wanted, sizeof(E)) != 0 || std::memcmp(&value[at], &v_wanted, sizeof(E)) != 0;
      }
      CHECK(wrong == 0);

      // The same rows, appended without rotation, and copied to a cache of another capacity.
      const DeviceMatrix<E> keys2(device, h.kv_heads * capacity, h.head_dim), values2(device, h.kv_heads * capacity, h.head_dim);
      const KeyValues kv2{dtype_of<E>,
                          h.kv_heads,
                          h.head_dim,
                          capacity,
                          reinterpret_cast<std::byte*>(keys2.view().data()),
                          reinterpret_cast<std::byte*>(values2.view().data())};
      cuda::append_key_values<E>(device, qkv.const_view().columns(q, q + k), qkv.const_view().columns(q + k, width), position, kv2);
      CHECK(same_bits(keys2.read(), key));
      CHECK(same_bits(values2.read(), value));
      const std::int64_t count = first + h.tokens, larger = capacity + 3;
      const DeviceMatrix<E> keys3(device, h.kv_heads * larger, h.head_dim), values3(device, h.kv_heads * larger, h.head_dim);
      const KeyValues kv3{dtype_of<E>,
                          h.kv_heads,
                          h.head_dim,
                          larger,
                          reinterpret_cast<std::byte*>(keys3.view().data()),
                          reinterpret_cast<std::byte*>(values3.view().data())};
      cuda::copy_key_values<E>(device, kv, count, kv3);
      const auto key3 = keys3.read(), value3 = values3.read();
      for (std::int64_t head = 0; head < h.kv_heads; ++head) {
        const auto part = [&](const std::vector<E>& from, std::int64_t rows, std::int64_t begin, std::int64_t end) {
          return std::vector<E>(from.begin() + (head * rows + begin) * h.head_dim, from.begin() + (head * rows + end) * h.head_dim);
        };
        CHECK(same_bits(part(key3, larger, 0, count), part(key, capacity, 0, count)));
        CHECK(same_bits(part(value3, larger, 0, count), part(value, capacity, 0, count)));
        CHECK(same_bits(part(key3, larger, count, larger), std::vector<E>(static_cast<std::size_t>((larger - count) * h.head_dim), untouched[0])));
      }
    }
  }
}

namespace {

struct RowCase {
  std::int64_t rows, cols, extra = 0, offset = 0;
};
std::vector<RowCase> row_cases() {
  return {{1, 1}, {3, 8}, {2, 9, 7}, {7, 64, 8}, {1, 4096}, {5, 100, 4}, {5, 104, 0, 1}, {300, 16}, {2, 1, 3}, {0, 8}, {3, 1032, 8}};
}

}  // namespace

TEST_CASE_TEMPLATE("gather_rows: an id outside the table gives a row of NaN", E, float, Half, Bf16) {
  cuda::Device device(0);
  Random random(6);
  for (const RowCase& c : row_cases()) {
    constexpr std::int64_t vocab = 11;
    const auto table = random.elements<E>(vocab * c.cols);
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < c.rows; ++i) ids.push_back(static_cast<std::int32_t>(random.integer(-1, vocab)));
    if (c.rows > 1) ids[0] = std::numeric_limits<std::int32_t>::min(), ids[1] = std::numeric_limits<std::int32_t>::max();
    const DeviceMatrix<E> from(device, vocab, c.cols, table, c.extra, c.offset), to(device, c.rows, c.cols, c.extra);
    const DeviceArray<std::int32_t> device_ids(device, ids);
    cuda::gather_rows<E>(device, from.const_view(), device_ids.data(), to.view());
    const auto y = to.read();
    std::size_t wrong = 0;
    for (std::int64_t i = 0; i < c.rows * c.cols; ++i) {
      const std::int32_t id = ids[static_cast<std::size_t>(i / c.cols)];
      const E& got = y[static_cast<std::size_t>(i)];
      wrong += id < 0 || id >= vocab ? !std::isnan(to_float(got))
                                     : std::memcmp(&got, &table[static_cast<std::size_t>(id * c.cols + i % c.cols)], sizeof(E)) != 0;
    }
    CHECK_MESSAGE(wrong == 0, c.rows, " x ", c.cols);
  }
}

TEST_CASE_TEMPLATE("add_rows and copy_rows", E, float, Half, Bf16) {
  cuda::Device device(0);
  Random random(7);
  for (const RowCase& c : row_cases()) {
    const auto a = random.elements<E>(c.rows * c.cols), b = random.elements<E>(c.rows * c.cols);
    const DeviceMatrix<E> x(device, c.rows, c.cols, a, c.extra, c.offset), addend(device, c.rows, c.cols, b, 2 * c.extra, c.offset),
        copy(device, c.rows, c.cols, c.extra);
    cuda::copy_rows<E>(device, x.const_view(), copy.view());
    CHECK(same_bits(copy.read(), a));
    cuda::add_rows<E>(device, x.view(), addend.const_view());
    std::vector<E> expected;
    for (std::size_t i = 0; i < a.size(); ++i) expected.push_back(element<E>(to_float(a[i]) + to_float(b[i])));
    CHECK(same_bits(x.read(), expected));
  }
}

TEST_CASE("copy_rows keeps the bits of a NaN") {
  cuda::Device device(0);
  const std::vector<Bf16> x{{0x7f81}, {0xffff}, {0x8000}};
  const DeviceMatrix<Bf16> from(device, 1, 3, x), to(device, 1, 3);
  cuda::copy_rows<Bf16>(device, from.const_view(), to.view());
  CHECK(same_bits(to.read(), x));
}

TEST_CASE_TEMPLATE("patchify", E, float, Half, Bf16) {
  cuda::Device device(0);
  Random random(8);
  for (const std::int64_t patch : {1, 2, 3, 14})
    for (const std::int64_t rest : {0, 1}) {
      const std::int64_t channels = random.integer(1, 3), height = patch * random.integer(1, 4) + rest * (patch - 1),
                         width = patch * random.integer(1, 4) + rest * (patch - 1);
      const auto pixels = random.elements<E>(channels * height * width);
      const std::int64_t rows = (height / patch) * (width / patch), cols = channels * patch * patch;
      const DeviceArray<E> in(device, pixels);
      const DeviceMatrix<E> out(device, rows, cols, rest);
      cuda::patchify<E>(device, View<const E, 3>(in.data(), {channels, height, width}), patch, out.view());
      const auto y = out.read();
      std::size_t wrong = 0;
      for (std::int64_t i = 0; i < rows * cols; ++i) {
        const std::int64_t place = i / cols, j = i % cols, channel = j / (patch * patch), r = place / (width / patch) * patch + j / patch % patch,
                           s = place % (width / patch) * patch + j % patch;
        wrong += std::memcmp(&y[static_cast<std::size_t>(i)], &pixels[static_cast<std::size_t>((channel * height + r) * width + s)], sizeof(E)) != 0;
      }
      CHECK_MESSAGE(wrong == 0, "patch ", patch);
    }
}

namespace {

template <class From, class To>
void check_convert(cuda::Device& device) {
  Random random(9);
  for (const std::int64_t count : {0, 1, 7, 8, 9, 1000, 1024, 4097})
    for (const std::int64_t offset : {0, 1}) {
      const auto x = random.elements<From>(count);
      const DeviceArray<From> from(device, x, offset);
      const DeviceArray<To> to(device, std::vector<To>(static_cast<std::size_t>(count) + 1, element<To>(42)));
      cuda::convert<From, To>(device, from.data(), to.data(), count);
      std::vector<To> expected;
      for (const From& e : x) expected.push_back(element<To>(to_float(e)));
      expected.push_back(element<To>(42));  // nothing is written behind the last one
      CHECK_MESSAGE(same_bits(to.read(), expected), name_of<From>(), " to ", name_of<To>(), ", ", count, " elements");
    }
}

}  // namespace

TEST_CASE("convert") {
  cuda::Device device(0);
  check_convert<float, Half>(device);
  check_convert<float, Bf16>(device);
  check_convert<Half, float>(device);
  check_convert<Bf16, float>(device);
  check_convert<Half, Bf16>(device);
  check_convert<Bf16, Half>(device);
}

TEST_CASE_TEMPLATE("activation_forward, plain and gated", E, float, Half, Bf16) {
  cuda::Device device(0);
  Random random(10);
  for (const RowCase& c : row_cases())
    for (const Activation activation :
         {Activation::none, Activation::relu, Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu})
      for (const bool gated : {false, true}) {
        const std::int64_t width = gated ? 2 * c.cols : c.cols;
        const auto z = random.elements<E>(c.rows * width, 3);
        const DeviceMatrix<E> in(device, c.rows, width, z, c.extra, c.offset), out(device, c.rows, c.cols, c.extra);
        cuda::activation_forward<E>(device, in.const_view(), activation, out.view());
        const auto y = out.read();
        Worst worst;
        for (std::int64_t i = 0; i < c.rows * c.cols; ++i) {
          const std::int64_t at = i / c.cols * width + i % c.cols;
          const double x = to_float(z[static_cast<std::size_t>(at)]), factor = gated ? to_float(z[static_cast<std::size_t>(at + c.cols)]) : 1.0;
          const double expected = m2lm::detail::apply_activation(activation, x) * factor;
          // exp, erf and tanh have errors of a few u, and so has 1 + erf or 1 + tanh, which may cancel: then x itself is the measure.
          // The argument of exp carries its own rounding: |1.702·x|·u more.
          const double bound = (12 + 2 * std::abs(x)) * u32 * std::abs(x * factor) + rounding<E>(expected);
          worst.add(to_float(y[static_cast<std::size_t>(i)]), expected, bound, i);
        }
        CHECK_MESSAGE(worst.passed(), name_of<E>(), " activation ", static_cast<int>(activation), " ", worst.where());
        if (!gated) {
          cuda::activation_forward<E>(device, in.const_view(), activation, in.view());
          CHECK(same_bits(in.read(), y));
        }
      }
}

TEST_CASE("lengths in device memory") {
  cuda::Device device(0);
  const DeviceArray<std::int32_t> length(device, {5, 77});
  cuda::add_to_length(device, length.data(), 3);
  CHECK(length.read() == std::vector<std::int32_t>{8, 77});
  cuda::set_length(device, length.data(), 2);
  cuda::add_to_length(device, length.data(), 1);
  CHECK(length.read() == std::vector<std::int32_t>{3, 77});
}
