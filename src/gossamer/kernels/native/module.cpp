// The extension module: addresses and sizes in, nothing of torch linked, so one build serves every torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "calls.hpp"

namespace nb = nanobind;
using namespace gossamer;

void bind_adder(nb::module_& m);

namespace {

const Table& best() {
#if defined(GOSSAMER_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512_table();
#endif
#if defined(GOSSAMER_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2_table();
#endif
  return plain_table();
}

}  // namespace

const Table* gossamer::chosen = &best();

namespace {

bool use(const std::string& name) {
  if (name == "best") chosen = &best();
  else if (name == "plain") chosen = &plain_table();
#if defined(GOSSAMER_AVX2)
  else if (name == "avx2" && __builtin_cpu_supports("avx2")) chosen = &avx2_table();
#endif
#if defined(GOSSAMER_AVX512)
  else if (name == "avx512" && __builtin_cpu_supports("avx512bw")) chosen = &avx512_table();
#endif
  else return false;
  return true;
}

constexpr float kFlat = 1e-35f;  // a smaller range would overflow levels / range

// Clock of the core that runs this, by chains of additions of one cycle each; the shortest of many undisturbed ones.
double clock_hz() {
  constexpr int64_t kAdditions = 1 << 18;
  double best = 0.0;
  for (int round = 0; round < 400; ++round) {
    int64_t v = 0;
    const auto started = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < kAdditions; i += 8) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        v += 1;
        asm volatile("" : "+r"(v));
      }
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    best = std::max(best, kAdditions / seconds.count());
  }
  return best;
}

// Extremes of every group over all rows: out is [2, groups], minimum then maximum.
void extremes(int type, uintptr_t x, Grouped g, int64_t threads, std::vector<float>& out) {
  const int64_t parts = std::max<int64_t>(1, std::min(parts_for(g.size(), threads), g.rows)), n = g.groups * kLanes;
  std::vector<float> lo(parts * n, std::numeric_limits<float>::infinity());
  std::vector<float> hi(parts * n, -std::numeric_limits<float>::infinity());
  parallel(g.rows, parts, [&](int64_t p, int64_t begin, int64_t end) {
    chosen->extremes(type, at<void>(x), g, begin, end, &lo[p * n], &hi[p * n]);
  });
  out.assign(2 * g.groups, 0.0f);
  for (int64_t k = 0; k < g.groups; ++k) {
    float a = std::numeric_limits<float>::infinity(), b = -a;
    for (int64_t p = 0; p < parts; ++p) {
      for (int l = 0; l < kLanes; ++l) {
        a = std::min(a, lo[p * n + k * kLanes + l]);
        b = std::max(b, hi[p * n + k * kLanes + l]);
      }
    }
    out[k] = a, out[g.groups + k] = b;
  }
}

// Moves the running range (bounds: [2, groups], alpha then beta) towards the extremes of x; a range below 0 is none yet.
void move_range(int type, uintptr_t x, int64_t rows, int64_t stride, int64_t groups, int64_t inner, uintptr_t bounds,
                float take, int64_t threads) {
  nb::gil_scoped_release release;
  std::vector<float> found;
  extremes(type, x, {rows, stride, groups, inner}, threads, found);
  float *alpha = at<float>(bounds), *beta = alpha + groups;
  for (int64_t k = 0; k < groups; ++k) {
    const float low = found[k], range = found[groups + k] - low;
    const bool none = alpha[k] < 0.0f;
    alpha[k] = none ? range : alpha[k] - take * (alpha[k] - range);
    beta[k] = none ? low : beta[k] - take * (beta[k] - low);
  }
}

