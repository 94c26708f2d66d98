// Row movement, element-wise sums, conversions and fills. Memory-bound: eight elements a step where widths, strides
// and addresses allow it, else one. A letter per operand in a kernel's name says its type, the destination first:
// b = bf16, f = float32, h = IEEE half (read only).
//
// Blocks are 256 threads, without dynamic shared memory; any 1D grid is correct. The grids to use:
//   elements  ceil(n / 2048), at most some thousands            kernels that take `i64 n`
//   rows      min(rows, ceil(rows * width / 2048))              kernels that take rows and width
//   segments  min(n_segments, ceil(n_segments * width / 2048))  scatter_segments
#include "common.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

template <int V>
__device__ __forceinline__ void add(float (&v)[V], const float (&u)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] += u[i];
}

// d = s, bit for bit where the types are the same.
template <int V, class D, class S>
__device__ __forceinline__ void copy(D* d, const S* s) {
  float v[V];
  load(s, v);
  store(d, v);
}
template <int V>
__device__ __forceinline__ void copy(bf16* d, const bf16* s) {
  if (V == 8) *(uint4*)d = *(const uint4*)s;
  else *d = *s;
}

// d += s, or d = s.
template <int V, class D, class S>
__device__ __forceinline__ void put(D* d, const S* s, bool accumulate) {
  if (!accumulate) return copy<V>(d, s);
  float a[V], b[V];
  load(d, a);
  load(s, b);
  add(a, b);
  store(d, a);
}

__device__ __forceinline__ bool wide_rows(const void* d, const void* s, int width, i64 ldd, i64 lds) {
  return (width | ldd | lds) % 8 == 0 && aligned(d, s);
}

// y = a + b; y may be either.
KERNEL add_bb(bf16* y, const bf16* a, const bf16* b, i64 n) {
  for_elements(n, aligned(a, b) && aligned(y), [&](i64 i, auto w) {
    constexpr int V = decltype(w)::value;
    float u[V], v[V];
    load(a + i, u);
    load(b + i, v);
    add(u, v);
    store(y + i, u);
  });
}

// y = a b over rows of `width`, y dense.
KERNEL product(bf16* y, const bf16* a, const bf16* b, int rows, int width, i64 lda, i64 ldb) {
  const bool wide = (width | lda | ldb) % 8 == 0 && aligned(a, b) && aligned(y);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float u[V], v[V];
    load(a + r * lda + c, u);
    load(b + r * ldb + c, v);
#pragma unroll
    for (int k = 0; k < V; ++k) u[k] *= v[k];
    store(y + r * width + c, u);
  });
}

// y[r, c] = sum over k of w[c, k] x[index[k, r], c]; 0xffffffff names a row of zeros.
KERNEL short_conv(bf16* y, const bf16* x, const u32* index, const bf16* w, int rows, int width, int taps) {
  for_columns(rows, width, false, [&](i64 r, int c, auto) {
    float sum = 0.f;
    for (int k = 0; k < taps; ++k) {
      const u32 from = index[(i64)k * rows + r];
      if (from != 0xffffffffu) sum = fmaf(to_float(w[c * taps + k]), to_float(x[(i64)from * width + c]), sum);
    }
    store(y + r * width + c, sum);
  });
}

// y = f(x, number); y may be x.
#define MAP(name, T, F)                                                          \
  KERNEL name(T* y, const T* x, i64 n, float number) {                           \
    for_elements(n, aligned(x, y), [&](i64 i, auto w) {                          \
      constexpr int V = decltype(w)::value;                                      \
      float v[V];                                                                \
      load(x + i, v);                                                            \
      _Pragma("unroll") for (int k = 0; k < V; ++k) v[k] = F(v[k], number);      \
      store(y + i, v);                                                           \
    });                                                                          \
  }
__device__ __forceinline__ float times(float x, float factor) { return factor * x; }
__device__ __forceinline__ float soft_capped(float x, float cap) { return cap * tanhf(x / cap); }
__device__ __forceinline__ float sigmoid(float x, float) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float silu(float x, float) { return x / (1.f + expf(-x)); }
MAP(scale_b, bf16, times)
MAP(scale_f, float, times)
MAP(soft_cap_b, bf16, soft_capped)
MAP(soft_cap_f, float, soft_capped)
MAP(sigmoid_b, bf16, sigmoid)
MAP(sigmoid_f, float, sigmoid)
MAP(silu_b, bf16, silu)
MAP(silu_f, float, silu)

// dst += src, one rounding.
#define ADD_ASSIGN(name, D, S)                                                                                \
  KERNEL name(D* dst, const S* src, i64 n) {                                                                  \
    for_elements(n, aligned(dst, src),                                                                        \
                 [&](i64 i, auto w) { put<decltype(w)::value>(dst + i, src + i, true); });                    \
  }
