// Every kernel, once per instruction set: isa_*.cpp defines ISA and includes this file.
#include <cstdint>

#include "kernels.hpp"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace gossamer {
namespace ISA {
namespace {

#include "philox_round.inl"
#include "group_pack.inl"
#include "group_backward.inl"
#include "adder.inl"

// Picks the instance for the element type of the activations.
#define GOSSAMER_BY_TYPE(name, ...) \
  (type == kBFloat16 ? name<uint16_t>(__VA_ARGS__) : name<float>(__VA_ARGS__))

void extremes_any(int type, const void* x, Grouped g, int64_t b, int64_t e, float* lo, float* hi) {
  GOSSAMER_BY_TYPE(extremes, x, g, b, e, lo, hi);
}
void quantize_any(int type, const void* x, Grouped g, int64_t b, int64_t e, const float* grid, float levels,
                  Noise noise, uint8_t* out) {
  GOSSAMER_BY_TYPE(quantize, x, g, b, e, grid, levels, noise, out);
}
void dequantize_any(int type, const uint8_t* q, Grouped g, int64_t b, int64_t e, const float* grid, void* out) {
  GOSSAMER_BY_TYPE(dequantize, q, g, b, e, grid, out);
}
void times_table_any(int type, const void* grad, const uint8_t* q, Grouped g, int64_t b, int64_t e,
                     const float* table, void* out) {
  GOSSAMER_BY_TYPE(times_table, grad, q, g, b, e, table, out);
}
void softmax_backward_any(int type, const void* grad, const uint8_t* q, int64_t cols, int64_t per_group,
                          int64_t groups, int64_t b, int64_t e, const float* grid, void* out) {
  GOSSAMER_BY_TYPE(softmax_backward, grad, q, cols, per_group, groups, b, e, grid, out);
}
void layer_norm_backward_any(int type, const void* grad, const uint8_t* q, Grouped g, int64_t b, int64_t e,
                             const float* grid, const float* mean, const float* rstd, const float* weight, void* out,
                             float* sums) {
  GOSSAMER_BY_TYPE(layer_norm_backward, grad, q, g, b, e, grid, mean, rstd, weight, out, sums);
}

// constexpr: initialising it at load would run this instruction set on machines that lack it.
constexpr Table kTable = {ISA_NAME,        extremes_any,         quantize_any,            dequantize_any,
                          times_table_any, softmax_backward_any, layer_norm_backward_any, kAdder};

}  // namespace
}  // namespace ISA

const Table& ISA_TABLE() { return ISA::kTable; }

}  // namespace gossamer
