// What the attention forward kernels share: which key tiles a query tile reads, the running softmax of a thread's two
// rows, and what follows the base keys (extras, sink, output).
//
// A warp holds 16 query rows in the layout of the matrix instructions: lane 4 g + c has rows g and g + 8, and of every
// 8 columns (keys of scores, dimensions of the output) columns 2 c and 2 c + 1. An array x of a 16 x 8 n block has
// x[4 j + 2 h + i] = row g + 8 h, column 8 j + 2 c + i.
//
// A row's result does not depend on the other rows of its tile: key tiles start at absolute multiples of their size,
// a tile that a row does not see multiplies its state by exactly 1 and adds exact zeros, every sum over a row's keys
// has one order, and products and sums are spelled out where the compiler could fuse them for one of a thread's rows
// and not for the other.
#pragma once
#include "attention.cuh"
#include "tensor_core.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The key tiles that at least one of a tile's 32 N query rows sees, in ascending order. Every warp that needs the
// list walks it for itself; lane i looks after rows i, 32 + i, ...
template <int N, int KEYS>
struct KeyTiles {
  u32 lo[N], hi[N];

  __device__ __forceinline__ KeyTiles(const u32* all_lo, const u32* all_hi, int first, int rows) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      int r = min(first + 32 * i + (int)(threadIdx.x % 32), rows - 1);
      lo[i] = all_lo[r];
      hi[i] = all_hi[r];
    }
  }

  // The first such tile from `tile` on, or NONE.
  __device__ __forceinline__ u32 from(u32 tile) const {
    u32 best = NONE;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      u32 start = max(tile * KEYS, lo[i]);
      if (start < hi[i]) best = min(best, start / KEYS);
    }
    return __reduce_min_sync(0xffffffffu, best);
  }
};

// Running softmax of a thread's two rows over scores that are not yet scaled (the scale must be positive).
struct Softmax {
  // A score from which exponents are taken: at least the largest so far minus `slack`. Any such score gives the same
  // result; moving it seldom saves most of the rescaling of what was accumulated.
  float top[2] = {-INF, -INF};
  float sum[2] = {0.f, 0.f};  // of exp(scale * (score - top)), over this thread's columns until `end_tiles`
  u32 lo[2], span[2];         // base keys lo <= t < lo + span are seen
  float scale, slack;         // scale times log2(e); how far a score may exceed top: a factor of 256

  float limit;                // with -DCAPPED: what scores that are not yet scaled stay below

  __device__ __forceinline__ Softmax(const u32* all_lo, const u32* all_hi, int row, int rows, float scale, float cap)
      : scale(scale * LOG2_E), slack(8.f / (scale * LOG2_E)), limit(cap / scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int r = min(row + 8 * h, rows - 1);
      lo[h] = all_lo[r];
      span[h] = max(all_hi[r], lo[h]) - lo[h];
    }
  }

  // Takes in the scores s of a tile of keys starting at `start` and turns them into exp(scale * (score - top)).
  // What was accumulated for row g + 8 h before must be multiplied by factor[h].
  template <int N>
  __device__ __forceinline__ void tile(float (&s)[N], u32 start, float (&factor)[2]) {
    constexpr u32 keys = N * 2;
#ifdef CAPPED
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = capped(s[i]);
#endif
    bool whole = start >= lo[0] && start + keys - lo[0] <= span[0] && start >= lo[1] && start + keys - lo[1] <= span[1];
    if (!__all_sync(0xffffffffu, whole)) {
      u32 column = start + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int h = i / 2 % 2;
        if (column - lo[h] + (i / 4 * 8 + i % 2) >= span[h]) s[i] = -INF;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
      for (int i = 4 + 2 * h; i < N; i += 4) best = fmaxf(best, fmaxf(s[i], s[i + 1]));
      float base = __fmul_rn(raise(h, quad_max(best), factor[h]), scale);
      float total = 0.f;
#pragma unroll
      for (int i = 2 * h; i < N; i += 4) {
        s[i] = exp2_fast(fmaf(s[i], scale, -base));
        s[i + 1] = exp2_fast(fmaf(s[i + 1], scale, -base));
        total += s[i] + s[i + 1];
      }
      sum[h] = fmaf(sum[h], factor[h], total);
    }
  }

  // After the last tile: sums over whole rows.
  __device__ __forceinline__ void end_tiles() {
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }

  // Takes in one score per row (-inf: none) and turns it into exp(scale * (score - top)), as `tile` does.
  __device__ __forceinline__ void one(float (&s)[2], float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#ifdef CAPPED
      if (s[h] != -INF) s[h] = capped(s[h]);
#endif
      float base = __fmul_rn(raise(h, s[h], factor[h]), scale);
      s[h] = exp2_fast(fmaf(s[h], scale, -base));
      sum[h] = fmaf(sum[h], factor[h], s[h]);
    }
  }

  // limit * tanh(x / limit): an error of some 1e-7 of the limit, and the limit itself far out.
  __device__ __forceinline__ float capped(float x) const {
    const float power = exp2_fast(__fmul_rn(__fdividef(x, limit), 2.f * LOG2_E));
    return fmaf(-2.f * limit, __fdividef(1.f, power + 1.f), limit);
  }

  // Moves a row's top to x if x exceeds it by too much; returns the top, or 0 while nothing is seen, so that -inf minus
  // it stays -inf. The factor of an unchanged top is exactly 1.
  __device__ __forceinline__ float raise(int h, float x, float& factor) {
    float next = x > top[h] + slack ? x : top[h];
    float base = next == -INF ? 0.f : next;
    factor = exp2_fast(__fmul_rn(top[h] - base, scale));
    top[h] = next;
    return base;
  }
};

