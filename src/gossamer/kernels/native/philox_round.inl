// One Philox4x32 round on 16 counters held as four arrays of words.

#if defined(__AVX512F__)
static inline void multiply(__m512i a, __m512i m, __m512i* high, __m512i* low) {
  __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  *low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
static inline void philox_round(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, uint32_t k0, uint32_t k1) {
  __m512i h0, l0, h1, l1;
  multiply(_mm512_loadu_si512(c0), _mm512_set1_epi64(0xD2511F53), &h0, &l0);
  multiply(_mm512_loadu_si512(c2), _mm512_set1_epi64(0xCD9E8D57), &h1, &l1);
  __m512i n0 = _mm512_ternarylogic_epi32(h1, _mm512_loadu_si512(c1), _mm512_set1_epi32(static_cast<int>(k0)), 0x96);
  __m512i n2 = _mm512_ternarylogic_epi32(h0, _mm512_loadu_si512(c3), _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
  _mm512_storeu_si512(c0, n0);
  _mm512_storeu_si512(c1, l1);
  _mm512_storeu_si512(c2, n2);
  _mm512_storeu_si512(c3, l0);
}
#elif defined(__AVX2__)
static inline void multiply(__m256i a, __m256i m, __m256i* high, __m256i* low) {
  __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
static inline void philox_round(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, uint32_t k0, uint32_t k1) {
  for (int l = 0; l < kLanes; l += 8) {
    __m256i h0, l0, h1, l1;
    __m256i* p[4] = {reinterpret_cast<__m256i*>(c0 + l), reinterpret_cast<__m256i*>(c1 + l),
                     reinterpret_cast<__m256i*>(c2 + l), reinterpret_cast<__m256i*>(c3 + l)};
    multiply(_mm256_loadu_si256(p[0]), _mm256_set1_epi64x(0xD2511F53), &h0, &l0);
    multiply(_mm256_loadu_si256(p[2]), _mm256_set1_epi64x(0xCD9E8D57), &h1, &l1);
    __m256i n0 = _mm256_xor_si256(_mm256_xor_si256(h1, _mm256_loadu_si256(p[1])),
                                  _mm256_set1_epi32(static_cast<int>(k0)));
    __m256i n2 = _mm256_xor_si256(_mm256_xor_si256(h0, _mm256_loadu_si256(p[3])),
                                  _mm256_set1_epi32(static_cast<int>(k1)));
    _mm256_storeu_si256(p[0], n0);
    _mm256_storeu_si256(p[1], l1);
    _mm256_storeu_si256(p[2], n2);
    _mm256_storeu_si256(p[3], l0);
  }
}
#else
static inline void philox_round(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, uint32_t k0, uint32_t k1) {
  for (int l = 0; l < kLanes; ++l) {
    uint64_t a = static_cast<uint64_t>(c0[l]) * 0xD2511F53u, b = static_cast<uint64_t>(c2[l]) * 0xCD9E8D57u;
    c0[l] = static_cast<uint32_t>(b >> 32) ^ c1[l] ^ k0;
    c2[l] = static_cast<uint32_t>(a >> 32) ^ c3[l] ^ k1;
    c1[l] = static_cast<uint32_t>(b);
    c3[l] = static_cast<uint32_t>(a);
  }
}
#endif
