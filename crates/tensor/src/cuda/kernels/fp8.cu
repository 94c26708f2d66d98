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

// y = acc row_scale[r] col_scale[c]; y and acc share their row stride and may be the same.
// Block 256; grid min(rows, ceil(rows * width / 2048)) (any grid is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_columns(bf16* y, const bf16* acc, const float* row_scale, const float* col_scale, int rows, int width, i64 ld) {
  const bool wide = (width | ld) % 8 == 0 && aligned(y, acc) && aligned(col_scale);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float v[V], columns[V];
    load(acc + r * ld + c, v);
    load(col_scale + c, columns);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= row_scale[r] * columns[i];
    store(y + r * ld + c, v);
  });
}
