// Adder convolutions: how tensors lie in memory, and the kernels that every instruction set has.
//
// Inputs and gradients are first laid out as [image, row, column, channel] with a border of zeros, so that what lies
// under one row of a filter is one run of memory; filters are packed so that `width` of them (or of their channels)
// fill a register.
#pragma once
#include <cstdint>

namespace gossamer {

// Input [batch, channels, height, width], filters [filters, channels, kernel_h, kernel_w]; dilation and groups are 1.
struct AdderShape {
  int64_t batch, channels, height, width, filters, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_h, out_w;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return batch * out_h * out_w; }
};

// Distance in elements between neighbours of a tensor [N, C, H, W].
struct Strides {
  int64_t n, c, h, w;
};

// A laid-out tensor [images, rows, cols, channels] whose first `top` rows and `left` columns are border.
struct Laid {
  int64_t top, left, rows, cols, channels;
  int64_t image() const { return rows * cols * channels; }
  int64_t row() const { return cols * channels; }
};

// What stands for d = w - x (or x - w): itself, clamp(d, -1, 1), sign(d), or p sign(d) |d|^(p-1) and that clamped.
enum Rule : int { kDifference = 0, kClamp = 1, kSign = 2, kPower = 3, kClampedPower = 4 };

// 8-bit codes of inputs and filters share step and zero; out = shift - gain * sum |code - code|.
struct Grid {
  float step, zero;
  const float *gain, *shift;
};

struct Span {
  int64_t begin, end;
};

struct AdderTable {
  int64_t width, bytes;  // floats and 8-byte groups in one register
  // Units: rows of the laid-out tensor, border included.
  void (*lay_out)(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, Laid to, int64_t begin,
                  int64_t end, float* out);
  void (*lay_out_codes)(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, Laid to, Grid grid,
                        int64_t begin, int64_t end, uint8_t* out);
  // Units: planes of eight channels of an image, [pixel, 8], `plane` bytes apart.
  void (*lay_out_planes)(const float* x, Strides s, int64_t channels, int64_t height, int64_t width, int64_t plane,
                         Grid grid, int64_t begin, int64_t end, uint8_t* out);
  // Units: registers of filters. out: [end - begin, taps, channels, width].
  void (*pack_filters)(const float* w, AdderShape s, int64_t begin, int64_t end, float* out);
  // Units: registers of channels. out: [channels / width, taps, filters, width].
  void (*pack_channels)(const float* w, AdderShape s, int64_t begin, int64_t end, float* out);
  // Units: strips of kStrip output pixels. w: the registers of the span. out = -sum |w - x|^p.
  void (*forward)(const float* x, Laid laid, const float* w, AdderShape s, float p, Span registers, Span strips,
                  Strides o, float* out);
  // Units: strips of kStrip input pixels of one phase (first row and column, counted with the border). grad: laid out.
  void (*input_grad)(const float* grad, Laid laid, const float* w, const float* x, Laid x_laid, AdderShape s, Rule rule,
                     float p, int64_t phase_h, int64_t phase_w, int64_t begin, int64_t end, Strides o, float* out);
  // Units: (register of channels, tap, stretch of kFilters filters). grad: [pixels, stride], stride in whole
  // stretches; out: [filters, channels, kernel_h, kernel_w].
  void (*weight_grad)(const float* grad, int64_t stride, const float* x, Laid x_laid, const float* w, AdderShape s,
                      Rule rule, float p, int64_t begin, int64_t end, float* out);
  // Units: strips. Codes in, floats out; all filters packed [filters / bytes, taps, channels / 8, bytes, 8].
  void (*forward_codes)(const uint8_t* x, Laid laid, const uint8_t* w, AdderShape s, Grid grid, Span registers,
                        Span strips, Strides o, float* out);
  // The same of filters of one tap, on planes; an image's output pixels are neighbours.
  void (*forward_planes)(const uint8_t* x, int64_t plane, const uint8_t* w, AdderShape s, Grid grid, Span registers,
                         Span strips, Strides o, float* out);
};

constexpr int64_t kStrip = 96;
constexpr int64_t kFilters = 8;

}  // namespace gossamer
