// Adder convolutions on torch's memory: lays tensors out, packs filters, splits the work over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "calls.hpp"

namespace nb = nanobind;
using namespace gossamer;

namespace {

using Numbers = std::vector<int64_t>;

// numbers: batch, channels, height, width, filters, kernel (2), stride (2), padding (2).
AdderShape shape_of(const Numbers& n) {
  AdderShape s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], 0, 0};
  s.out_h = (s.height + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
  s.out_w = (s.width + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1;
  return s;
}

Strides strides_of(const Numbers& n) { return {n[0], n[1], n[2], n[3]}; }

// A filter of one tap meets every stride-th pixel: only those are laid out.
void thin_out(AdderShape& s, Strides& x) {
  if (s.taps() > 1 || s.pad_h || s.pad_w) return;
  x.h *= s.stride_h, x.w *= s.stride_w;
  s.height = s.out_h, s.width = s.out_w, s.stride_h = s.stride_w = 1;
}

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The input with its padding as border; channels in whole registers where vectors of them are read.
Laid bordered(const AdderShape& s, int64_t channels) {
  return {s.pad_h, s.pad_w, s.height + 2 * s.pad_h, s.width + 2 * s.pad_w, channels};
}

int64_t pairs_of(const AdderShape& s) { return s.pixels() * s.filters * s.channels * s.taps(); }

void lay(const float* x, Strides from, int64_t batch, int64_t channels, int64_t height, int64_t width, Laid to,
         float* out, int64_t threads) {
  parallel(batch * to.rows, parts_for(batch * to.image(), threads), [&](int64_t, int64_t begin, int64_t end) {
    chosen->adder.lay_out(x, from, channels, height, width, to, begin, end, out);
  });
}

// Splits pairs of registers and strips over threads: over registers first, which then stay in a core's cache.
template <typename Body>
void tiled(int64_t registers, const AdderShape& s, int64_t threads, const Body& body) {
  const int64_t pairs = (registers + 1) / 2, strips = up(s.pixels(), kStrip) / kStrip;
  const int64_t across = std::min(threads, pairs), along = std::max<int64_t>(1, std::min(threads / across, strips));
  parallel(across * along, across * along, [&](int64_t part, int64_t, int64_t) {
    const int64_t i = part % across, k = part / across;
    const Span mine{pairs * i / across * 2, std::min(registers, pairs * (i + 1) / across * 2)};
    body(mine, Span{strips * k / along, strips * (k + 1) / along});
  });
}

// out: any strides. -sum |w - x|^p.
void forward(uintptr_t x, const Numbers& x_strides, uintptr_t w, const Numbers& shape, float p, uintptr_t out,
             const Numbers& out_strides, int64_t threads) {
  nb::gil_scoped_release release;
  AdderShape s = shape_of(shape);
  Strides from = strides_of(x_strides);
  thin_out(s, from);
  const AdderTable& table = chosen->adder;
  const Laid laid = bordered(s, s.channels);
  const Strides to = strides_of(out_strides);
  Scratch<float> input(s.batch * laid.image());
  lay(at<float>(x), from, s.batch, s.channels, s.height, s.width, laid, input.get(), threads);
  tiled(up(s.filters, table.width) / table.width, s, parts_for(pairs_of(s), threads), [&](Span all, Span strips) {
    Scratch<float> filters(2 * s.taps() * s.channels * table.width);
    for (int64_t j = all.begin; j < all.end; j += 2) {  // packed just before use, while they are in the cache
      const Span two{j, std::min(j + 2, all.end)};
      table.pack_filters(at<float>(w), s, two.begin, two.end, filters.get());
      table.forward(input.get(), laid, filters.get(), s, p, two, strips, to, at<float>(out));
    }
  });
}

// out: zero where no tap meets the pixel (strides above the kernel). sum over filters and taps of grad * rule(w - x).
void input_grad(uintptr_t grad, const Numbers& grad_strides, uintptr_t x, const Numbers& x_strides, uintptr_t w,
                const Numbers& shape, int rule, float p, uintptr_t out, const Numbers& out_strides, int64_t threads) {
  nb::gil_scoped_release release;
  const AdderShape s = shape_of(shape);
  const AdderTable& table = chosen->adder;
  const int64_t registers = up(s.channels, table.width) / table.width, parts = parts_for(pairs_of(s), threads);
  const Laid plain{0, 0, s.height, s.width, registers * table.width};
  // the last input row meets output row (height - 1 + pad) / stride, which may lie below the last one
  const int64_t below = std::max<int64_t>(0, (s.height - 1 + s.pad_h) / s.stride_h - (s.out_h - 1));
  const int64_t right = std::max<int64_t>(0, (s.width - 1 + s.pad_w) / s.stride_w - (s.out_w - 1));
  const Laid laid{s.kernel_h - 1, s.kernel_w - 1, s.out_h + s.kernel_h - 1 + below, s.out_w + s.kernel_w - 1 + right,
                  s.filters};
  Scratch<float> grads(s.batch * laid.image()), input(s.batch * plain.image());
  Scratch<float> filters(registers * s.taps() * s.filters * table.width);
  lay(at<float>(grad), strides_of(grad_strides), s.batch, s.filters, s.out_h, s.out_w, laid, grads.get(), threads);
  lay(at<float>(x), strides_of(x_strides), s.batch, s.channels, s.height, s.width, plain, input.get(), threads);
  parallel(registers, parts, [&](int64_t, int64_t begin, int64_t end) {
    table.pack_channels(at<float>(w), s, begin, end, filters.get());
  });
  for (int64_t h = 0; h < std::min(s.stride_h, s.kernel_h); ++h) {
    for (int64_t c = 0; c < std::min(s.stride_w, s.kernel_w); ++c) {
      const int64_t most = s.batch * (s.height / s.stride_h + 1) * (s.width / s.stride_w + 1);
      parallel(up(most, kStrip) / kStrip, parts, [&](int64_t, int64_t begin, int64_t end) {
        table.input_grad(grads.get(), laid, filters.get(), input.get(), plain, s, static_cast<Rule>(rule), p, h, c,
                         begin, end, strides_of(out_strides), at<float>(out));
      });
    }
  }
}

// out: dense. sum over pixels of grad * rule(x - w).
void weight_grad(uintptr_t grad, const Numbers& grad_strides, uintptr_t x, const Numbers& x_strides, uintptr_t w,
                 const Numbers& shape, int rule, float p, uintptr_t out, int64_t threads) {
  nb::gil_scoped_release release;
  const AdderShape s = shape_of(shape);
  const AdderTable& table = chosen->adder;
  const int64_t registers = up(s.channels, table.width) / table.width, parts = parts_for(pairs_of(s), threads);
  const Laid laid = bordered(s, registers * table.width), dense{0, 0, s.out_h, s.out_w, up(s.filters, kFilters)};
  Scratch<float> grads(s.batch * dense.image()), input(s.batch * laid.image());
  Scratch<float> filters(registers * s.taps() * s.filters * table.width);
  lay(at<float>(grad), strides_of(grad_strides), s.batch, s.filters, s.out_h, s.out_w, dense, grads.get(), threads);
  lay(at<float>(x), strides_of(x_strides), s.batch, s.channels, s.height, s.width, laid, input.get(), threads);
  parallel(registers, parts, [&](int64_t, int64_t begin, int64_t end) {
    table.pack_channels(at<float>(w), s, begin, end, filters.get());
  });
  parallel(registers * s.taps() * (dense.channels / kFilters), parts, [&](int64_t, int64_t begin, int64_t end) {
    table.weight_grad(grads.get(), dense.channels, input.get(), laid, filters.get(), s, static_cast<Rule>(rule), p,
                      begin, end, at<float>(out));
  });
}

// Filters as bytes [filters / bytes, taps, channels / 8, bytes, 8], zeros beyond the last channel and filter.
void pack_codes(const uint8_t* w, const AdderShape& s, int64_t bytes, int64_t channels, uint8_t* out) {
  const int64_t size = channels * s.taps() * bytes;
  std::fill(out, out + up(s.filters, bytes) / bytes * size, uint8_t{0});
  for (int64_t o = 0; o < s.filters; ++o) {
    uint8_t* place = out + o / bytes * size + o % bytes * 8;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t t = 0; t < s.taps(); ++t)
        place[(t * channels + c / 8 * 8) * bytes + c % 8] = w[(o * s.channels + c) * s.taps() + t];
  }
}

