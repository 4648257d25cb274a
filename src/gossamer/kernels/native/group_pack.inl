// Group-wise extremes, quantization with stochastic rounding, and back. Included once per instruction set.
// No std:: templates here: the linker could pick the copy compiled for a larger instruction set.

static inline float load(const float* p, int64_t i) { return p[i]; }
static inline float load(const uint16_t* p, int64_t i) {
  uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline float load(const uint8_t* p, int64_t i) { return static_cast<float>(static_cast<int32_t>(p[i])); }
static inline void store(float* p, int64_t i, float v) { p[i] = v; }
static inline void store(uint16_t* p, int64_t i, float v) {  // round to nearest even, as torch does
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  p[i] = static_cast<uint16_t>((v != v ? 0x7fc00000u : rounded) >> 16);
}

// Neighbours in one register, in the compilers' own vector types.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));

static inline Floats load_lanes(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// Widening loads: GCC takes __builtin_convertvector from bytes apart, hence the intrinsics.
#if defined(__AVX512F__)
static inline Floats load_lanes(const uint8_t* p) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline Floats load_lanes(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Floats)_mm512_slli_epi32(wide, 16);
}
#elif defined(__AVX2__)
static inline Floats load_lanes(const uint8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline Floats load_lanes(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Floats)_mm256_slli_epi32(wide, 16);
}
#else
template <typename S>
static inline Floats load_lanes(const S* p) {
  Floats v;
  for (int l = 0; l < kWidth; ++l) v[l] = load(p, l);
  return v;
}
#endif
static inline void store_lanes(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
static inline void store_lanes(uint16_t* p, Floats v) {  // as store() rounds
  const __m512i bits = _mm512_castps_si512((__m512)v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
#else
static inline void store_lanes(uint16_t* p, Floats v) {
  float lanes[kWidth];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int l = 0; l < kWidth; ++l) store(p, l, lanes[l]);
}
#endif
static inline float sum_lanes(Floats a) {
  float part[kWidth];
  __builtin_memcpy(part, &a, sizeof a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
}

template <typename T>
static void extremes(const void* data, Grouped g, int64_t begin, int64_t end, float* lo, float* hi) {
  const T* x = static_cast<const T*>(data);
  const int64_t whole = g.inner / kWidth * kWidth;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t k = 0; k < g.groups; ++k) {
      const T* p = x + r * g.stride + k * g.inner;
      Floats a = load_lanes(lo + k * kLanes), b = load_lanes(hi + k * kLanes);
      for (int64_t i = 0; i < whole; i += kWidth) {
        const Floats v = load_lanes(p + i);
        a = v < a ? v : a;
        b = v > b ? v : b;
      }
      for (int64_t i = whole; i < g.inner; ++i) {
        const float v = load(p, i);
        a[0] = v < a[0] ? v : a[0];
        b[0] = v > b[0] ? v : b[0];
      }
      store_lanes(lo + k * kLanes, a);
      store_lanes(hi + k * kLanes, b);
    }
  }
}

// Philox4x32 (Salmon et al., SC 2011) on 16 counters at once; 128 numbers of 16 bits, as noise in (-0.5, 0.5):
// element 16 * s + l of a block takes word s % 4 of counter 16 * block + l, low half for s < 4.
static void draw(Noise noise, uint64_t block, float* out) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    uint64_t counter = block * kLanes + l;
    c0[l] = static_cast<uint32_t>(counter);
    c1[l] = static_cast<uint32_t>(counter >> 32);
    c2[l] = noise.call;
    c3[l] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(noise.key), k1 = static_cast<uint32_t>(noise.key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    for (int l = 0; l < kLanes; ++l) {
      int32_t low = static_cast<int32_t>(words[w][l] & 0xffffu), high = static_cast<int32_t>(words[w][l] >> 16);
      out[w * kLanes + l] = (static_cast<float>(low) - 32767.5f) * (1.0f / 65536.0f);
      out[(w + 4) * kLanes + l] = (static_cast<float>(high) - 32767.5f) * (1.0f / 65536.0f);
    }
  }
}

template <typename T>
static inline void quantize_run(const T* p, int64_t n, float scale, float beta, float levels, const float* noise,
                                uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    float v = (load(p, i) - beta) * scale + noise[i];
    v = __builtin_rintf(v);
    v = v > 0.0f ? v : 0.0f;
    v = v < levels ? v : levels;
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(v));
  }
}

template <typename T>
static void quantize(const void* data, Grouped g, int64_t begin, int64_t end, const float* grid, float levels,
                     Noise noise, uint8_t* out) {
  const T* x = static_cast<const T*>(data);
  const int64_t size = g.size(), width = g.groups * g.inner;
  float buffer[kBlock];
  for (int i = 0; i < kBlock; ++i) buffer[i] = 0.0f;
  int64_t e = begin * kBlock;
  int64_t row = e / width, k = e % width / g.inner, i = e % g.inner;
  for (int64_t block = begin; block < end; ++block) {
    if (noise.on) draw(noise, static_cast<uint64_t>(block), buffer);
    int64_t stop = e + kBlock < size ? e + kBlock : size;
    int64_t at = 0;
    while (e < stop) {
      int64_t n = g.inner - i < stop - e ? g.inner - i : stop - e;
      const T* p = x + row * g.stride + k * g.inner + i;
      quantize_run(p, n, grid[k], grid[g.groups + k], levels, buffer + at, out + e);
      e += n, at += n, i += n;
      if (i == g.inner) {
        i = 0;
        if (++k == g.groups) k = 0, ++row;
      }
    }
  }
}

template <typename T>
static void dequantize(const uint8_t* q, Grouped g, int64_t begin, int64_t end, const float* grid, void* data) {
  T* out = static_cast<T*>(data);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t k = 0; k < g.groups; ++k) {
      const float step = grid[k], beta = grid[g.groups + k];
      const int64_t at = (r * g.groups + k) * g.inner, whole = g.inner / kWidth * kWidth;
      for (int64_t i = 0; i < whole; i += kWidth) store_lanes(out + at + i, load_lanes(q + at + i) * step + beta);
      for (int64_t i = whole; i < g.inner; ++i) store(out, at + i, load(q, at + i) * step + beta);
    }
  }
}
