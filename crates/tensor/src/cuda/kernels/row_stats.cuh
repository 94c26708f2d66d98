// Maximum, its place and the sum of exponentials of one row by one block.
//
// Elements are dealt out V at a time (8 where the row allows 16-byte access, else 1), unit u of a row to thread
// u % blockDim.x. Exponentials are powers of two.
#pragma once
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f;
// Stands for minus infinity as a running maximum: differences from it stay numbers.
constexpr float LOWEST = -1e38f;

constexpr float LARGEST = 3.402823466e38f;

// The weight of the acceptance's gradient where its logarithm is weighted, as in cpu/loss.rs: never infinite.
__device__ __forceinline__ float of_logarithm(float weight, float acceptance) {
  return acceptance > 0.f ? fmaxf(fminf(weight / acceptance, LARGEST), -LARGEST) : 0.f;
}

// What a thread has seen of a row: the largest logit, the sum of e^(logit - top), and the first column of the unit in
// which top first came up.
struct Seen {
  float top, sum;
  int at;
};

template <int V>
__device__ __forceinline__ void take(Seen& s, const float (&z)[V], int c) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < V; ++i) top = fmaxf(top, z[i]);
  s.at = top > s.top ? c : s.at;
  top = fmaxf(top, s.top);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += exp2_fast((z[i] - top) * LOG2E);
  s.sum = fmaf(s.sum, exp2_fast((s.top - top) * LOG2E), sum);  // exactly one where top stays
  s.top = top;
}

// The smallest over the block, in every thread.
__device__ __forceinline__ u32 block_min(u32 x) {
  __shared__ u32 part[32];
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const u32 y = __shfl_xor_sync(0xffffffffu, x, o);
    x = y < x ? y : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < (int)blockDim.x / 32; ++i) x = part[i] < x ? part[i] : x;
  return x;
}

// The block's maximum, its sum of e^(logit - top), and the first column that has the maximum (0 if none has), given
// what each thread saw of the row z.
struct Row {
  float top, sum;
  u32 argmax;
};
template <int V, class T>
__device__ __forceinline__ Row over_block(const Seen& s, const T* z) {
  Row r;
  r.top = block_max(s.top);
  r.sum = block_sum(s.sum * exp2_fast((s.top - r.top) * LOG2E));
  u32 first = NONE;
  if (s.top == r.top && s.at >= 0) {
    float v[V];
    load(z + s.at, v);
#pragma unroll
    for (int i = V - 1; i >= 0; --i) first = v[i] == r.top ? s.at + i : first;
  }
  first = block_min(first);
  r.argmax = first == NONE ? 0 : first;
  return r;
}

template <int V, class T>
__device__ __forceinline__ Row row_stats(const T* z, int n) {
  Seen s = {LOWEST, 0.f, -1};
#pragma unroll 2
  for (int c = threadIdx.x * V; c < n; c += blockDim.x * V) {
    float v[V];
    load(z + c, v);
    take(s, v, c);
  }
  return over_block<V>(s, z);
}

template <class T>
__device__ __forceinline__ Row row_stats_any(const T* z, int n, i64 ld) {
  // z of every row is aligned or of none, as ld is a multiple of 8.
  return (n | ld) % 8 == 0 && aligned(z) ? row_stats<8>(z, n) : row_stats<1>(z, n);
}