template <int N>
__device__ __forceinline__ void rescale(float (&o)[N], const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < N; ++i) o[i] *= factor[i / 2 % 2];
}

// The extras of a warp's 16 rows: the e-th extra keys of the rows lie together in shared memory like 16 base keys, and
// the matrix instructions multiply them like those. Row i sees the i-th alone, so only the diagonal of the scores
// counts and the weights are a diagonal matrix.

// The scores of one extra for a thread's two rows. load_queries(a, step) and load_keys(b, step) load 16 x 16 fragments.
template <class Queries, class Keys>
__device__ __forceinline__ void extra_scores(float (&s)[2], const u32 (&at)[2], Queries load_queries, Keys load_keys) {
  float d[8] = {};
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    u32 a[4], b[4];
    load_queries(a, step);
    load_keys(b, step);
    matrix_multiply(d, a, b[0], b[1]);
    matrix_multiply(d + 4, a, b[2], b[3]);
  }
  // Row g meets key g (row g + 8 key g + 8) in the lane of columns 2 (g / 2) and the next.
  int lane = threadIdx.x % 32, g = lane / 4, owner = g * 4 + g / 2;
  s[0] = __shfl_sync(0xffffffffu, g % 2 ? d[1] : d[0], owner);
  s[1] = __shfl_sync(0xffffffffu, g % 2 ? d[7] : d[6], owner);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (at[h] == NONE) s[h] = -INF;
  }
}

// Adds p times the rows' values. load_values(b, n) loads the transposed fragments of columns 16 n to 16 n + 15.
template <class Values>
__device__ __forceinline__ void extra_values(float (&o)[HEAD_DIM / 2], const float (&p)[2], Values load_values) {
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  u32 diagonal[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) diagonal[h] = c == g / 2 ? (g % 2 ? pack_bf16(0.f, p[h]) : pack_bf16(p[h], 0.f)) : 0;
  const u32 a[4] = {diagonal[0], 0, 0, diagonal[1]};
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 16; ++n) {
    u32 b[4];
    load_values(b, n);
    matrix_multiply(o + 8 * n, a, b[0], b[1]);
    matrix_multiply(o + 8 * n + 4, a, b[2], b[3]);
  }
}

// Which rows of an extra a thread's two rows see. Rows past the end repeat the last one.
__device__ __forceinline__ void extra_rows(u32 (&at)[2], const Extras& extras, int e, int row, int rows) {
  at[0] = extra_row(extras, e, min(row, rows - 1));
  at[1] = extra_row(extras, e, min(row + 8, rows - 1));
}

// Everything after the last key, for a warp's 16 rows; `row` is the thread's first.
__device__ __forceinline__ void finish(const float (&o)[HEAD_DIM / 2], const Softmax& softmax, const float* sinks,
                                       bf16* out, float* lse, int ldo, int row, int rows, int head, int n_heads) {
  out += head * HEAD_DIM;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int r = row + 8 * h;
    if (r >= rows) continue;
    // Base 2 from here on. A sink may lie above every score, so it takes part in the maximum.
    float top = __fmul_rn(softmax.top[h], softmax.scale), sum = softmax.sum[h], factor = 1.f;
    if (sinks) {
      float sink = __fmul_rn(sinks[head], LOG2_E), next = fmaxf(top, sink);
      if (next > -INF) {
        factor = exp2_fast(top - next);
        sum = fmaf(sum, factor, exp2_fast(sink - next));
        top = next;
      }
    }
    // Not `sum > 0`, so that a row with a score that is no number shows it.
    const bool empty = sum == 0.f;
    factor = empty ? 0.f : factor / sum;
    if (threadIdx.x % 4 == 0)
      lse[(i64)r * n_heads + head] = empty ? -INF : __fmul_rn(__fadd_rn(top, log2f(sum)), LN_2);
    u32* to = (u32*)(out + (i64)r * ldo) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j)
      to[4 * j] = pack_bf16(o[4 * j + 2 * h] * factor, o[4 * j + 2 * h + 1] * factor);
  }
}
