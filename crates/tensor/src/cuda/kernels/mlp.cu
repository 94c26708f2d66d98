// SwiGLU and its gradient over rows of `width`, gate and up being strided columns of one or two matrices. Memory-bound:
// a step of a thread moves eight elements of each operand; every output may lie over an input, since a thread reads
// its elements of all operands before it writes any.
#include "common.cuh"

// GELU by its tanh approximation: x (1 + tanh z) / 2 = x sigmoid(2 z).
__device__ __forceinline__ float gelu(float x) { return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x)); }

// y = f(gate, up).
template <class F>
__device__ __forceinline__ void gated(bf16* y, const bf16* gate, const bf16* up, int rows, int width, int ldg, int ldu,
                                      int ldy, F f) {
  const bool wide = (width | ldg | ldu | ldy) % 8 == 0 && aligned(gate, up) && aligned(y);
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float g[V], u[V];
    load(gate + r * ldg + c, g);
    load(up + r * ldu + c, u);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] = f(g[i], u[i]);
    store(y + r * ldy + c, u);
  });
}

// SwiGLU, GEGLU, and SwiGLU of clamped inputs with a gate of slope alpha.
// Block 256; grid min(rows, ceil(rows * width / 2048)) (any grid is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    swiglu(bf16* y, const bf16* gate, const bf16* up, int rows, int width, int ldg, int ldu, int ldy) {
  gated(y, gate, up, rows, width, ldg, ldu, ldy, [](float g, float u) { return u * silu(g); });
}
extern "C" __global__ void __launch_bounds__(256)
    geglu(bf16* y, const bf16* gate, const bf16* up, int rows, int width, int ldg, int ldu, int ldy) {
  gated(y, gate, up, rows, width, ldg, ldu, ldy, [](float g, float u) { return u * gelu(g); });
}
extern "C" __global__ void __launch_bounds__(256)
    swiglu_clamped(bf16* y, const bf16* gate, const bf16* up, int rows, int width, int ldg, int ldu, int ldy,
                   float alpha, float limit) {
  gated(y, gate, up, rows, width, ldg, ldu, ldy, [=](float g, float u) {
    g = fminf(g, limit);
    return (fminf(fmaxf(u, -limit), limit) + 1.f) * g * sigmoid(alpha * g);
  });
}

// With s = sigmoid(gate): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, and y = gate s up again unless null.
// Block 256; grid as for swiglu; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(bf16* dgate, bf16* dup, bf16* y, const bf16* dy, const bf16* gate, const bf16* up, int rows,
                    int width, int lddy, int ldg, int ldu, int lddg, int lddu, int ldy) {
  const bool wide = (width | lddy | ldg | ldu | lddg | lddu) % 8 == 0 && aligned(dgate, dup) && aligned(dy, gate) &&
                    aligned(up) && (!y || (ldy % 8 == 0 && aligned(y)));
  for_columns(rows, width, wide, [&](i64 r, int c, auto w) {
    constexpr int V = decltype(w)::value;
    float d[V], g[V], u[V];
    load(dy + r * lddy + c, d);
    load(gate + r * ldg + c, g);
    load(up + r * ldu + c, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = sigmoid(g[i]), silu = g[i] * s, slope = d[i] * u[i] * s * (1.f + g[i] * (1.f - s));
      d[i] *= silu;
      u[i] *= silu;
      g[i] = slope;
    }
    store(dgate + r * lddg + c, g);
    store(dup + r * lddu + c, d);
    if (y) store(y + r * ldy + c, u);
  });
}
