// Sums of |w - x|^p and their gradients. Included once per instruction set.
//
// A tile keeps its sums in registers: kTile pixels times one or two registers of filters (or channels) wide. The exact
// form |w - x| is summed, not x + w - 2 min(x, w), which would save an instruction and cancel where x and w are close.

#if defined(__AVX512F__)
constexpr int kTile = 12;  // 24 of 32 registers hold sums
#else
constexpr int kTile = 6;  // 12 of 16
#endif

#if defined(__AVX512F__)
static inline Floats splat(float v) { return (Floats)_mm512_set1_ps(v); }
static inline Floats magnitude(Floats d) { return (Floats)_mm512_abs_ps((__m512)d); }
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
static inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
static inline Floats splat(float v) { return (Floats)_mm256_set1_ps(v); }
static inline Floats magnitude(Floats d) { return (Floats)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)d); }
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
static inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
static inline Floats splat(float v) { return Floats{v, v, v, v}; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
static inline Floats magnitude(Floats d) {
  typedef int32_t Bits __attribute__((vector_size(4 * kWidth)));
  return (Floats)((Bits)d & 0x7fffffff);
}
static inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

// |d|^q for 0 < q <= 2 to about 4e-7 of itself: 2^(q log2 |d|); 0 below 1e-30.
static inline Floats power(Floats d, float q) {
  const Floats a = magnitude(d);
  Ints bits = (Ints)larger(a, splat(1e-30f));
  Ints exponent = ((bits - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Floats m = (Floats)(bits - (exponent << 23)) - 1.0f;
  Floats s = splat(7.0376836292e-2f);  // log(1 + m) of Cephes
  const float log_terms[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                             -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  for (float term : log_terms) s = fused(s, m, splat(term));
  const Floats mm = m * m;
  const Floats log = fused(s * mm, m, fused(mm, splat(-0.5f), m));
  Floats z = (__builtin_convertvector(exponent, Floats) + log * 1.44269504088896341f) * q;
  z = larger(smaller(z, splat(126.0f)), splat(-126.0f));
  const Floats whole = (z + 12582912.0f) - 12582912.0f, r = z - whole;
  s = splat(1.5403530e-4f);  // 2^r on [-1/2, 1/2]
  const float exp_terms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (float term : exp_terms) s = fused(s, r, splat(term));
  const Floats value = (Floats)((Ints)s + (__builtin_convertvector(whole, Ints) << 23));
  return (Floats)((Ints)value & (Ints)(a >= 1e-30f));
}

// -- what is summed --------------------------------------------------------------------------------
struct Distance {
  Floats one = splat(1.0f);
  explicit Distance(float) {
#if defined(__AVX512F__) || defined(__AVX2__)
    asm("" : "+v"(one));  // the difference as a fused multiply-add: it runs beside the sums, which take the adders
#endif
  }
  inline Floats operator()(Floats w, Floats x) const {
#if defined(__AVX512F__)
    return magnitude((Floats)_mm512_fnmadd_ps((__m512)x, (__m512)one, (__m512)w));
#elif defined(__AVX2__)
    return magnitude((Floats)_mm256_fnmadd_ps((__m256)x, (__m256)one, (__m256)w));
#else
    return magnitude(w - x);
#endif
  }
};
struct Powered {
  float p;
  explicit Powered(float p) : p(p) {}
  inline Floats operator()(Floats w, Floats x) const { return power(w - x, p); }
};

struct Plain {
  explicit Plain(float) {}
  inline Floats operator()(Floats d) const { return d; }
};
struct Clamped {
  Floats one = splat(1.0f);
  explicit Clamped(float) {}
  inline Floats operator()(Floats d) const { return smaller(larger(d, -one), one); }
};
struct Signed {
  explicit Signed(float) {}
  inline Floats operator()(Floats d) const { return smaller(larger(d * 3e38f, splat(-1.0f)), splat(1.0f)); }
};
struct Derived {
  float p;
  explicit Derived(float p) : p(p) {}
  inline Floats operator()(Floats d) const {
    const Ints sign = (Ints)d & static_cast<int32_t>(0x80000000u);
    return (Floats)((Ints)(power(d, p - 1.0f) * p) | sign);
  }
};
struct ClampedDerived {
  Derived derived;
  Clamped clamped;
  explicit ClampedDerived(float p) : derived(p), clamped(p) {}
  inline Floats operator()(Floats d) const { return clamped(derived(d)); }
};

// -- layouts ---------------------------------------------------------------------------------------
// Transposes 8 x 8 floats; rows of `in` lie `from` apart, those of `out` `to`.
static inline void transpose(const float* in, int64_t from, float* out, int64_t to) {
#if defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * from);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int k = 0; k < 8; ++k) out[k * to + i] = in[i * from + k];
#endif
}

// The same for bytes: halves, quarters and eighths of eight words change places.
static inline void transpose(const uint8_t* in, int64_t from, uint8_t* out, int64_t to) {
  uint64_t r[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(r + i, in + i * from, 8);
  const uint64_t masks[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    const int far = 4 >> k, bits = 32 >> k;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      if (i & far) continue;
      const uint64_t t = ((r[i] >> bits) ^ r[i + far]) & masks[k];
      r[i + far] ^= t;
      r[i] ^= t << bits;
    }
  }
  for (int i = 0; i < 8; ++i) __builtin_memcpy(out + i * to, r + i, 8);
}

// Turns [rows][cols] into [cols][rows]: blocks of 8 x 8, the last ones overlapping, single values where it is smaller.
template <typename T>
static void transpose_all(const T* in, int64_t from, int64_t rows, int64_t cols, T* out, int64_t to) {
  if (rows < 8 || cols < 8) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) out[c * to + r] = in[r * from + c];
    return;
  }
  for (int64_t r = 0; r < rows; r += 8) {
    const int64_t i = r + 8 <= rows ? r : rows - 8;
    for (int64_t c = 0; c < cols; c += 8) {
      const int64_t k = c + 8 <= cols ? c : cols - 8;
      transpose(in + i * from + k, from, out + k * to + i, to);
    }
  }
}

static void lay_out(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, Laid to, int64_t begin,
                    int64_t end, float* out) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t h = r % to.rows - to.top;
    float* row = out + r * to.row();
    if (h < 0 || h >= height || to.cols != width || to.channels != channels)
      __builtin_memset(row, 0, sizeof(float) * to.row());
    if (h < 0 || h >= height) continue;
    const float* from = x + r / to.rows * s.n + h * s.h;
    row += to.left * to.channels;
    if (s.c == 1) {
      for (int64_t w = 0; w < width; ++w)
        __builtin_memcpy(row + w * to.channels, from + w * s.w, sizeof(float) * channels);
    } else if (s.w == 1) {
      transpose_all(from, s.c, channels, width, row, to.channels);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t w = 0; w < width; ++w) row[w * to.channels + c] = from[c * s.c + w * s.w];
    }
  }
}

