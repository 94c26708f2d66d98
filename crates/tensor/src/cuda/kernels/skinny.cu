// y = x wᵀ for few rows, as in decoding: bound by reading w once. A row's bits do not depend on the number of rows: every
// output is the sum, in the same order, of the same partial sums, whichever rows are computed beside it.
//
// A block computes 16 columns for up to 64 rows. Its eight warps share k in turns of 64 and add up at the end. The
// product goes through the matrix instructions with w as the side of 16 rows, so that eight rows of x cost as much as
// one and w is widened nowhere. Both sides' fragments come straight from memory: lane 4 g + c takes eight neighbouring
// elements at 8 c, which stand for other places in k than the instruction's own, but for the same ones on both sides.
#include "tensor_core.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int COLUMNS = 16;    // of a block
constexpr int ROWS = 64;       // of a block, in groups of eight
constexpr int TURN = 64;       // elements of k a warp takes at a time
constexpr int PITCH = 20;      // of a row of partial sums: spreads a warp's writes over all banks

__device__ __forceinline__ uint4 load_or_zeros(const bf16* p, bool valid) {
  return valid ? *(const uint4*)p : make_uint4(0, 0, 0, 0);
}

// The warp's partial sums of GROUPS x 8 rows and 16 columns into part [ROWS, PITCH]. x and w are the block's first row
// and column, m and n what there is from there on; lanes beyond read the last one, for nobody.
template <int GROUPS>
__device__ __forceinline__ void warp_product(float* part, const bf16* x, const bf16* w, int m, int n, int k, i64 ldx,
                                             i64 ldw) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const bf16* w0 = w + (g < n ? g : n - 1) * ldw + 8 * c;
  const bf16* w1 = w + (g + 8 < n ? g + 8 : n - 1) * ldw + 8 * c;
  const bf16* rows[GROUPS];
  float sums[GROUPS][4] = {};
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) rows[i] = x + (8 * i + g < m ? 8 * i + g : m - 1) * ldx + 8 * c;
#pragma unroll(GROUPS == 1 ? 4 : GROUPS == 8 ? 1 : 2)
  for (int at = threadIdx.x / 32 * TURN; at < k; at += WARPS * TURN) {
    const bool valid[2] = {at + 8 * c < k, at + 32 + 8 * c < k};
    uint4 a0[2], a1[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a0[h] = load_or_zeros(w0 + at + 32 * h, valid[h]);
      a1[h] = load_or_zeros(w1 + at + 32 * h, valid[h]);
    }
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 b = load_or_zeros(rows[i] + at + 32 * h, valid[h]);
        const u32 low[4] = {a0[h].x, a1[h].x, a0[h].y, a1[h].y}, high[4] = {a0[h].z, a1[h].z, a0[h].w, a1[h].w};
        matrix_multiply(sums[i], low, b.x, b.y);
        matrix_multiply(sums[i], high, b.z, b.w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) part[(8 * i + 2 * c + j % 2) * PITCH + g + 8 * (j / 2)] = sums[i][j];
  }
}

// The same into the same place where rows cannot be read 16 bytes at a time: a warp's sums are complete here and those
// of the other warps zeros, so that the sum over warps is the same code.
__device__ __forceinline__ void warp_product_narrow(float* part, const bf16* x, const bf16* w, int m, int n, int k,
                                                    i64 ldx, i64 ldw) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int c = 0; c < COLUMNS; ++c) {
    for (int r = 0; r < m; ++r) {
      float sum = 0.f;
      if (c % WARPS == warp && c < n) {
        for (int i = lane; i < k; i += 32) sum = fmaf(to_float(x[r * ldx + i]), to_float(w[c * ldw + i]), sum);
        sum = warp_sum(sum);
      }
      if (lane == 0) part[r * PITCH + c] = sum;
    }
  }
}

template <class T>
__device__ __forceinline__ void skinny_linear(T* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
                                              int m, int n, int k, i64 ldx, i64 ldw, i64 ldy, i64 ldres) {
  __shared__ float parts[WARPS][ROWS * PITCH];
  const int first = blockIdx.x * COLUMNS, row = blockIdx.y * ROWS;
  const int rows = m - row < ROWS ? m - row : ROWS, columns = n - first < COLUMNS ? n - first : COLUMNS;
  const bool wide = (k | ldx | ldw) % 8 == 0 && aligned(x, w);
  float* part = parts[threadIdx.x / 32];
  x += row * ldx;
  w += first * ldw;
  if (!wide) warp_product_narrow(part, x, w, rows, columns, k, ldx, ldw);
  else if (rows <= 8) warp_product<1>(part, x, w, rows, columns, k, ldx, ldw);
  else if (rows <= 16) warp_product<2>(part, x, w, rows, columns, k, ldx, ldw);
  else if (rows <= 32) warp_product<4>(part, x, w, rows, columns, k, ldx, ldw);
  else warp_product<8>(part, x, w, rows, columns, k, ldx, ldw);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    if (c >= columns) continue;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < WARPS; ++j) sum += parts[j][r * PITCH + c];
    if (bias) sum += to_float(bias[first + c]);
    if (residual) sum += to_float(residual[(row + r) * ldres + first + c]);
    store(y + (row + r) * ldy + first + c, sum);
  }
}

// y [m, n] = x [m, k] wᵀ, w [n, k], plus bias [n] and residual [m, n] unless null; sums in float32, one rounding. y may
// be residual. Any m is correct; w is read once for every 64 rows.
// Block 256; grid (ceil(n / 16), ceil(m / 64)); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    skinny_linear_b(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual, int m, int n, int k,
                    i64 ldx, i64 ldw, i64 ldy, i64 ldres) {
  skinny_linear(y, x, w, bias, residual, m, n, k, ldx, ldw, ldy, ldres);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    skinny_linear_f(float* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual, int m, int n, int k,
                    i64 ldx, i64 ldw, i64 ldy, i64 ldres) {
  skinny_linear(y, x, w, bias, residual, m, n, k, ldx, ldw, ldy, ldres);
}
