// The kernels of backward passes of one instruction-set level, written over that level's Vec and the tiles of kernels.inc.hpp.
// Included once per level, inside its namespace and target region: no includes, no static locals here.

// f(load, store) over n elements in whole vectors; the rest through a buffer, so that every element has the same arithmetic.
template <class F>
[[gnu::always_inline]] inline void for_vectors(std::int64_t n, F&& f) {
  std::int64_t i = 0;
  for (; i + width <= n; i += width) f(i, width);
  if (i < n) f(i, n - i);
}
inline Vec load_some(const float* p, std::int64_t count) {
  if (count == width) return load(p);
  float edge[width] = {};
  for (std::int64_t i = 0; i < count; ++i) edge[i] = p[i];
  return load(edge);
}
inline void store_some(float* p, Vec v, std::int64_t count) {
  if (count == width) {
    store(p, v);
    return;
  }
  float edge[width];
  store(edge, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = edge[i];
}

// ---- activations ----------------------------------------------------------------------------------------------------------

inline Vec activation_slope(Activation activation, Vec x) {
  const Vec one = set(1.0F);
  switch (activation) {
    case Activation::none: break;
    case Activation::relu: return one - zero_where_below(set(0.0F) - x, set(0.0F), one);  // 0 where x <= 0
    case Activation::silu: {
      const Vec s = logistic(x);
      return s * (one + x * (one - s));
    }
    case Activation::gelu: {
      const Vec density = set(0.398942280F) * exp(set(-0.5F) * x * x);
      return fma(x, density, set(0.5F) * (one + erf(x * set(0.707106781F))));
    }
    case Activation::gelu_tanh: {
      const Vec square = x * x;
      const Vec s = logistic(set(1.5957691216F) * fma(set(0.044715F) * square, x, x));
      return s + x * s * (one - s) * set(1.5957691216F) * fma(set(0.134145F), square, one);
    }
    case Activation::quick_gelu: {
      const Vec s = logistic(set(1.702F) * x);
      return s + set(1.702F) * x * s * (one - s);
    }
  }
  return one;
}

inline void activation_forward(Activation activation, const float* z, bool gated, float* y, std::int64_t n) {
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    Vec v = activate(activation, load_some(z + i, count));
    if (gated) v = v * load_some(z + n + i, count);
    store_some(y + i, v, count);
  });
}

inline void activation_backward(Activation activation, const float* dy, const float* z, bool gated, float* dz, std::int64_t n) {
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    const Vec d = load_some(dy + i, count), a = load_some(z + i, count);
    const Vec slope = activation_slope(activation, a);
    if (gated) {
      const Vec b = load_some(z + n + i, count);
      store_some(dz + n + i, d * activate(activation, a), count);
      store_some(dz + i, d * b * slope, count);
    } else {
      store_some(dz + i, d * slope, count);
    }
  });
}

// ---- norms ----------------------------------------------------------------------------------------------------------------

inline float sum_of(const float* x, std::int64_t n) {
  Vec sums = set(0.0F);
  for_vectors(n, [&](std::int64_t i, std::int64_t count) { sums = sums + load_some(x + i, count); });
  return reduce_add(sums);
}

// Mean (0 for RMSNorm) and inverse deviation of a row.
inline void norm_statistics(const float* x, std::int64_t n, float eps, bool centred, float* mean, float* inverse) {
  *mean = centred ? sum_of(x, n) / static_cast<float>(n) : 0.0F;
  const Vec m = set(*mean);
  Vec squares = set(0.0F);
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    const Vec c = load(x + i) - m;
    squares = fma(c, c, squares);
  }
  float total = reduce_add(squares);
  for (; i < n; ++i) total += (x[i] - *mean) * (x[i] - *mean);
  *inverse = 1.0F / __builtin_sqrtf(total / static_cast<float>(n) + eps);
}

