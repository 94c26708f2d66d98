// Products of rows with the matrix of their expert: what the kernels for all cards and for Hopper share.
//
// Everything is measured in bytes: a panel is 128 bytes of the inner dimension, 64 elements of bfloat16 or 128 of
// e4m3, and both types lie in the matrix instructions' operands at the same bytes. Row r of a panel starts at byte
// 128 r, and its 16-byte chunk i lies at place i ^ (r % 8).
#pragma once
#include "tensor_core.cuh"

// y[m, n] = x[m] . w[e, n] (+ bias[e, n]) for the rows m of expert e, which are those before ends[e] that are not the
// expert's before it. The scales, one per row of x and of w, are there where both have 8 bits.
struct Grouped {
  bf16* y;
  const u8* x;
  const u8* w;
  const bf16* bias;
  const float* x_scales;
  const float* w_scales;
  const u32* ends;
  int experts, n;
  i64 row_bytes;
};

// Some rows of one expert; none past the last tile.
struct Tile {
  int expert, first, rows;
};

// Which tile of rows and of `columns` columns the block computes. Blocks that run side by side read few rows of x and of
// w again and again: all columns of TOGETHER tiles of rows, then of the next ones.
constexpr int TOGETHER = 8;
struct Place {
  int rows, columns;
};
__device__ __forceinline__ Place place_of(const Grouped& g, int columns) {
  const int across = (g.n + columns - 1) / columns, all = TOGETHER * across;
  const int group = blockIdx.x / all, within = blockIdx.x % all;
  return {group * TOGETHER + within % TOGETHER, within / TOGETHER};
}

// The number-th tile of up to ROWS rows, counted expert by expert. The same in every lane of a warp.
template <int ROWS>
__device__ __forceinline__ Tile tile_of(const Grouped& g, int number) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < g.experts; base += 32) {
    const int e = base + lane;
    const int end = e < g.experts ? g.ends[e] : 0, start = e > 0 && e < g.experts ? g.ends[e - 1] : 0;
    const int tiles = e < g.experts ? (end - start + ROWS - 1) / ROWS : 0;
    int before = tiles;  // up to and with this expert
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int more = __shfl_up_sync(NONE, before, o);
      if (lane >= o) before += more;
    }
    const u32 mine = __ballot_sync(NONE, number < before);
    if (mine == 0) {
      number -= __shfl_sync(NONE, before, 31);
      continue;
    }
    const int from = __ffs(mine) - 1;
    const int first = __shfl_sync(NONE, start + (number - (before - tiles)) * ROWS, from);
    const int rows = __shfl_sync(NONE, end, from) - first;
    return {base + from, first, rows < ROWS ? rows : ROWS};
  }
  return {0, 0, 0};
}

// Starts copying ROWS rows of a panel: `rows` of them exist, and `bytes` of each; the others are zeros. `thread` counts
// the THREADS that do it.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_panel(u32 to, const u8* from, int pitch, int rows, int bytes, int thread) {
  constexpr int STEP = THREADS / 8;
  static_assert(THREADS % 64 == 0 && ROWS % STEP == 0, "whole rows of a permutation per step");
  const int chunk = thread % 8, row = thread / 8;
  const u8* p = from + (i64)row * pitch + chunk * 16;
  to += row * 128 + (chunk ^ row % 8) * 16;
#pragma unroll 4
  for (int i = 0; i < ROWS / STEP; ++i) {
    const bool valid = chunk * 16 < bytes && row + i * STEP < rows;
    copy_async(to + i * STEP * 128, valid ? p + (i64)i * STEP * pitch : from, valid);
  }
}

// Two neighbouring columns of a row of y, from their sums.
template <bool EIGHT_BITS>
__device__ __forceinline__ void store_pair(const Grouped& g, int expert, i64 row, int column, float a, float b) {
  if (column >= g.n) return;
  const i64 of_expert = (i64)expert * g.n + column;
  const bool two = column + 1 < g.n;
  if (EIGHT_BITS) {
    const float scale = g.x_scales[row];
    a *= scale * g.w_scales[of_expert];
    if (two) b *= scale * g.w_scales[of_expert + 1];
  }
  if (g.bias) {
    a += to_float(g.bias[of_expert]);
    if (two) b += to_float(g.bias[of_expert + 1]);
  }
  bf16* to = g.y + row * g.n + column;
  if (g.n % 2 == 0) {
    *(u32*)to = pack_bf16(a, b);
  } else {
    store(to, a);
    if (two) store(to + 1, b);
  }
}