// Codes of a register of values, clamped and to the nearest integer (halves to even), still as floats.
static inline Floats codes_of(Floats v, Grid g) {
  v = smaller(larger(v / g.step, splat(-1024.0f)), splat(1024.0f));
  v = ((v + 12582912.0f) - 12582912.0f) + g.zero;
  return smaller(larger(v, splat(0.0f)), splat(255.0f));
}

static inline void store_codes(uint8_t* out, Floats v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)v)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvttps_epi32((__m256)v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
#else
  for (int l = 0; l < kWidth; ++l) out[l] = static_cast<uint8_t>(v[l]);
#endif
}

static void round_line(const float* from, int64_t n, Grid grid, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_codes(codes + i, codes_of(load_lanes(from + i), grid));
  if (i == n) return;
#if defined(__AVX512F__)
  const __mmask16 some = static_cast<__mmask16>((1u << (n - i)) - 1);
  const Floats v = codes_of((Floats)_mm512_maskz_loadu_ps(some, from + i), grid);
  _mm_mask_storeu_epi8(codes + i, some, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)v)));
  return;
#endif
  float rest[kWidth] = {};
  uint8_t rounded[kWidth];
  __builtin_memcpy(rest, from + i, sizeof(float) * (n - i));
  store_codes(rounded, codes_of(load_lanes(rest), grid));
  __builtin_memcpy(codes + i, rounded, n - i);
}

#if defined(__AVX512F__)
// At most 16 values, 1 or 2 apart; nothing behind the last one is read.
static inline Floats load_apart(const float* from, int64_t step, int64_t n) {
  if (n > kWidth) n = kWidth;
  const uint32_t seen = static_cast<uint32_t>((uint64_t{1} << (step * (n - 1) + 1)) - 1);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(seen), from);
  if (step == 1) return (Floats)low;
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(seen >> 16), from + kWidth);
  return (Floats)_mm512_permutex2var_ps(low, even, high);
}
#endif

// Rounds at most 64 values that lie `step` apart.
static void round_apart(const float* from, int64_t step, int64_t n, Grid grid, uint8_t* codes) {
  if (step == 1) return round_line(from, n, grid, codes);
  float apart[64];
#if defined(__AVX512F__)
  if (step == 2)
    for (int64_t i = 0; i < n; i += kWidth) store_lanes(apart + i, load_apart(from + 2 * i, 2, n - i));
#else
  if (step == 2)  // a constant step compiles to loads and shuffles
    for (int64_t i = 0; i < n; ++i) apart[i] = from[i * 2];
#endif
  else
    for (int64_t i = 0; i < n; ++i) apart[i] = from[i * step];
  round_line(apart, n, grid, codes);
}