// dx (+)= r·(g - mean(g) - c·mean(g·c)), c = (x - mean)·r, g = dy·weight; mean(g) for LayerNorm only.
inline void norm_backward(const float* dy, const float* x, const float* weight, float mean, float inverse, bool centred, float* dx, bool accumulate,
                          std::int64_t n) {
  const Vec m = set(mean), r = set(inverse);
  Vec sum_g = set(0.0F), sum_gc = set(0.0F);
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    const Vec g = load_some(dy + i, count) * load_some(weight + i, count);
    sum_g = sum_g + g;
    sum_gc = fma(g, (load_some(x + i, count) - m) * r, sum_gc);
  });
  const Vec mean_g = set(centred && !M2LM_FAULT(44) ? reduce_add(sum_g) / static_cast<float>(n) : 0.0F);
  const Vec mean_gc = set(reduce_add(sum_gc) / static_cast<float>(n));
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    const Vec g = load_some(dy + i, count) * load_some(weight + i, count), c = (load_some(x + i, count) - m) * r;
    Vec value = r * (g - mean_g - c * mean_gc);
    if (accumulate) value = value + load_some(dx + i, count);
    store_some(dx + i, value, count);
  });
}

// dweight += Σ dy·(x - mean)·r and dbias += Σ dy over all rows, for `n` columns; either may be null. Each column is one sum over the
// rows in ascending order, and then added.
inline void norm_weight_gradient(const float* dy, std::int64_t ld_dy, const float* x, std::int64_t ldx, const float* mean, const float* inverse,
                                 std::int64_t rows, std::int64_t n, float* dweight, float* dbias) {
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    Vec weight = set(0.0F), bias = set(0.0F);
    for (std::int64_t row = 0; row < rows; ++row) {
      const Vec d = load_some(dy + row * ld_dy + i, count);
      bias = bias + d;
      if (dweight) weight = fma(d, (load_some(x + row * ldx + i, count) - set(mean[row])) * set(inverse[row]), weight);
    }
    if (dweight) store_some(dweight + i, load_some(dweight + i, count) + weight, count);
    if (dbias) store_some(dbias + i, load_some(dbias + i, count) + bias, count);
  });
}

// ---- rotation -------------------------------------------------------------------------------------------------------------

inline void rope_backward(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t h = 0; h < heads; ++h) {
    float* a = x + h * head_dim;
    float* b = a + half;
    for_vectors(half, [&](std::int64_t i, std::int64_t count) {
      const Vec u = load_some(a + i, count), v = load_some(b + i, count), c = load_some(cos + i, count), s = load_some(sin + i, count);
      store_some(a + i, u * c + v * s, count);
      store_some(b + i, v * c - u * s, count);
    });
  }
}

// ---- products -------------------------------------------------------------------------------------------------------------

// transpose_panels of a matrix of integers. requires first a multiple of 32: a panel of the transpose holds 32 inputs of each row.
inline void transpose_quantised(const std::byte* w, DType format, std::int64_t n, std::int64_t k, std::int64_t first, std::int64_t count, float* out) {
  static_assert(panel_width == block_values);
  const std::int64_t strip_bytes = quantised_format(format).strip_bytes(k);
  for (std::int64_t c0 = 0; c0 < count; c0 += panel_width) {
    float* panel = out + c0 * n;
    for (std::int64_t row = 0; row < n; ++row)  // what is behind the last column is padding: zeros
      dequantise_piece(format, w + row / strip_width * strip_bytes, k, (first + c0) / block_values, row % strip_width, panel + row * panel_width);
  }
}

