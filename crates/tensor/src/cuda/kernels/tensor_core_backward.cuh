// Tiles in shared memory and products of them, as the attention backward kernels use them.
#pragma once
#include "tensor_core.cuh"

// A matrix of bf16 in shared memory whose rows are WIDTH elements without padding. The 16-byte units of a row are
// permuted by the row's number, so that the 8 rows that one ldmatrix phase reads lie in different banks.
template <int WIDTH>
struct Tile {
  static constexpr int UNITS = WIDTH / 8;
  // Rows repeat their bank after 8 / SPREAD rows; permuting SPREAD neighbouring units makes up for it.
  static constexpr int SPREAD = UNITS % 8 == 0 ? 8 : UNITS % 4 == 0 ? 4 : UNITS % 2 == 0 ? 2 : 1;
  u32 base;

  __device__ __forceinline__ u32 at(int row, int unit) const {
    return base + row * (WIDTH * 2) + ((unit ^ ((row / (8 / SPREAD)) & (SPREAD - 1))) << 4);
  }

  // Starts copying `rows` rows of a matrix whose rows are `ld` elements apart; rows from `valid` on become zeros.
  template <int THREADS>
  __device__ __forceinline__ void copy(const bf16* src, i64 ld, int rows, int valid) const {
    for (int i = threadIdx.x; i < rows * UNITS; i += THREADS) {
      int row = i / UNITS, unit = i % UNITS;
      bool in = row < valid;
      copy_async(at(row, unit), src + (in ? row * ld + unit * 8 : 0), in);
    }
  }

  // Rows row .. row + 16 and units unit, unit + 1 as the left operand of a product.
  __device__ __forceinline__ void left(u32 (&a)[4], int row, int unit) const {
    int lane = threadIdx.x & 31;
    load_matrices(a, at(row + (lane & 15), unit + (lane >> 4)));
  }
};

// c[16, 8 N] += A[16, WIDTH] B[8 N, WIDTH]^T: rows a_row.. of A and b_row.. of B.
template <int N, int WIDTH>
__device__ __forceinline__ void multiply_transposed(float (&c)[N][4], Tile<WIDTH> A, int a_row, Tile<WIDTH> B,
                                                    int b_row) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) {
    u32 a[4];
    A.left(a, a_row, 2 * k);
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      u32 b[4];
      load_matrices(b, B.at(b_row + 8 * n + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
      matrix_multiply(c[n], a, b[0], b[1]);
      matrix_multiply(c[n + 1], a, b[2], b[3]);
    }
    if (N % 2) {
      u32 b[2];
      load_matrix_pair(b, B.at(b_row + 8 * (N - 1) + (lane & 7), 2 * k + ((lane >> 3) & 1)));
      matrix_multiply(c[N - 1], a, b[0], b[1]);
    }
  }
}

// c[16, 8 N] += a[16, 16] B: rows b_row .. b_row + 16 and units unit .. unit + N of B.
template <int N, int WIDTH>
__device__ __forceinline__ void multiply(float (&c)[N][4], const u32 (&a)[4], Tile<WIDTH> B, int b_row, int unit) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n + 1 < N; n += 2) {
    u32 b[4];
    load_matrices_transposed(b, B.at(b_row + (lane & 15), unit + n + (lane >> 4)));
    matrix_multiply(c[n], a, b[0], b[1]);
    matrix_multiply(c[n + 1], a, b[2], b[3]);
  }
  if (N % 2) {
    u32 b[2];
    load_matrix_pair_transposed(b, B.at(b_row + (lane & 15), unit + N - 1));
    matrix_multiply(c[N - 1], a, b[0], b[1]);
  }
}