// One row of the image, rounded: [width, channels] of `to`.
static void lay_out_line(const float* from, Strides s, int64_t channels, int64_t width, Laid to, Grid grid,
                         uint8_t* row) {
  if (s.c == 1) {
    for (int64_t w = 0; w < width; ++w) round_line(from + w * s.w, channels, grid, row + w * to.channels);
    return;
  }
  constexpr int64_t kChannels = 32, kColumns = 64;
  uint8_t codes[kChannels * kColumns];
  for (int64_t c = 0; c < channels; c += kChannels) {
    const int64_t rows = channels - c < kChannels ? channels - c : kChannels;
    for (int64_t w = 0; w < width; w += kColumns) {
      const int64_t cols = width - w < kColumns ? width - w : kColumns;
      for (int64_t i = 0; i < rows; ++i)
        round_apart(from + (c + i) * s.c + w * s.w, s.w, cols, grid, codes + i * kColumns);
      transpose_all(codes, kColumns, rows, cols, row + w * to.channels + c, to.channels);
    }
  }
}

static void lay_out_codes(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, Laid to,
                          Grid grid, int64_t begin, int64_t end, uint8_t* out) {
  uint8_t border;
  const float nothing = 0.0f;
  round_line(&nothing, 1, grid, &border);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t h = r % to.rows - to.top;
    const bool inside = h >= 0 && h < height;
    uint8_t* row = out + r * to.row();
    if (to.channels != channels) __builtin_memset(row, 0, to.row());
    for (int64_t w = 0; w < to.cols; ++w)
      if (!inside || w < to.left || w >= to.left + width) __builtin_memset(row + w * to.channels, border, channels);
    if (inside)
      lay_out_line(x + r / to.rows * s.n + h * s.h, s, channels, width, to, grid, row + to.left * to.channels);
  }
}

// Rounds `cols` (at most 64) columns of a row of up to eight channels to [column, 8] bytes; seven columns more may be
// written.
static inline void lay_out_eight(const float* from, Strides s, int64_t channels, int64_t cols, Grid grid, uint8_t* to) {
#if defined(__AVX512F__)
  if (s.w == 1 || s.w == 2) {
    const __m512i pair = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    for (int64_t w = 0; w < cols; w += kWidth) {
      Ints words[2] = {};  // four channels' bytes in a lane
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        if (i >= channels) break;
        const Floats v = codes_of(load_apart(from + i * s.c + w * s.w, s.w, cols - w), grid);
        words[i / 4] |= __builtin_convertvector(v, Ints) << static_cast<int>(i % 4 * 8);
      }
      const __m512i low = (__m512i)words[0], high = (__m512i)words[1];
      _mm512_storeu_si512(to + w * 8, _mm512_permutex2var_epi32(low, pair, high));
      if (cols - w > 8)
        _mm512_storeu_si512(to + w * 8 + 64,
                            _mm512_permutex2var_epi32(low, _mm512_add_epi32(pair, _mm512_set1_epi32(8)), high));
    }
    return;
  }
#endif
  uint8_t codes[8 * 64] = {};
  for (int64_t i = 0; i < channels; ++i) round_apart(from + i * s.c, s.w, cols, grid, codes + i * 64);
  for (int64_t k = 0; k < cols; k += 8) transpose(codes + k, 64, to + k * 8, 8);
}

// Units: planes of eight channels of an image, [pixel, 8], `plane` bytes apart.
static void lay_out_planes(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, int64_t plane,
                           Grid grid, int64_t begin, int64_t end, uint8_t* out) {
  const int64_t planes = (channels + 7) / 8;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % planes * 8, count = channels - first < 8 ? channels - first : 8;
    const float* from = x + unit / planes * s.n + first * s.c;
    for (int64_t h = 0; h < height; ++h)
      for (int64_t w = 0; w < width; w += 64)
        lay_out_eight(from + h * s.h + w * s.w, s, count, width - w < 64 ? width - w : 64, grid,
                      out + unit * plane + (h * width + w) * 8);
  }
}

static void pack_filters(const float* w, AdderShape s, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kColumns = 64;
  const int64_t size = s.channels * s.taps();
  float turned[kColumns * kWidth];
  for (int64_t j = begin; j < end; ++j) {
    const int64_t left = s.filters - j * kWidth, rows = left < kWidth ? left : kWidth;
    __builtin_memset(turned, 0, sizeof turned);
    float* registers = out + (j - begin) * size * kWidth;
    for (int64_t i = 0; i < size; i += kColumns) {
      const int64_t cols = size - i < kColumns ? size - i : kColumns;
      transpose_all(w + j * kWidth * size + i, size, rows, cols, turned, kWidth);
      for (int64_t k = 0; k < cols; ++k) {
        const int64_t c = (i + k) / s.taps(), t = (i + k) % s.taps();
        __builtin_memcpy(registers + (t * s.channels + c) * kWidth, turned + k * kWidth, sizeof(float) * kWidth);
      }
    }
  }
}

static void pack_channels(const float* w, AdderShape s, int64_t begin, int64_t end, float* out) {
  const int64_t size = s.channels * s.taps();
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t o = 0; o < s.filters; ++o) {
      for (int64_t t = 0; t < s.taps(); ++t) {
        float* lanes = out + ((j * s.taps() + t) * s.filters + o) * kWidth;
        for (int l = 0; l < kWidth; ++l) {
          const int64_t c = j * kWidth + l;
          lanes[l] = c < s.channels ? w[o * size + c * s.taps() + t] : 0.0f;
        }
      }
    }
  }
}