// Columns [first, first + count) of a packed matrix [n, k] as f32 panels of its transpose: out[panel][n][32].
inline void transpose_panels(const std::byte* w, DType format, std::int64_t n, std::int64_t k, std::int64_t first, std::int64_t count, float* out) {
  if (is_quantised(format)) return transpose_quantised(w, format, n, k, first, count, out);
  for (std::int64_t c0 = 0; c0 < count; c0 += panel_width) {
    float* panel = out + c0 * n;
    const std::int64_t valid = count - c0 < panel_width ? count - c0 : panel_width;
    for (std::int64_t row = 0; row < n; ++row) {
      const std::int64_t block = row / panel_width * panel_width * k, lane = row % panel_width;
      for (std::int64_t c = 0; c < valid; ++c) {
        const std::int64_t column = first + c0 + c;
        if (format == DType::bf16) {
          const std::uint32_t bits = static_cast<std::uint32_t>(
                                         reinterpret_cast<const std::uint16_t*>(w)[block + column / 2 * panel_width * 2 + lane * 2 + column % 2])
                                     << 16;
          __builtin_memcpy(panel + row * panel_width + c, &bits, sizeof(bits));
        } else {
          panel[row * panel_width + c] = reinterpret_cast<const float*>(w)[block + column * panel_width + lane];
        }
      }
      for (std::int64_t c = valid; c < panel_width; ++c) panel[row * panel_width + c] = 0.0F;
    }
  }
}

// Rows of x as one panel of its columns [first, first + 32): out[rows][32], zero behind `columns`.
inline void copy_panel(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, std::int64_t first, float* out) {
  const std::int64_t valid = columns - first < panel_width ? columns - first : panel_width;
  for (std::int64_t row = 0; row < rows; ++row) {
    __builtin_memcpy(out + row * panel_width, x + row * ldx + first, static_cast<std::size_t>(valid) * sizeof(float));
    for (std::int64_t c = valid; c < panel_width; ++c) out[row * panel_width + c] = 0.0F;
  }
}

// out[column][row] = x[row][column].
inline void transpose(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, float* out, std::int64_t ldo) {
  constexpr std::int64_t tile = 16;  // lines of both sides stay in L1
  for (std::int64_t r0 = 0; r0 < rows; r0 += tile)
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t r = r0; r < rows && r < r0 + tile; ++r) out[c * ldo + r] = x[r * ldx + c];
}

// ---- attention ------------------------------------------------------------------------------------------------------------

inline std::int64_t attention_backward_floats(std::int64_t keys, std::int64_t head_dim) {
  const std::int64_t t = round_up(keys, panel_width), wide = round_up(head_dim, panel_width), rows = backward_rows;
  return t * (2 * head_dim + 3 * wide) + 4 * rows * t + rows * (2 * head_dim + 3 * wide);
}

