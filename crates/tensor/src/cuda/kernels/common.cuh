// What every kernel file starts from: element types and conversions, without any CUDA header, so that NVRTC needs
// none on the user's machine.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// bfloat16 as its bits; arithmetic is float32.
typedef u16 bf16;

constexpr u32 NONE = 0xffffffffu;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

// Rounds to nearest even; the first argument lands in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ bf16 to_bf16(float x) { return (bf16)(pack_bf16(x, 0.f) & 0xffffu); }
__device__ __forceinline__ float low_half(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(u32 v) { return __uint_as_float(v & 0xffff0000u); }

__device__ __forceinline__ void store(bf16* p, float x) { *p = to_bf16(x); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }

// The same value in every lane of the warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// ---- rows in pieces of 16 bytes ----

// Whether memory may be read and written 16 bytes at a time.
__device__ __forceinline__ bool aligned(const void* p) { return ((u64)p & 15) == 0; }
__device__ __forceinline__ bool aligned(const void* p, const void* q) { return (((u64)p | (u64)q) & 15) == 0; }

// V neighbouring elements as float32 and back, one rounding each; V is 1, or 8 with the address aligned.
__device__ __forceinline__ void load(const bf16* p, float (&v)[1]) { v[0] = to_float(*p); }
__device__ __forceinline__ void load(const float* p, float (&v)[1]) { v[0] = *p; }
__device__ __forceinline__ void load(const bf16* p, float (&v)[8]) {
  const uint4 u = *(const uint4*)p;
  v[0] = low_half(u.x), v[1] = high_half(u.x), v[2] = low_half(u.y), v[3] = high_half(u.y);
  v[4] = low_half(u.z), v[5] = high_half(u.z), v[6] = low_half(u.w), v[7] = high_half(u.w);
}
__device__ __forceinline__ void load(const float* p, float (&v)[8]) {
  const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class T>
__device__ __forceinline__ void store(T* p, const float (&v)[1]) { store(p, v[0]); }
__device__ __forceinline__ void store(bf16* p, const float (&v)[8]) {
  *(uint4*)p = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}
__device__ __forceinline__ void store(float* p, const float (&v)[8]) {
  ((float4*)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  ((float4*)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// How many elements a step of the loops below covers, as a type: `constexpr int V = decltype(w)::value`.
template <int V>
struct Width { static constexpr int value = V; };

// Calls f(i, Width) for all of 0..n: eight at a time if `wide`, the last n % 8 one by one. Any 1D grid and block.
template <class F>
__device__ __forceinline__ void for_elements(i64 n, bool wide, F f) {
  const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;
  const i64 whole = wide ? n / 8 : 0;
#pragma unroll 1  // many warps hide the latency, not many registers; so it is below
  for (i64 i = first; i < whole; i += step) f(i * 8, Width<8>());
#pragma unroll 1
  for (i64 i = whole * 8 + first; i < n; i += step) f(i, Width<1>());
}

// Threads of a block over rows of `units` steps: as many of them side by side as a row needs, the rest on further
// rows, so that narrow rows keep the block busy. The block has a power of two of threads; any 1D grid.
struct RowTile {
  i64 row, row_step;
  int unit, unit_step;
};
__device__ __forceinline__ RowTile row_tile(int units) {
  const int bits = units <= 1 ? 0 : 32 - __clz(units - 1), limit = 31 - __clz((int)blockDim.x);
  const int shift = bits < limit ? bits : limit, rows = (int)blockDim.x >> shift;
  return {(i64)blockIdx.x * rows + (threadIdx.x >> shift), (i64)gridDim.x * rows,
          (int)threadIdx.x & ((1 << shift) - 1), 1 << shift};
}

// Calls f(row, column, Width) for all elements of rows x width; `wide` needs a width that is a multiple of 8.
template <class F>
__device__ __forceinline__ void for_columns(int rows, int width, bool wide, F f) {
  const int units = wide ? width / 8 : width;
  const RowTile t = row_tile(units);
#pragma unroll 1
  for (i64 r = t.row; r < rows; r += t.row_step) {
#pragma unroll 1
    for (int u = t.unit; u < units; u += t.unit_step) {
      if (wide) f(r, u * 8, Width<8>());
      else f(r, u, Width<1>());
    }
  }
}

// ---- sums over a block (a multiple of 32 threads), the same value in every thread, in a fixed order ----

__device__ __forceinline__ float block_sum(float x) {
  __shared__ float part[32];
  x = warp_sum(x);
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < (int)blockDim.x / 32; ++i) sum += part[i];
  return sum;
}
__device__ __forceinline__ float block_max(float x) {
  __shared__ float part[32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float top = part[0];
  for (int i = 1; i < (int)blockDim.x / 32; ++i) top = fmaxf(top, part[i]);
  return top;
}

// 2^x by the special function unit: relative error about 2^-22, denormal results are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^-x overflows to infinity for very negative x, and the quotient is then zero, as it should be.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + exp2_fast(x * -1.4426950408889634f)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