// Writes lanes [pixels][width], readable up to eight rows further, to `count` channels, `step` apart, at the pixels'
// places.
static inline void put(const float* lanes, int64_t width, int64_t pixels, int64_t count, const int64_t* places,
                       int64_t step, float* out) {
  const bool together = places[pixels - 1] - places[0] == pixels - 1;
  if (count > width) count = width;
  if (step == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      if (count == 8) __builtin_memcpy(out + places[p], lanes + p * width, 32);  // of a known size: no call
      else __builtin_memcpy(out + places[p], lanes + p * width, sizeof(float) * count);
    }
    return;
  }
  if (!together || width % 8 != 0) {
    for (int64_t l = 0; l < count; ++l)
      for (int64_t p = 0; p < pixels; ++p) out[l * step + places[p]] = lanes[p * width + l];
    return;
  }
  float block[64];
  for (int64_t l = 0; l < count; l += 8) {
    const int64_t rows = count - l < 8 ? count - l : 8;
    for (int64_t p = 0; p < pixels; p += 8) {
      float* to = out + l * step + places[p];
      const int64_t cols = pixels - p < 8 ? pixels - p : 8;
      if (rows == 8 && cols == 8) {
        transpose(lanes + p * width + l, width, to, step);
        continue;
      }
      transpose(lanes + p * width + l, width, block, 8);
      for (int64_t i = 0; i < rows; ++i) {
        if (cols == 4) __builtin_memcpy(to + i * step, block + i * 8, 16);
        else __builtin_memcpy(to + i * step, block + i * 8, sizeof(float) * cols);
      }
    }
  }
}

static inline void put(const Floats* sums, int64_t pixels, int64_t count, float sign, const int64_t* places,
                       int64_t step, float* out) {
  float lanes[(kTile + 8) * kWidth];
  for (int64_t p = 0; p < kTile; ++p) store_lanes(lanes + p * kWidth, sums[p] * sign);
  put(lanes, kWidth, pixels, count, places, step, out);
}

// -- forward ---------------------------------------------------------------------------------------
template <int P, int V, class Op>
static void forward_tile(const Op op, const float* const* pixels, int64_t row, const float* w, int64_t next,
                         int64_t rows, int64_t run, Floats (*sums)[kTile]) {
  Floats acc[V][P];
  const float* at[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    at[p] = pixels[p];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[v][p] = Floats{};
  }
  for (int64_t u = 0; u < rows; ++u) {
    for (int64_t r = 0; r < run; ++r) {
      Floats f[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) f[v] = load_lanes(w + v * next + r * kWidth);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Floats x = splat(at[p][r]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[v][p] += op(f[v], x);
      }
    }
    w += run * kWidth;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) at[p] += row;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[v][p] = acc[v][p];
}

template <int V, class Op>
static void forward_pixels(const Op op, const float* const* pixels, int64_t left, int64_t row, const float* w,
                           int64_t next, int64_t rows, int64_t run, Floats (*sums)[kTile]) {
  if (left > kTile * 2 / 3) return forward_tile<kTile, V>(op, pixels, row, w, next, rows, run, sums);
  if (left > kTile / 3) return forward_tile<kTile * 2 / 3, V>(op, pixels, row, w, next, rows, run, sums);
  forward_tile<kTile / 3, V>(op, pixels, row, w, next, rows, run, sums);
}

// Pixels in order, from the m-th on: divisions cost more than what is done for a pixel of a small filter.
struct Walk {
  int64_t height, width, n, h, w;
  Walk(int64_t m, int64_t height, int64_t width)
      : height(height), width(width), n(m / (height * width)), h(m / width % height), w(m % width) {}
  inline void next() {
    if (++w < width) return;
    w = 0;
    if (++h < height) return;
    h = 0, ++n;
  }
};

// Fills the places of the output pixels [first, first + kStrip) in the laid-out input and in the output; what goes
// beyond the last repeats it. Returns how many there are.
template <typename T>
static int64_t strip_of(const T* x, Laid laid, AdderShape s, int64_t first, Strides o, const T** pixels,
                        int64_t* places) {
  const int64_t rest = s.pixels() - first, count = rest < kStrip ? rest : kStrip;
  Walk at(first, s.out_h, s.out_w);
  for (int64_t i = 0; i < count; ++i, at.next()) {
    pixels[i] = x + at.n * laid.image() + (at.h * s.stride_h * laid.cols + at.w * s.stride_w) * laid.channels;
    places[i] = at.n * o.n + at.h * o.h + at.w * o.w;
  }
  for (int64_t i = count; i < kStrip + kTile; ++i) pixels[i] = pixels[count - 1], places[i] = places[count - 1];
  return count;
}

