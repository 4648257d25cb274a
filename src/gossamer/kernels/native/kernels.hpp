// What the kernels look like to module.cpp. Every instruction set fills one Table from kernels.inl.
//
// Tensors reach the kernels as "grouped" memory: R rows of G groups of I neighbouring elements, rows `stride`
// elements apart, so that a group's elements are x[r * stride + g * I + i].
#pragma once
#include <cstdint>

#include "adder.hpp"

namespace gossamer {

enum Type : int { kFloat = 0, kBFloat16 = 1 };

struct Grouped {
  int64_t rows, stride, groups, inner;
  int64_t size() const { return rows * groups * inner; }
};

// Noise of a call: Philox4x32 with this key; the call number is the second word of the counter.
struct Noise {
  uint64_t key;
  uint32_t call;
  bool on;
};

// One range of units [begin, end) per call; module.cpp splits the units over threads.
struct Table {
  const char* name;
  // Units: rows. lo, hi: [groups, 16] running extremes in some lanes of each group.
  void (*extremes)(int type, const void* x, Grouped g, int64_t begin, int64_t end, float* lo, float* hi);
  // Units: blocks of 128 elements. grid: [2, groups], scale then beta.
  void (*quantize)(int type, const void* x, Grouped g, int64_t begin, int64_t end, const float* grid, float levels,
                   Noise noise, uint8_t* out);
  // Units: rows. grid: [2, groups], step then beta.
  void (*dequantize)(int type, const uint8_t* q, Grouped g, int64_t begin, int64_t end, const float* grid, void* out);
  // Units: rows. out = grad * table[group][q]; table: [groups, 256].
  void (*times_table)(int type, const void* grad, const uint8_t* q, Grouped g, int64_t begin, int64_t end,
                      const float* table, void* out);
  // Units: rows of `inner` scores. per_group: consecutive rows of one group.
  void (*softmax_backward)(int type, const void* grad, const uint8_t* q, int64_t cols, int64_t per_group,
                           int64_t groups, int64_t begin, int64_t end, const float* grid, void* out);
  // Units: rows of groups * inner channels. sums: [2, channels], gradients of weight and bias, added to.
  void (*layer_norm_backward)(int type, const void* grad, const uint8_t* q, Grouped g, int64_t begin, int64_t end,
                              const float* grid, const float* mean, const float* rstd, const float* weight, void* out,
                              float* sums);
  AdderTable adder;
};

constexpr int kLanes = 16;
constexpr int kBlock = 128;  // elements that share one vector of 16 Philox counters
constexpr int kRounds = 7;

extern const Table* chosen;  // the table in use

const Table& plain_table();
const Table& avx2_table();
const Table& avx512_table();

}  // namespace gossamer