ADD_ASSIGN(add_assign_bb, bf16, bf16)
ADD_ASSIGN(add_assign_ff, float, float)
ADD_ASSIGN(add_assign_fb, float, bf16)
ADD_ASSIGN(add_assign_bf, bf16, float)

// dst[r] = src[index[r]]; NONE gives zeros.
#define GATHER_ROWS(name, T)                                                                                  \
  KERNEL name(T* dst, const T* src, const u32* index, int rows, int width, i64 ldsrc, i64 lddst) {            \
    for_columns(rows, width, wide_rows(dst, src, width, lddst, ldsrc), [&](i64 r, int c, auto w) {            \
      constexpr int V = decltype(w)::value;                                                                   \
      const u32 from = index[r];                                                                              \
      const float zeros[V] = {};                                                                              \
      if (from == NONE) store(dst + r * lddst + c, zeros);                                                    \
      else copy<V>(dst + r * lddst + c, src + from * ldsrc + c);                                              \
    });                                                                                                       \
  }
GATHER_ROWS(gather_rows_b, bf16)
GATHER_ROWS(gather_rows_f, float)

// dst[index[r]] (+)= src[r]; the indices are distinct, NONE is passed over.
#define SCATTER_ROWS(name, D, S)                                                                              \
  KERNEL name(D* dst, const S* src, const u32* index, int rows, int width, i64 lddst, i64 ldsrc,              \
              int accumulate) {                                                                               \
    for_columns(rows, width, wide_rows(dst, src, width, lddst, ldsrc), [&](i64 r, int c, auto w) {            \
      const u32 to = index[r];                                                                                \
      if (to != NONE) put<decltype(w)::value>(dst + to * lddst + c, src + r * ldsrc + c, accumulate);         \
    });                                                                                                       \
  }
SCATTER_ROWS(scatter_rows_bb, bf16, bf16)
SCATTER_ROWS(scatter_rows_fb, float, bf16)
SCATTER_ROWS(scatter_rows_ff, float, float)

// The scatter for indices that repeat: segment s adds the sum of its source rows order[starts[s]..starts[s + 1]], in
// that order, to dst[target[s]]; the targets are distinct, NONE is passed over.
#define SCATTER_SEGMENTS(name, D, S)                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                        \
      name(D* dst, const S* src, const u32* order, const u32* starts, const u32* target, int n_segments,      \
           int width, i64 lddst, i64 ldsrc) {                                                                 \
    for_columns(n_segments, width, wide_rows(dst, src, width, lddst, ldsrc), [&](i64 s, int c, auto w) {      \
      constexpr int V = decltype(w)::value;                                                                   \
      const u32 to = target[s], end = starts[s + 1];                                                          \
      if (to == NONE) return;                                                                                 \
      float sum[V] = {}, v[V];                                                                                \
      _Pragma("unroll 4") for (u32 i = starts[s]; i < end; ++i) {                                             \
        load(src + order[i] * ldsrc + c, v);                                                                  \
        add(sum, v);                                                                                          \
      }                                                                                                       \
      load(dst + to * lddst + c, v);                                                                          \
      add(v, sum);                                                                                            \
      store(dst + to * lddst + c, v);                                                                         \
    });                                                                                                       \
  }
SCATTER_SEGMENTS(scatter_segments_fb, float, bf16)
SCATTER_SEGMENTS(scatter_segments_ff, float, float)
SCATTER_SEGMENTS(scatter_segments_bb, bf16, bf16)

// dst[to[r]] = src[from[r]]; a null list means r itself, a NONE in either that nothing is copied.
#define COPY_ROWS(name, T)                                                                                    \
  KERNEL name(T* dst, const u32* to, const T* src, const u32* from, int rows, int width, i64 lddst,           \
              i64 ldsrc) {                                                                                    \
    for_columns(rows, width, wide_rows(dst, src, width, lddst, ldsrc), [&](i64 r, int c, auto w) {            \
      const u32 d = to ? to[r] : (u32)r, s = from ? from[r] : (u32)r;                                         \
      if (d != NONE && s != NONE) copy<decltype(w)::value>(dst + d * lddst + c, src + s * ldsrc + c);         \
    });                                                                                                       \
  }
COPY_ROWS(copy_rows_b, bf16)
COPY_ROWS(copy_rows_f, float)

// dst[r, c] (+)= src[r, c] of two strided matrices.
#define COPY_COLUMNS(name, D, S)                                                                              \
  KERNEL name(D* dst, const S* src, int rows, int width, i64 lddst, i64 ldsrc, int accumulate) {              \
    for_columns(rows, width, wide_rows(dst, src, width, lddst, ldsrc), [&](i64 r, int c, auto w) {            \
      put<decltype(w)::value>(dst + r * lddst + c, src + r * ldsrc + c, accumulate);                          \
    });                                                                                                       \
  }
COPY_COLUMNS(copy_columns_bb, bf16, bf16)
COPY_COLUMNS(copy_columns_fb, float, bf16)
COPY_COLUMNS(copy_columns_bf, bf16, float)
COPY_COLUMNS(copy_columns_ff, float, float)