template <class Op>
static void forward_by(const float* x, Laid laid, const float* w, AdderShape s, float p, Span registers, Span strips,
                       Strides o, float* out) {
  const Op op(p);
  const float* pixels[kStrip + kTile];
  int64_t places[kStrip + kTile];
  Floats sums[2][kTile];
  const int64_t run = s.kernel_w * s.channels, next = s.kernel_h * run * kWidth;
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const int64_t count = strip_of(x, laid, s, strip * kStrip, o, pixels, places);
    for (int64_t j = registers.begin; j < registers.end; j += 2) {
      const bool two = j + 1 < registers.end;
      const float* f = w + (j - registers.begin) * next;
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t left = count - i < kTile ? count - i : kTile;
        if (two) forward_pixels<2>(op, pixels + i, left, laid.row(), f, next, s.kernel_h, run, sums);
        else forward_pixels<1>(op, pixels + i, left, laid.row(), f, next, s.kernel_h, run, sums);
        for (int v = 0; v < 1 + two; ++v) {
          const int64_t from = (j + v) * kWidth;
          put(sums[v], left, s.filters - from, -1.0f, places + i, o.c, out + from * o.c);
        }
      }
    }
  }
}

static void adder_forward(const float* x, Laid laid, const float* w, AdderShape s, float p, Span registers,
                          Span strips, Strides o, float* out) {
  if (p == 1.0f) forward_by<Distance>(x, laid, w, s, p, registers, strips, o, out);
  else forward_by<Powered>(x, laid, w, s, p, registers, strips, o, out);
}