// grid: [2, groups], where step and beta of this call are left for the way back.
void pack(int type, uintptr_t x, int64_t rows, int64_t stride, int64_t groups, int64_t inner, uintptr_t bounds,
          float levels, uint64_t key, uint32_t call, bool noisy, uintptr_t out, uintptr_t grid, int64_t threads) {
  nb::gil_scoped_release release;
  const Grouped g{rows, stride, groups, inner};
  const float *alpha = at<float>(bounds), *beta = alpha + groups;
  std::vector<float> scale(2 * groups);
  for (int64_t k = 0; k < groups; ++k) {
    const bool flat = !(alpha[k] > kFlat);  // a constant group comes back as beta
    scale[k] = flat ? 0.0f : levels / alpha[k];
    scale[groups + k] = beta[k];
    at<float>(grid)[k] = flat ? 0.0f : alpha[k] / levels;
    at<float>(grid)[groups + k] = beta[k];
  }
  parallel((g.size() + kBlock - 1) / kBlock, parts_for(g.size(), threads), [&](int64_t, int64_t begin, int64_t end) {
    chosen->quantize(type, at<void>(x), g, begin, end, scale.data(), levels, {key, call, noisy}, at<uint8_t>(out));
  });
}

void unpack(int type, uintptr_t q, int64_t rows, int64_t groups, int64_t inner, uintptr_t grid, uintptr_t out,
            int64_t threads) {
  nb::gil_scoped_release release;
  const Grouped g{rows, groups * inner, groups, inner};
  parallel(rows, parts_for(g.size(), threads), [&](int64_t, int64_t begin, int64_t end) {
    chosen->dequantize(type, at<uint8_t>(q), g, begin, end, at<float>(grid), at<void>(out));
  });
}

void times_table(int type, uintptr_t grad, uintptr_t q, int64_t rows, int64_t groups, int64_t inner, uintptr_t table,
                 uintptr_t out, int64_t threads) {
  nb::gil_scoped_release release;
  const Grouped g{rows, groups * inner, groups, inner};
  parallel(rows, parts_for(g.size(), threads), [&](int64_t, int64_t begin, int64_t end) {
    chosen->times_table(type, at<void>(grad), at<uint8_t>(q), g, begin, end, at<float>(table), at<void>(out));
  });
}

void softmax_backward(int type, uintptr_t grad, uintptr_t q, int64_t rows, int64_t cols, int64_t per_group,
                      int64_t groups, uintptr_t grid, uintptr_t out, int64_t threads) {
  nb::gil_scoped_release release;
  parallel(rows, parts_for(rows * cols, threads), [&](int64_t, int64_t begin, int64_t end) {
    chosen->softmax_backward(type, at<void>(grad), at<uint8_t>(q), cols, per_group, groups, begin, end,
                             at<float>(grid), at<void>(out));
  });
}

constexpr int64_t kPartialSums = 16;  // fixed, so that the sums do not depend on the number of threads

void layer_norm_backward(int type, uintptr_t grad, uintptr_t q, int64_t rows, int64_t groups, int64_t inner,
                         uintptr_t grid, uintptr_t mean, uintptr_t rstd, uintptr_t weight, uintptr_t out,
                         uintptr_t sums, int64_t threads) {
  nb::gil_scoped_release release;
  const Grouped g{rows, groups * inner, groups, inner};
  const int64_t width = 2 * groups * inner, pieces = std::min(rows, kPartialSums);
  std::vector<float> partial(pieces * width, 0.0f);
  parallel(pieces, parts_for(g.size(), threads), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      chosen->layer_norm_backward(type, at<void>(grad), at<uint8_t>(q), g, rows * p / pieces, rows * (p + 1) / pieces,
                                  at<float>(grid), at<float>(mean), at<float>(rstd), at<float>(weight), at<void>(out),
                                  &partial[p * width]);
  });
  float* total = at<float>(sums);
  for (int64_t p = 0; p < pieces; ++p)
    for (int64_t c = 0; c < width; ++c) total[c] += partial[p * width + c];
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels. Call them through gossamer.kernels.cpu, which checks what it passes.";
  m.def("isa", [] { return std::string(chosen->name); }, "Name of the instruction set in use.");
  m.def("use", &use, "Choose an instruction set by name, or 'best'; false if this machine has not got it.");
  m.def("clock_hz", &clock_hz, "Cycles a second, measured.");
  m.def("move_range", &move_range);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("times_table", &times_table);
  m.def("softmax_backward", &softmax_backward);
  m.def("layer_norm_backward", &layer_norm_backward);
  bind_adder(m);
}