// y[r] += bias, in place.
KERNEL bias_add(bf16* y, const bf16* bias, int rows, int width, i64 ld) {
  for_columns(rows, width, wide_rows(y, bias, width, ld, ld), [&](i64 r, int c, auto w) {
    put<decltype(w)::value>(y + r * ld + c, bias + c, true);
  });
}

// Conversions of n elements, rounding to nearest even.
#define CAST(name, D, S)                                                                                      \
  KERNEL name(D* dst, const S* src, i64 n) {                                                                  \
    for_elements(n, aligned(dst, src), [&](i64 i, auto w) { copy<decltype(w)::value>(dst + i, src + i); });   \
  }
CAST(cast_bf, bf16, float)
CAST(cast_fb, float, bf16)

__device__ __forceinline__ float half_to_float(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
#define CAST_HALF(name, D)                                                                                    \
  KERNEL name(D* dst, const u16* src, i64 n) {                                                                \
    for_elements(n, aligned(dst, src), [&](i64 i, auto w) {                                                   \
      constexpr int V = decltype(w)::value;                                                                   \
      float v[V];                                                                                             \
      load(src + i, v); /* as if bf16: the bits are its upper half */                                         \
      _Pragma("unroll") for (int j = 0; j < V; ++j) v[j] = half_to_float((u16)(__float_as_uint(v[j]) >> 16)); \
      store(dst + i, v);                                                                                      \
    });                                                                                                       \
  }
CAST_HALF(cast_bh, bf16)
CAST_HALF(cast_fh, float)

KERNEL fill_f(float* dst, float value, i64 n) {
  for_elements(n, aligned(dst), [&](i64 i, auto w) {
    constexpr int V = decltype(w)::value;
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = value;
    store(dst + i, v);
  });
}

// A normal number of its own for every counter: 48 bits of splitmix64 (Steele, Lea and Flood, 2014), Box-Muller.
__device__ __forceinline__ float normal(u64 counter) {
  u64 x = (counter + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  const float u = (float)((u32)(x >> 40) + 1) * 0x1p-24f, angle = (float)((u32)x & 0xffffffu) * 0x1p-23f;
  return sqrtf(-2.f * logf(u)) * cospif(angle);
}

// dst[i] = mean + std * (a normal number that seed and i decide): random weights for benchmarks.
#define FILL_NORMAL(name, T)                                                                                  \
  KERNEL name(T* dst, i64 n, u64 seed, float mean, float std) {                                               \
    for_elements(n, aligned(dst), [&](i64 i, auto w) {                                                        \
      constexpr int V = decltype(w)::value;                                                                   \
      float v[V];                                                                                             \
      _Pragma("unroll") for (int j = 0; j < V; ++j) v[j] = fmaf(std, normal(seed + (u64)(i + j)), mean);      \
      store(dst + i, v);                                                                                      \
    });                                                                                                       \
  }
FILL_NORMAL(fill_normal_b, bf16)
FILL_NORMAL(fill_normal_f, float)

// Sets *flag to 1 if an element is NaN or infinite, and leaves it alone otherwise.
#define ALL_FINITE(name, T)                                                                                   \
  KERNEL name(u32* flag, const T* x, i64 n) {                                                                 \
    bool bad = false;                                                                                         \
    for_elements(n, aligned(x), [&](i64 i, auto w) {                                                          \
      float v[decltype(w)::value];                                                                            \
      load(x + i, v);                                                                                         \
      for (float y : v) bad |= (__float_as_uint(y) & 0x7f800000u) == 0x7f800000u;                             \
    });                                                                                                       \
    if (bad) *flag = 1;                                                                                       \
  }
ALL_FINITE(all_finite_b, bf16)
ALL_FINITE(all_finite_f, float)

// Two attentions of the same queries over different keys as one: outputs a and b, a row per query and head, weighed by
// their shares of the sum of exponentials. A row that saw nothing in either stays zero, with lse = -inf.
KERNEL merge_attention(bf16* y, float* lse, const bf16* a, const float* lse_a, const bf16* b, const float* lse_b,
                       int rows, int width) {
  const bool wide = width % 8 == 0 && aligned(a, b) && aligned(y);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    const float la = lse_a[r], lb = lse_b[r], most = fmaxf(la, lb);
    const bool blind = most == -INF;
    const float sum = blind ? 1.f : expf(la - most) + expf(lb - most), all = most + logf(sum);
    const float share_a = blind ? 0.f : expf(la - all), share_b = blind ? 0.f : expf(lb - all);
    float u[V], v[V];
    load(a + r * width + c, u);
    load(b + r * width + c, v);
#pragma unroll
    for (int k = 0; k < V; ++k) u[k] = share_a * u[k] + share_b * v[k];
    store(y + r * width + c, u);
    if (c == 0) lse[r] = all;
  });
}