// -- gradient of the input -------------------------------------------------------------------------
template <class Op>
static void input_grad_tile(const Op op, const float* const* grads, const float* const* xs, int64_t channel,
                            int64_t step_h, int64_t step_w, const float* w, int64_t filters, int64_t kernel_w,
                            const int64_t (*range)[3], Floats* sums) {
  Floats acc[kTile], x[kTile];
#pragma GCC unroll 16
  for (int p = 0; p < kTile; ++p) acc[p] = Floats{}, x[p] = load_lanes(xs[p] + channel);
  for (int64_t u = range[0][0], i = 0; u < range[0][1]; u += range[0][2], ++i) {
    for (int64_t v = range[1][0], k = 0; v < range[1][1]; v += range[1][2], ++k) {
      const float* lanes = w + (u * kernel_w + v) * filters * kWidth;
      const int64_t back = i * step_h + k * step_w;
      const float* g[kTile];
#pragma GCC unroll 16
      for (int p = 0; p < kTile; ++p) g[p] = grads[p] - back;
      for (int64_t o = 0; o < filters; ++o) {
        const Floats f = load_lanes(lanes + o * kWidth);
#pragma GCC unroll 16
        for (int p = 0; p < kTile; ++p) acc[p] = fused(splat(g[p][o]), op(f - x[p]), acc[p]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kTile; ++p) sums[p] = acc[p];
}

template <class Op>
static void input_grad_by(const float* grad, Laid laid, const float* w, const float* x, Laid x_laid, AdderShape s,
                          float p, int64_t phase_h, int64_t phase_w, int64_t begin, int64_t end, Strides o,
                          float* out) {
  const Op op(p);
  const float *grads[kTile], *xs[kTile];
  int64_t places[kTile];
  Floats sums[kTile];
  // rows and columns of the input at which this phase's taps (phase, phase + stride, ...) meet an output pixel
  const int64_t first_h = ((phase_h - s.pad_h) % s.stride_h + s.stride_h) % s.stride_h;
  const int64_t first_w = ((phase_w - s.pad_w) % s.stride_w + s.stride_w) % s.stride_w;
  const int64_t many_h = (s.height - first_h + s.stride_h - 1) / s.stride_h;
  const int64_t many_w = (s.width - first_w + s.stride_w - 1) / s.stride_w, total = s.batch * many_h * many_w;
  const int64_t range[2][3] = {{phase_h, s.kernel_h, s.stride_h}, {phase_w, s.kernel_w, s.stride_w}};
  const int64_t registers = (s.channels + kWidth - 1) / kWidth, next = s.taps() * s.filters * kWidth;
  Walk at(begin * kStrip, many_h, many_w);
  for (int64_t i = begin * kStrip; i < end * kStrip && i < total; i += kTile) {
    const int64_t left = total - i < kTile ? total - i : kTile;
    for (int64_t k = 0; k < kTile; ++k) {
      if (k >= left) {
        grads[k] = grads[left - 1], xs[k] = xs[left - 1];
        continue;
      }
      const int64_t n = at.n, h = first_h + at.h * s.stride_h, c = first_w + at.w * s.stride_w;
      at.next();
      const int64_t gh = (h + s.pad_h - phase_h) / s.stride_h + laid.top;
      const int64_t gw = (c + s.pad_w - phase_w) / s.stride_w + laid.left;
      grads[k] = grad + n * laid.image() + (gh * laid.cols + gw) * laid.channels;
      xs[k] = x + n * x_laid.image() + ((h + x_laid.top) * x_laid.cols + c + x_laid.left) * x_laid.channels;
      places[k] = n * o.n + h * o.h + c * o.w;
    }
    for (int64_t j = 0; j < registers; ++j) {
      input_grad_tile(op, grads, xs, j * kWidth, laid.row(), laid.channels, w + j * next, s.filters, s.kernel_w, range,
                      sums);
      put(sums, left, s.channels - j * kWidth, 1.0f, places, o.c, out + j * kWidth * o.c);
    }
  }
}

static void adder_input_grad(const float* grad, Laid laid, const float* w, const float* x, Laid x_laid, AdderShape s,
                             Rule rule, float p, int64_t phase_h, int64_t phase_w, int64_t begin, int64_t end,
                             Strides o, float* out) {
#define GOSSAMER_INPUT_GRAD(Op) \
  return input_grad_by<Op>(grad, laid, w, x, x_laid, s, p, phase_h, phase_w, begin, end, o, out)
  if (rule == kDifference) GOSSAMER_INPUT_GRAD(Plain);
  if (rule == kClamp) GOSSAMER_INPUT_GRAD(Clamped);
  if (rule == kSign) GOSSAMER_INPUT_GRAD(Signed);
  if (rule == kPower) GOSSAMER_INPUT_GRAD(Derived);
  GOSSAMER_INPUT_GRAD(ClampedDerived);
}

// -- gradient of the filters -----------------------------------------------------------------------
template <class Op>
static void weight_grad_tile(const Op op, const float* grad, int64_t stride, const float* x, Laid laid, AdderShape s,
                             const Floats* w, Floats* total) {
  for (int64_t n = 0; n < s.batch; ++n) {  // sums of images are added up: short sums lose less
    Floats acc[kFilters];
#pragma GCC unroll 8
    for (int k = 0; k < kFilters; ++k) acc[k] = Floats{};
    for (int64_t h = 0; h < s.out_h; ++h) {
      const float* at = x + n * laid.image() + h * s.stride_h * laid.row();
      const float* g = grad + (n * s.out_h + h) * s.out_w * stride;
      for (int64_t c = 0; c < s.out_w; ++c, at += s.stride_w * laid.channels, g += stride) {
        const Floats v = load_lanes(at);
#pragma GCC unroll 8
        for (int k = 0; k < kFilters; ++k) acc[k] = fused(splat(g[k]), op(v - w[k]), acc[k]);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kFilters; ++k) total[k] += acc[k];
  }
}

template <class Op>
static void weight_grad_by(const float* grad, int64_t stride, const float* x, Laid laid, const float* w, AdderShape s,
                           float p, int64_t begin, int64_t end, float* out) {
  const Op op(p);
  const int64_t stretches = stride / kFilters;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t o = unit % stretches * kFilters, t = unit / stretches % s.taps(), j = unit / stretches / s.taps();
    Floats f[kFilters], total[kFilters];
    for (int k = 0; k < kFilters; ++k) {
      total[k] = Floats{};
      f[k] = o + k < s.filters ? load_lanes(w + ((j * s.taps() + t) * s.filters + o + k) * kWidth) : Floats{};
    }
    const int64_t tap = (t / s.kernel_w * laid.cols + t % s.kernel_w) * laid.channels + j * kWidth;
    weight_grad_tile(op, grad + o, stride, x + tap, laid, s, f, total);
    for (int k = 0; k < kFilters && o + k < s.filters; ++k) {
      float lanes[kWidth];
      __builtin_memcpy(lanes, total + k, sizeof lanes);
      for (int64_t l = 0; l < kWidth && j * kWidth + l < s.channels; ++l)
        out[((o + k) * s.channels + j * kWidth + l) * s.taps() + t] = lanes[l];
    }
  }
}

static void adder_weight_grad(const float* grad, int64_t stride, const float* x, Laid laid, const float* w,
                              AdderShape s, Rule rule, float p, int64_t begin, int64_t end, float* out) {
#define GOSSAMER_WEIGHT_GRAD(Op) return weight_grad_by<Op>(grad, stride, x, laid, w, s, p, begin, end, out)
  if (rule == kDifference) GOSSAMER_WEIGHT_GRAD(Plain);
  if (rule == kClamp) GOSSAMER_WEIGHT_GRAD(Clamped);
  if (rule == kSign) GOSSAMER_WEIGHT_GRAD(Signed);
  if (rule == kPower) GOSSAMER_WEIGHT_GRAD(Derived);
  GOSSAMER_WEIGHT_GRAD(ClampedDerived);
}

// -- 8 bits: sums of absolute differences of bytes, eight in one instruction's lane --------------------------------
#if defined(__AVX512BW__)
typedef __m512i Bytes;
static inline Bytes splat_bytes(const uint8_t* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return _mm512_set1_epi64(v);
}
static inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Bytes add_distance(Bytes sum, Bytes a, Bytes b) { return _mm512_add_epi64(sum, _mm512_sad_epu8(a, b)); }
static inline Bytes no_bytes() { return _mm512_setzero_si512(); }
#elif defined(__AVX2__)
typedef __m256i Bytes;
static inline Bytes splat_bytes(const uint8_t* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return _mm256_set1_epi64x(v);
}
static inline Bytes load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline Bytes add_distance(Bytes sum, Bytes a, Bytes b) { return _mm256_add_epi64(sum, _mm256_sad_epu8(a, b)); }
static inline Bytes no_bytes() { return _mm256_setzero_si256(); }
#elif defined(__ARM_NEON)  // compiled for aarch64, not run there
typedef uint64x2_t Bytes;
static inline Bytes splat_bytes(const uint8_t* p) { return vreinterpretq_u64_u8(vcombine_u8(vld1_u8(p), vld1_u8(p))); }
static inline Bytes load_bytes(const uint8_t* p) { return vreinterpretq_u64_u8(vld1q_u8(p)); }
static inline Bytes add_distance(Bytes sum, Bytes a, Bytes b) {
  const uint8x16_t d = vabdq_u8(vreinterpretq_u8_u64(a), vreinterpretq_u8_u64(b));
  return vpadalq_u32(sum, vpaddlq_u16(vpaddlq_u8(d)));
}
static inline Bytes no_bytes() { return vdupq_n_u64(0); }
#else
struct Bytes {
  uint8_t b[16];
};
static inline Bytes load_bytes(const uint8_t* p) {
  Bytes v;
  __builtin_memcpy(&v, p, 16);
  return v;
}
static inline Bytes splat_bytes(const uint8_t* p) {
  Bytes v;
  __builtin_memcpy(&v, p, 8);
  __builtin_memcpy(v.b + 8, p, 8);
  return v;
}
static inline Bytes no_bytes() { return Bytes{}; }
static inline Bytes add_distance(Bytes sum, Bytes a, Bytes b) {
  int64_t lanes[2];
  __builtin_memcpy(lanes, &sum, 16);
  for (int l = 0; l < 2; ++l) {
    int32_t d = 0;
    for (int i = 8 * l; i < 8 * l + 8; ++i) d += a.b[i] > b.b[i] ? a.b[i] - b.b[i] : b.b[i] - a.b[i];
    lanes[l] += d;
  }
  __builtin_memcpy(&sum, lanes, 16);
  return sum;
}
#endif
constexpr int kGroups = sizeof(Bytes) / 8;

template <int P, int V>
static void codes_tile(const uint8_t* const* pixels, int64_t row, const uint8_t* w, int64_t next, int64_t rows,
                       int64_t run, Bytes (*sums)[kTile]) {
  Bytes acc[V][P];
  const uint8_t* at[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    at[p] = pixels[p];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[v][p] = no_bytes();
  }
  for (int64_t u = 0; u < rows; ++u) {
    for (int64_t r = 0; r < run; r += 8) {
      Bytes f[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) f[v] = load_bytes(w + v * next + r * kGroups);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Bytes x = splat_bytes(at[p] + r);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[v][p] = add_distance(acc[v][p], f[v], x);
      }
    }
    w += run * kGroups;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) at[p] += row;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[v][p] = acc[v][p];
}

template <int V>
static void codes_pixels(const uint8_t* const* pixels, int64_t left, int64_t row, const uint8_t* w, int64_t next,
                         int64_t rows, int64_t run, Bytes (*sums)[kTile]) {
  if (left > kTile * 2 / 3) return codes_tile<kTile, V>(pixels, row, w, next, rows, run, sums);
  if (left > kTile / 3) return codes_tile<kTile * 2 / 3, V>(pixels, row, w, next, rows, run, sums);
  codes_tile<kTile / 3, V>(pixels, row, w, next, rows, run, sums);
}

// lanes = shift - gain * sums, of filters from `from` on, `count` of which are there.
static inline void scaled(const Bytes* sums, int64_t pixels, Grid grid, int64_t from, int64_t count, float* lanes) {
  float gain[kGroups] = {}, shift[kGroups] = {};
  for (int64_t l = 0; l < kGroups && l < count; ++l) gain[l] = grid.gain[from + l], shift[l] = grid.shift[from + l];
#if defined(__AVX512DQ__)
  const __m256 times = _mm256_loadu_ps(gain), from_where = _mm256_loadu_ps(shift);
  for (int64_t p = 0; p < pixels; ++p)
    _mm256_storeu_ps(lanes + p * 8, _mm256_sub_ps(from_where, _mm256_mul_ps(times, _mm512_cvtepi64_ps(sums[p]))));
#else
  for (int64_t p = 0; p < pixels; ++p) {
    int64_t wide[kGroups];
    __builtin_memcpy(wide, sums + p, sizeof wide);
    for (int64_t l = 0; l < kGroups; ++l)
      lanes[p * kGroups + l] = shift[l] - gain[l] * static_cast<float>(static_cast<int32_t>(wide[l]));
  }
#endif
}

static void adder_forward_codes(const uint8_t* x, Laid laid, const uint8_t* w, AdderShape s, Grid grid,
                                Span registers, Span strips, Strides o, float* out) {
  const uint8_t* pixels[kStrip + kTile];
  int64_t places[kStrip + kTile];
  Bytes sums[2][kTile];
  const int64_t run = s.kernel_w * laid.channels, next = s.kernel_h * run * kGroups;
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const int64_t count = strip_of(x, laid, s, strip * kStrip, o, pixels, places);
    for (int64_t j = registers.begin; j < registers.end; j += 2) {
      const bool two = j + 1 < registers.end;
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t left = count - i < kTile ? count - i : kTile;
        if (two) codes_pixels<2>(pixels + i, left, laid.row(), w + j * next, next, s.kernel_h, run, sums);
        else codes_pixels<1>(pixels + i, left, laid.row(), w + j * next, next, s.kernel_h, run, sums);
        for (int v = 0; v < 1 + two; ++v) {
          const int64_t from = (j + v) * kGroups;
          float lanes[(kTile + 8) * kGroups];
          scaled(sums[v], left, grid, from, s.filters - from, lanes);
          put(lanes, kGroups, left, s.filters - from, places + i, o.c, out + from * o.c);
        }
      }
    }
  }
}