// One kv head: all query heads of its group, in blocks of query rows. With P the softmax and dP = dY·Vᵀ:
// dS = P∘(dP - rowsum(P∘dP))·scale, dV = Pᵀ·dY, dQ = dS·K, dK = dSᵀ·Q, every product by the tiles of the linear op.
inline void attention_backward(const AttentionBackwardJob& job, std::int64_t kv_head, float* scratch) {
  const std::int64_t d = job.head_dim, wide = round_up(d, panel_width), t = round_up(job.keys, panel_width), group = job.heads / job.kv_heads;
  float* k_columns = scratch;                    // [t/32][d][32]: keys as outputs
  float* v_columns = k_columns + t * d;          // the same of v
  float* k_rows = v_columns + t * d;             // [wide/32][t][32]: keys as inputs
  float* dk = k_rows + t * wide;                 // [t][wide]
  float* dv = dk + t * wide;                     // [t][wide]
  float* p = dv + t * wide;                      // [rows][t]
  float* ds = p + backward_rows * t;             // [rows][t]
  float* p_turned = ds + backward_rows * t;      // [t][rows]
  float* ds_turned = p_turned + backward_rows * t;
  float* q = ds_turned + backward_rows * t;      // [rows][d]
  float* dy = q + backward_rows * d;             // [rows][d]
  float* q_panels = dy + backward_rows * d;      // [wide/32][rows][32]
  float* dy_panels = q_panels + backward_rows * wide;
  float* dq = dy_panels + backward_rows * wide;  // [rows][wide]

  for (std::int64_t j = 0; j < t; ++j)
    for (std::int64_t c = 0; c < d; ++c) {
      const std::int64_t to = j / panel_width * panel_width * d + c * panel_width + j % panel_width;
      k_columns[to] = j < job.keys ? job.k[j * job.ldk + kv_head * d + c] : 0.0F;
      v_columns[to] = j < job.keys ? job.v[j * job.ldv + kv_head * d + c] : 0.0F;
    }
  for (std::int64_t c0 = 0; c0 < wide; c0 += panel_width) {
    copy_panel(job.k + kv_head * d, job.ldk, job.keys, d, c0, k_rows + c0 * t);
    for (std::int64_t i = job.keys * panel_width; i < t * panel_width; ++i) k_rows[c0 * t + i] = 0.0F;
  }
  for (std::int64_t i = 0; i < t * wide; ++i) dk[i] = dv[i] = 0.0F;
  const bool ordered = job.mask.causal || job.mask.window > 0;

  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t row0 = 0; row0 < job.queries; row0 += backward_rows) {
      const std::int64_t rows = job.queries - row0 < backward_rows ? job.queries - row0 : backward_rows;
      for (std::int64_t r = 0; r < rows; ++r) {
        __builtin_memcpy(q + r * d, job.q + (row0 + r) * job.ldq + head * d, static_cast<std::size_t>(d) * sizeof(float));
        __builtin_memcpy(dy + r * d, job.dy + (row0 + r) * job.ld_dy + head * d, static_cast<std::size_t>(d) * sizeof(float));
      }
      for (std::int64_t c0 = 0; c0 < wide; c0 += panel_width) {
        copy_panel(q, d, rows, d, c0, q_panels + c0 * backward_rows);
        copy_panel(dy, d, rows, d, c0, dy_panels + c0 * backward_rows);
      }
      const std::int64_t seen = ordered && row0 + rows < job.keys ? row0 + rows : job.keys;
      const std::int64_t oldest = job.mask.window > 0 && row0 - job.mask.window + 1 > 0 ? row0 - job.mask.window + 1 : 0;
      const std::int64_t first = oldest / panel_width * panel_width, last = round_up(seen, panel_width);
      for (std::int64_t j = first; j < last; j += panel_width) {
        run_rows<F32Tile>(rows, q, d, k_columns + j * d, d, p + j, t, false);
        run_rows<F32Tile>(rows, dy, d, v_columns + j * d, d, ds + j, t, false);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t position = row0 + r;
        const std::int64_t begin = job.mask.window > 0 && position - job.mask.window + 1 > 0 ? position - job.mask.window + 1 : 0;
        const std::int64_t end = ordered && position + 1 < job.keys ? position + 1 : job.keys;
        float* pr = p + r * t;
        float* dr = ds + r * t;
        constexpr float hidden = -__builtin_inff();
        const Vec scale = set(job.scale);
        for (std::int64_t j = first; j < last; j += width) store(pr + j, load(pr + j) * scale);
        for (std::int64_t j = first; j < begin; ++j) pr[j] = hidden;
        for (std::int64_t j = end; j < last; ++j) pr[j] = hidden;
        Vec largest = set(hidden);
        for (std::int64_t j = first; j < last; j += width) largest = max(largest, load(pr + j));
        const Vec top = set(reduce_max(largest));
        Vec sum = set(0.0F);
        for (std::int64_t j = first; j < last; j += width) {
          const Vec e = exp(load(pr + j) - top);
          store(pr + j, e);
          sum = sum + e;
        }
        const Vec inverse = set(1.0F / reduce_add(sum));
        Vec shared = set(0.0F);
        for (std::int64_t j = first; j < last; j += width) {
          const Vec e = load(pr + j) * inverse;
          store(pr + j, e);
          shared = fma(e, load(dr + j), shared);
        }
        const Vec mean = set(M2LM_FAULT(42) ? 0.0F : reduce_add(shared));
        for (std::int64_t j = first; j < last; j += width) store(dr + j, load(pr + j) * (load(dr + j) - mean) * scale);
      }
      const std::int64_t span = last - first;
      transpose(p + first, t, rows, span, p_turned, backward_rows);
      transpose(ds + first, t, rows, span, ds_turned, backward_rows);
      for (std::int64_t c0 = 0; c0 < wide; c0 += panel_width) {
        run_rows<F32Tile>(rows, ds + first, t, k_rows + c0 * t + first * panel_width, span, dq + c0, wide, false);
        run_rows<F32Tile>(span, ds_turned, backward_rows, q_panels + c0 * backward_rows, rows, dk + first * wide + c0, wide, true);
        run_rows<F32Tile>(span, p_turned, backward_rows, dy_panels + c0 * backward_rows, rows, dv + first * wide + c0, wide, true);
      }
      for (std::int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(job.dq + (row0 + r) * job.ld_dq + head * d, dq + r * wide, static_cast<std::size_t>(d) * sizeof(float));
    }
  for (std::int64_t j = 0; j < job.keys; ++j) {
    __builtin_memcpy(job.dk + j * job.ld_dk + kv_head * d, dk + j * wide, static_cast<std::size_t>(d) * sizeof(float));
    __builtin_memcpy(job.dv + j * job.ld_dv + kv_head * d, dv + j * wide, static_cast<std::size_t>(d) * sizeof(float));
  }
}