// Bytes that `pack_filter_codes` fills for the instruction set in use.
int64_t packed_size(const Numbers& shape) {
  const AdderShape s = shape_of(shape);
  return up(s.filters, chosen->adder.bytes) * up(s.channels, 8) * s.taps();
}

void pack_filter_codes(uintptr_t w, const Numbers& shape, uintptr_t out) {
  const AdderShape s = shape_of(shape);
  pack_codes(at<uint8_t>(w), s, chosen->adder.bytes, up(s.channels, 8), at<uint8_t>(out));
}

// packed: from pack_filter_codes with the same instruction set. out = shift - gain * sum |code of x - code of w|.
void forward_codes(uintptr_t x, const Numbers& x_strides, uintptr_t packed, const Numbers& shape, float step,
                   float zero, uintptr_t gain, uintptr_t shift, uintptr_t out, const Numbers& out_strides,
                   int64_t threads) {
  nb::gil_scoped_release release;
  AdderShape s = shape_of(shape);
  Strides from = strides_of(x_strides);
  thin_out(s, from);
  const AdderTable& table = chosen->adder;
  const Grid grid{step, zero, at<float>(gain), at<float>(shift)};
  const Strides to = strides_of(out_strides);
  const int64_t registers = up(s.filters, table.bytes) / table.bytes, parts = parts_for(pairs_of(s) / 4, threads);
  const int64_t pixels = s.out_h * s.out_w, planes = up(s.channels, 8) / 8;
  if (s.taps() == 1 && s.stride_h * s.stride_w == 1 && !s.pad_h && !s.pad_w && pixels >= 2 * table.bytes &&
      to.w == 1 && to.h == s.out_w && from.c != 1) {
    const int64_t plane = 8 * up(pixels + 2 * table.bytes, 8), all = s.batch * planes;
    Scratch<uint8_t> input(all * plane);
    parallel(all, parts_for(all * plane, threads), [&](int64_t, int64_t begin, int64_t end) {
      table.lay_out_planes(at<float>(x), from, s.channels, s.height, s.width, plane, grid, begin, end, input.get());
    });
    tiled(registers, s, parts, [&](Span mine, Span strips) {
      table.forward_planes(input.get(), plane, at<uint8_t>(packed), s, grid, mine, strips, to, at<float>(out));
    });
    return;
  }
  const Laid laid = bordered(s, up(s.channels, 8));
  Scratch<uint8_t> input(s.batch * laid.image());
  parallel(s.batch * laid.rows, parts_for(s.batch * laid.image(), threads), [&](int64_t, int64_t begin, int64_t end) {
    table.lay_out_codes(at<float>(x), from, s.channels, s.height, s.width, laid, grid, begin, end,
                        input.get());
  });
  tiled(registers, s, parts, [&](Span mine, Span strips) {
    table.forward_codes(input.get(), laid, at<uint8_t>(packed), s, grid, mine, strips, to, at<float>(out));
  });
}

}  // namespace

void bind_adder(nb::module_& m) {
  m.def("adder_forward", &forward);
  m.def("adder_input_grad", &input_grad);
  m.def("adder_weight_grad", &weight_grad);
  m.def("adder_packed_size", &packed_size);
  m.def("adder_pack_filter_codes", &pack_filter_codes);
  m.def("adder_forward_codes", &forward_codes);
}
