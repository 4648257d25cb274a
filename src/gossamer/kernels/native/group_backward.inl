// Backward passes that read packed activations directly, so that no unpacked copy is made.

template <typename T>
static void times_table(const void* grad, const uint8_t* q, Grouped g, int64_t begin, int64_t end, const float* table,
                        void* data) {
  const T* dy = static_cast<const T*>(grad);
  T* out = static_cast<T*>(data);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t k = 0; k < g.groups; ++k) {
      const float* slope = table + k * 256;
      const int64_t at = (r * g.groups + k) * g.inner;
      for (int64_t i = 0; i < g.inner; ++i)
        store(out, at + i, load(dy, at + i) * slope[static_cast<int32_t>(q[at + i])]);
    }
  }
}

template <typename T>
static void softmax_backward(const void* grad, const uint8_t* q, int64_t cols, int64_t per_group, int64_t groups,
                             int64_t begin, int64_t end, const float* grid, void* data) {
  const int64_t whole = cols / kWidth * kWidth;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t k = r / per_group % groups;
    const float step = grid[k], beta = grid[groups + k];
    const T* dy = static_cast<const T*>(grad) + r * cols;
    const uint8_t* y = q + r * cols;
    T* out = static_cast<T*>(data) + r * cols;
    Floats sums = {0};
    for (int64_t i = 0; i < whole; i += kWidth) sums += load_lanes(dy + i) * (load_lanes(y + i) * step + beta);
    float dot = sum_lanes(sums);
    for (int64_t i = whole; i < cols; ++i) dot += load(dy, i) * (load(y, i) * step + beta);
    for (int64_t i = 0; i < whole; i += kWidth)
      store_lanes(out + i, (load_lanes(dy + i) - dot) * (load_lanes(y + i) * step + beta));
    for (int64_t i = whole; i < cols; ++i)
      store(out, i, (load(dy, i) - dot) * (load(y, i) * step + beta));
  }
}

// With xn = (x_hat - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - xn * mean(g * xn)).
template <typename T>
static void layer_norm_backward(const void* grad, const uint8_t* q, Grouped g, int64_t begin, int64_t end,
                                const float* grid, const float* mean, const float* rstd, const float* weight,
                                void* data, float* sums) {
  const int64_t width = g.groups * g.inner, whole = g.inner / kWidth * kWidth;
  float* sums_db = sums + width;
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(grad) + r * width;
    const uint8_t* p = q + r * width;
    T* out = static_cast<T*>(data) + r * width;
    Floats first = {0}, second = {0};
    for (int64_t k = 0; k < g.groups; ++k) {
      // xn = q * scale + shift, with the normalisation folded into the grid
      const float scale = grid[k] * rstd[r], shift = (grid[g.groups + k] - mean[r]) * rstd[r];
      const int64_t begin_k = k * g.inner, end_k = begin_k + g.inner;
      int64_t c = begin_k;
      for (; c < begin_k + whole; c += kWidth) {
        const Floats xn = load_lanes(p + c) * scale + shift, d = load_lanes(dy + c), gw = d * load_lanes(weight + c);
        store_lanes(sums + c, load_lanes(sums + c) + d * xn);
        store_lanes(sums_db + c, load_lanes(sums_db + c) + d);
        first += gw;
        second += gw * xn;
      }
      for (; c < end_k; ++c) {
        const float xn = load(p, c) * scale + shift, d = load(dy, c), gw = d * weight[c];
        sums[c] += d * xn;
        sums_db[c] += d;
        first[0] += gw;
        second[0] += gw * xn;
      }
    }
    const float a = sum_lanes(first) / static_cast<float>(width), b = sum_lanes(second) / static_cast<float>(width);
    for (int64_t k = 0; k < g.groups; ++k) {
      const float scale = grid[k] * rstd[r], shift = (grid[g.groups + k] - mean[r]) * rstd[r];
      const int64_t begin_k = k * g.inner, end_k = begin_k + g.inner;
      int64_t c = begin_k;
      for (; c < begin_k + whole; c += kWidth) {
        const Floats xn = load_lanes(p + c) * scale + shift, gw = load_lanes(dy + c) * load_lanes(weight + c);
        store_lanes(out + c, rstd[r] * (gw - a - xn * b));
      }
      for (; c < end_k; ++c) {
        const float xn = load(p, c) * scale + shift;
        store(out, c, rstd[r] * (load(dy, c) * weight[c] - a - xn * b));
      }
    }
  }
}