// Sums of one filter for kGroups neighbouring pixels, scaled, to `count` of them.
static inline void put_pixels(Bytes sums, float gain, float shift, int64_t count, float* out) {
#if defined(__AVX512DQ__)
  const __m256 v = _mm256_sub_ps(_mm256_set1_ps(shift), _mm256_mul_ps(_mm256_set1_ps(gain), _mm512_cvtepi64_ps(sums)));
  if (count >= kGroups) _mm256_storeu_ps(out, v);
  else _mm256_mask_storeu_ps(out, static_cast<__mmask8>((1u << count) - 1), v);
#else
  int64_t wide[kGroups];
  __builtin_memcpy(wide, &sums, sizeof wide);
  for (int64_t l = 0; l < kGroups && l < count; ++l)
    out[l] = shift - gain * static_cast<float>(static_cast<int32_t>(wide[l]));
#endif
}

// Filters of one tap on planes: registers hold pixels, so that sums lie as an image [O, H, W] does.
static void planes_tile(const uint8_t* x, int64_t plane, int64_t planes, const uint8_t* w, Bytes (*sums)[2]) {
  Bytes acc[kGroups][2];
#pragma GCC unroll 8
  for (int f = 0; f < kGroups; ++f) acc[f][0] = acc[f][1] = no_bytes();
  for (int64_t g = 0; g < planes; ++g) {
    const Bytes low = load_bytes(x + g * plane), high = load_bytes(x + g * plane + sizeof(Bytes));
#pragma GCC unroll 8
    for (int f = 0; f < kGroups; ++f) {
      const Bytes filter = splat_bytes(w + (g * kGroups + f) * 8);
      acc[f][0] = add_distance(acc[f][0], low, filter);
      acc[f][1] = add_distance(acc[f][1], high, filter);
    }
  }
#pragma GCC unroll 8
  for (int f = 0; f < kGroups; ++f) sums[f][0] = acc[f][0], sums[f][1] = acc[f][1];
}

