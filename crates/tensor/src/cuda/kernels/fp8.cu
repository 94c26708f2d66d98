// Rows as 8-bit floats (e4m3) with a scale each, and the scales' return to a product's output.
#include "common.cuh"

constexpr int THREADS = 256;

// Two values to e4m3, saturating, to nearest even; the first lands in the low byte. Devices before sm_89 have no such
// instruction and the host never calls this there.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  __trap();
  return 0;
#endif
}
__device__ __forceinline__ void store_e4m3(u8* p, const float (&v)[1]) { *p = (u8)pack_e4m3(v[0], 0.f); }
__device__ __forceinline__ void store_e4m3(u8* p, const float (&v)[8]) {
  *(uint2*)p = make_uint2(pack_e4m3(v[0], v[1]) | (u32)pack_e4m3(v[2], v[3]) << 16,
                          pack_e4m3(v[4], v[5]) | (u32)pack_e4m3(v[6], v[7]) << 16);
}

template <int V>
__device__ __forceinline__ void quantize(u8* y, float* scale, const bf16* x, int width) {
  const int first = threadIdx.x * V, step = THREADS * V;
  float top = 0.f;
#pragma unroll 2
  for (int c = first; c < width; c += step) {
    float v[V];
    load(x + c, v);
#pragma unroll
    for (int i = 0; i < V; ++i) top = fmaxf(top, fabsf(v[i]));
  }
  top = block_max(top);
  const float unit = top > 0.f ? top / 448.f : 1.f;
  if (threadIdx.x == 0) *scale = unit;
#pragma unroll 2
  for (int c = first; c < width; c += step) {  // from the caches this time
    float v[V];
    load(x + c, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = __fdiv_rn(v[i], unit);
    store_e4m3(y + c, v);
  }
}

// scale[r] = max |x[r]| / 448, the largest e4m3 number (1 for a row of zeros); y[r] = x[r] / scale[r], y [rows, width].
// A block per row: grid rows; block 256; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_rows(u8* y, float* scale, const bf16* x, int rows, int width, i64 ldx) {
  const i64 r = blockIdx.x;
  const bool wide = (width | ldx) % 8 == 0 && aligned(x) && ((u64)y & 7) == 0;
  if (wide) quantize<8>(y + r * width, scale + r, x + r * ldx, width);
  else quantize<1>(y + r * width, scale + r, x + r * ldx, width);
}

// ---- what computes a row and rounds it in one pass: to the bits of rounding to bf16 first and to 8 bits then ----

// Eight neighbouring bf16 values as a thread holds them.
struct Held {
  u32 v[4];
  __device__ __forceinline__ void set(const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  }
  __device__ __forceinline__ float at(int i) const { return i & 1 ? high_half(v[i / 2]) : low_half(v[i / 2]); }
};

// Writes the pieces that the block holds of one row of `width`: piece k of a thread is column 8 (k blockDim + thread).
template <int PIECES>
__device__ __forceinline__ void store_rounded(u8* y, float* scale, const Held (&held)[PIECES], int width) {
  float top = 0.f;
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(held[k].at(i)));
  }
  top = block_max(top);
  const float unit = top > 0.f ? top / 448.f : 1.f;
  if (threadIdx.x == 0) *scale = unit;
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
    const int c = 8 * (k * (int)blockDim.x + (int)threadIdx.x);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fdiv_rn(held[k].at(i), unit);
    if (c < width) store_e4m3(y + c, v);
  }
}

template <int PIECES>
__device__ __forceinline__ void norm_rounded(u8* y, float* scale, const bf16* x, const bf16* w, int width, float eps) {
  Held held[PIECES];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
    const int c = 8 * (k * (int)blockDim.x + (int)threadIdx.x);
    float v[8] = {};
    if (c < width) load(x + c, v);
    held[k].set(v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(v[i], v[i], sum);
  }
  const float rstd = 1.f / sqrtf(block_sum(sum) / width + eps);
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
    const int c = 8 * (k * (int)blockDim.x + (int)threadIdx.x);
    float v[8] = {};
    if (c < width) load(w + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= held[k].at(i) * rstd;
    held[k].set(v);
  }
  store_rounded(y, scale, held, width);
}

// quantize_rows(x rstd w), x [rows, width]; width a multiple of 8 up to 16384, everything 16-byte aligned.
// A block per row: grid rows; block 256; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_rounded(u8* y, float* scale, const bf16* x, const bf16* w, int rows, int width, float eps) {
  const i64 r = blockIdx.x;
  y += r * width, x += r * width, scale += r;
  if (width <= 2 * 8 * THREADS) norm_rounded<2>(y, scale, x, w, width, eps);
  else if (width <= 4 * 8 * THREADS) norm_rounded<4>(y, scale, x, w, width, eps);
  else norm_rounded<8>(y, scale, x, w, width, eps);
}

template <int PIECES>
__device__ __forceinline__ void swiglu_of(u8* y, float* scale, const bf16* gate_up, int width) {
  Held held[PIECES];
#pragma unroll
  for (int k = 0; k < PIECES; ++k) {
    const int c = 8 * (k * (int)blockDim.x + (int)threadIdx.x);
    float g[8] = {}, u[8] = {};
    if (c < width) load(gate_up + c, g), load(gate_up + width + c, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] *= silu(g[i]);
    held[k].set(u);
  }
  store_rounded(y, scale, held, width);
}

// quantize_rows(silu(gate) up), gate_up [rows, 2 width]; width a multiple of 8 up to 32768, everything 16-byte aligned.
// A block per row: grid rows; block 512; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(512)
    swiglu_rounded(u8* y, float* scale, const bf16* gate_up, int rows, int width) {
  const i64 r = blockIdx.x;
  y += r * width, gate_up += r * 2 * width, scale += r;
  if (width <= 2 * 8 * 512) swiglu_of<2>(y, scale, gate_up, width);
  else if (width <= 4 * 8 * 512) swiglu_of<4>(y, scale, gate_up, width);
  else swiglu_of<8>(y, scale, gate_up, width);
}

// y = acc row_scale[r] col_scale[c] (+ added); all share a row stride, y may be acc, added may be null.
// Block 256; grid min(rows, ceil(rows * width / 2048)) (any grid is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_columns(bf16* y, const bf16* acc, const float* row_scale, const float* col_scale, const bf16* added, int rows,
                  int width, i64 ld) {
  const bool wide = (width | ld) % 8 == 0 && aligned(y, acc) && aligned(col_scale, added);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float v[V], columns[V], more[V] = {};
    load(acc + r * ld + c, v);
    load(col_scale + c, columns);
    if (added) load(added + r * ld + c, more);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = fmaf(v[i], row_scale[r] * columns[i], more[i]);
    store(y + r * ld + c, v);
  });
}
