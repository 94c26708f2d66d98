// Instructions of the tensor cores and of asynchronous copies, as the attention backward kernels use them.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Asynchronous copies to shared memory; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void copy_16(u32 dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_4(u32 dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's committed groups are still on their way.
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_trans(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_trans(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8] of one warp. With g = lane / 4 and t = lane % 4 a lane holds c of rows g (c[0], c[1])
// and g + 8 (c[2], c[3]), columns 2t and 2t + 1.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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
      copy_16(at(row, unit), src + (in ? row * ld + unit * 8 : 0), in);
    }
  }

  // Rows row .. row + 16 and units unit, unit + 1 as the left operand of mma.
  __device__ __forceinline__ void left(u32 (&a)[4], int row, int unit) const {
    int lane = threadIdx.x & 31;
    load_matrix_x4(a, at(row + (lane & 15), unit + (lane >> 4)));
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
      load_matrix_x4(b, B.at(b_row + 8 * n + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
      mma(c[n], a, b[0], b[1]);
      mma(c[n + 1], a, b[2], b[3]);
    }
    if (N % 2) {
      u32 b[2];
      load_matrix_x2(b, B.at(b_row + 8 * (N - 1) + (lane & 7), 2 * k + ((lane >> 3) & 1)));
      mma(c[N - 1], a, b[0], b[1]);
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
    load_matrix_x4_trans(b, B.at(b_row + (lane & 15), unit + n + (lane >> 4)));
    mma(c[n], a, b[0], b[1]);
    mma(c[n + 1], a, b[2], b[3]);
  }
  if (N % 2) {
    u32 b[2];
    load_matrix_x2_trans(b, B.at(b_row + (lane & 15), unit + N - 1));
    mma(c[N - 1], a, b[0], b[1]);
  }
}