static void adder_forward_planes(const uint8_t* x, int64_t plane, const uint8_t* w, AdderShape s, Grid grid,
                                 Span registers, Span strips, Strides o, float* out) {
  Bytes sums[kGroups][2];
  const int64_t planes = (s.channels + 7) / 8, size = s.out_h * s.out_w, total = s.pixels();
  const int64_t last = strips.end * kStrip < total ? strips.end * kStrip : total;
  for (int64_t from = strips.begin * kStrip, to; from < last; from = to) {  // what the span has of one image
    const int64_t n = from / size;
    to = (n + 1) * size < last ? (n + 1) * size : last;
    for (int64_t m = from - n * size; m < to - n * size; m += 2 * kGroups) {
      const int64_t left = to - n * size - m;
      for (int64_t j = registers.begin; j < registers.end; ++j) {
        planes_tile(x + n * planes * plane + m * 8, plane, planes, w + j * planes * sizeof(Bytes), sums);
        for (int64_t f = 0; f < kGroups && j * kGroups + f < s.filters; ++f) {
          const int64_t filter = j * kGroups + f;
          float* place = out + n * o.n + filter * o.c + m;
          put_pixels(sums[f][0], grid.gain[filter], grid.shift[filter], left, place);
          if (left > kGroups)
            put_pixels(sums[f][1], grid.gain[filter], grid.shift[filter], left - kGroups, place + kGroups);
        }
      }
    }
  }
}

constexpr AdderTable kAdder = {kWidth,           kGroups,           lay_out,             lay_out_codes,
                               lay_out_planes,   pack_filters,      pack_channels,       adder_forward,
                               adder_input_grad, adder_weight_grad, adder_forward_codes, adder_forward_planes};