// ---- cross-entropy --------------------------------------------------------------------------------------------------------

// Largest logit and Σ exp(logit - largest) of a row; blocks are summed in f32, the blocks in f64.
inline void softmax_statistics(const float* logits, std::int64_t n, float* largest, double* sum) {
  float top = logits[0];
  if (n >= width) {
    Vec m = load(logits);
    for (std::int64_t i = width; i + width <= n; i += width) m = max(m, load(logits + i));
    top = reduce_max(m);
  }
  for (std::int64_t i = n / width * width; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  double total = 0;
  for (std::int64_t i = 0; i < n; ++i)
    if (logits[i] != logits[i]) total = static_cast<double>(logits[i]);  // exp takes NaN for a number that is very small
  constexpr std::int64_t block = 1024;
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = n - begin < block ? n : begin + block;
    Vec sums = set(0.0F);
    std::int64_t i = begin;
    for (; i + width <= end; i += width) sums = sums + exp(load(logits + i) - set(top));
    float part = reduce_add(sums);
    for (; i < end; ++i) {
      float lanes[width];
      store(lanes, exp(set(logits[i] - top)));
      part += lanes[0];
    }
    total += static_cast<double>(part);
  }
  *largest = top;
  *sum = total;
}

// d = scale·exp(logit - largest): the caller takes the target's share off. d may alias logits.
inline void scaled_softmax(const float* logits, std::int64_t n, float largest, float scale, float* d) {
  for_vectors(n, [&](std::int64_t i, std::int64_t count) { store_some(d + i, exp(load_some(logits + i, count) - set(largest)) * set(scale), count); });
}

inline TrainingKernels training_kernels() {
  return {.activation_forward = &activation_forward,
          .activation_backward = &activation_backward,
          .norm_statistics = &norm_statistics,
          .norm_backward = &norm_backward,
          .norm_weight_gradient = &norm_weight_gradient,
          .rope_backward = &rope_backward,
          .transpose_panels = &transpose_panels,
          .copy_panel = &copy_panel,
          .transpose = &transpose,
          .attention_backward_floats = &attention_backward_floats,
          .attention_backward = &attention_backward,
          .softmax_statistics = &softmax_statistics,
          .scaled_softmax = &scaled_softmax};
}
