// Mixtures of experts: picking experts, sorting rows by expert, and weighted sums of rows.
#include "common.cuh"

constexpr int WARPS = 4;            // of a block of `route`: one row each
constexpr int MOST_EXPERTS = 1024;  // MOST_EXPERTS of mixture.rs

// The best of a warp's candidates, of equal ones the first; `at` is NONE where there is none.
__device__ __forceinline__ void warp_best(float& value, u32& at) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float other = __shfl_xor_sync(NONE, value, o);
    const u32 place = __shfl_xor_sync(NONE, at, o);
    if (place != NONE && (at == NONE || other > value || (other == value && place < at))) value = other, at = place;
  }
}

// The place of the largest of n values that are not taken (NaN), which it takes; the same in every lane.
__device__ __forceinline__ u32 take_best(float* values, int n, float& value) {
  const int lane = threadIdx.x % 32;
  u32 at = NONE;
  value = 0.f;
  for (int i = lane; i < n; i += 32) {
    const float v = values[i];
    if (v == v && (at == NONE || v > value)) value = v, at = i;
  }
  warp_best(value, at);
  __syncwarp();
  if (lane == 0 && at != NONE) values[at] = __int_as_float(0x7fc00000);
  __syncwarp();
  return at;
}

// Experts [R, top_k] and weights [R, top_k] of R rows of logits [R, n] without their bias, as `pick` of cpu/mixture.rs
// has it. A group is worth the sum of its `best` (1 or 2) best experts. bias and correction may be null.
// Block 128; grid ceil(R / 4); no dynamic shared memory. n at most 1024, groups at most 32.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    route(u32* experts, float* weights, const float* logits, const float* bias, const float* correction, int rows,
          int n, int top_k, int groups, int kept, int best, bool is_softmax, bool is_normalised, float scale) {
  __shared__ float all_worth[WARPS][MOST_EXPERTS];
  const int lane = threadIdx.x % 32;
  const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  float* worth = all_worth[threadIdx.x / 32];
  logits += row * n;
  auto logit = [&](u32 i) { return bias ? logits[i] + bias[i] : logits[i]; };
  float top = -INF, sum = 0.f;
  for (int i = lane; i < n; i += 32) top = fmaxf(top, logit(i));
  top = warp_max(top);
  for (int i = lane; i < n; i += 32) sum += expf(logit(i) - top);
  sum = warp_sum(sum);
  auto score = [&](u32 i) {
    return is_softmax ? expf(logit(i) - top) / sum : 1.f / (1.f + expf(-logit(i)));
  };
  for (int i = lane; i < n; i += 32) {
    const float v = correction ? score(i) + correction[i] : logit(i);
    worth[i] = v == v ? v : -INF;  // what is no number counts as the smallest
  }
  __syncwarp();
  if (kept < groups) {
    const int size = n / groups;
    float value = __int_as_float(0x7fc00000);
    if (lane < groups) {
      float first = -INF, second = -INF;
      for (int i = lane * size; i < (lane + 1) * size; ++i) {
        const float v = worth[i];
        if (v > first) second = first, first = v;
        else if (v > second) second = v;
      }
      value = best == 2 ? first + second : first;
    }
    u32 open = 0;
    for (int k = 0; k < kept; ++k) {
      float v = value;
      u32 at = value == value ? (u32)lane : NONE;
      warp_best(v, at);
      if (at != NONE) open |= 1u << at;
      if (lane == (int)at) value = __int_as_float(0x7fc00000);
    }
    for (int i = lane; i < n; i += 32) {
      if (!(open >> (i / size) & 1)) worth[i] = __int_as_float(0x7fc00000);
    }
    __syncwarp();
  }
  float total = 0.f;
  for (int k = 0; k < top_k; ++k) {
    float value;
    const u32 at = take_best(worth, n, value);
    const u32 expert = at == NONE ? 0 : at;
    const float weight = score(expert);
    total += weight;
    if (lane == 0) experts[row * top_k + k] = expert, weights[row * top_k + k] = weight;
  }
  __syncwarp();
  const float divisor = is_normalised ? total + 1e-20f : 1.f;
  for (int k = lane; k < top_k; k += 32) weights[row * top_k + k] = weights[row * top_k + k] / divisor * scale;
}

// ---- Sorting the pairs of rows and experts by expert, then by pair ----

constexpr int SORTERS = 8;  // warps of an expert: each looks through its own stretch of the pairs

// The stretch of a warp: a multiple of 32 pairs from `first` on.
__device__ __forceinline__ int stretch(int pairs, int& first) {
  const int length = (pairs + SORTERS * 32 - 1) / (SORTERS * 32) * 32;
  first = threadIdx.x / 32 * length;
  const int last = first + length;
  return last < pairs ? last : pairs;
}

// counts[e, s]: pairs of expert e in stretch s. Block 256; grid experts; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(SORTERS * 32) count_pairs(u32* counts, const u32* experts, int pairs) {
  int first, count = 0;
  const int last = stretch(pairs, first);
  for (int i = first + threadIdx.x % 32; i < last; i += 32) count += experts[i] == blockIdx.x;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) count += __shfl_xor_sync(NONE, count, o);
  if (threadIdx.x % 32 == 0) counts[blockIdx.x * SORTERS + threadIdx.x / 32] = count;
}

// Routes of kernels/mixture.rs: ends [experts], sorted [pairs] (the pair of each slot), rows [pairs] and slots [pairs].
// Block 256; grid experts; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(SORTERS * 32)
    sort_pairs(u32* ends, u32* sorted, u32* rows, u32* slots, const u32* counts, const u32* experts, int pairs,
               int top_k) {
  const int lane = threadIdx.x % 32, before = blockIdx.x * SORTERS + threadIdx.x / 32;
  u32 slot = 0;
  for (int i = lane; i < before; i += 32) slot += counts[i];
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) slot += __shfl_xor_sync(NONE, slot, o);
  if (threadIdx.x == (SORTERS - 1) * 32) ends[blockIdx.x] = slot + counts[before];
  int first;
  const int last = stretch(pairs, first);
  for (int base = first; base < last; base += 32) {
    const int pair = base + lane;
    const bool mine = pair < last && experts[pair] == blockIdx.x;
    const u32 all = __ballot_sync(NONE, mine);
    if (mine) {
      const u32 at = slot + __popc(all & ((1u << lane) - 1));
      sorted[at] = pair, rows[at] = pair / top_k, slots[pair] = at;
    }
    slot += __popc(all);
  }
}

// y[r] = base[r] + sum over k of weights[r, k] x[index[r, k]], in the order of k, one rounding; base may be null, or y.
// Block 256; grid min(rows, ceil(rows * width / 2048)); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    weighted_rows(bf16* y, const bf16* x, const u32* index, const float* weights, const bf16* base, int rows, int width,
                  int n) {
  const bool wide = width % 8 == 0 && aligned(y, x) && aligned(base);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float sum[V] = {};
    if (base) load(base + r * width + c, sum);
    for (int k = 0; k < n; ++k) {
      float v[V];
      load(x + (i64)index[r * n + k] * width + c, v);
      const float weight = weights[r * n + k];
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
    }
    store(y + r * width + c, sum);
  });
}
