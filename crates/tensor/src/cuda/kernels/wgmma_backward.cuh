// sm_90a only: matrix products of whole warpgroups (wgmma) and what goes with them, as attention_backward_wgmma.cu uses
// them.
#pragma once
#include "tensor_core_backward.cuh"
#include "warpgroup.cuh"

// ---- barriers in shared memory: beside those of warpgroup.cuh, one that asks without waiting ----

// Whether the phase of this parity (0 for the first phase, then alternating) is complete.
__device__ __forceinline__ bool barrier_done(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// Waits until it is: barrier_wait with its loop in one piece, which is what the backward kernels were measured with.
__device__ __forceinline__ void barrier_wait_in_place(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// x, which is the same in all lanes.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- tiles ----

// A tile of ROWS x WIDTH bf16 as wgmma reads it with the 128-byte swizzle: blocks of 64 columns one after another, in
// each rows of 128 bytes, whose 16-byte units are permuted by the row's number modulo 8. `base` is a multiple of 1024.
template <int ROWS, int WIDTH>
struct SwizzledTile {
  static constexpr int BYTES = ROWS * WIDTH * 2;
  u32 base;

  // Starts copying the ROWS rows of a matrix whose rows are `ld` elements apart; rows from `valid` on become zeros.
  // THREADS threads, of which this is the one of the given index.
  template <int THREADS>
  __device__ __forceinline__ void copy(int thread, const bf16* src, i64 ld, int valid) const {
    constexpr int UNITS = WIDTH / 8, STEP = THREADS / UNITS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread's units must all be permuted alike");
    int row = thread / UNITS, unit = thread % UNITS;
    u32 dst = base + unit / 8 * (ROWS * 128) + row * 128 + ((unit % 8 ^ (row & 7)) << 4);
    src += row * ld + unit * 8;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
      copy_async(dst + i * (STEP * 128), src, row + i * STEP < valid);
      src += STEP * ld;
    }
  }

  // Descriptors of operands: start address and two strides in units of 16 bytes, and 1 for the 128-byte swizzle in
  // bits 62, 63. Where the tile's base is the same in the whole warp, which the compiler must see (same_in_warp), they
  // are computed once for the warp.
  // Rows row.. (a multiple of 8) and columns 16 k .. 16 k + 16, where the summed-over index runs along the rows: 1024
  // bytes from 8 rows to the next 8.
  __device__ __forceinline__ u64 along(int row, int k) const {
    return descriptor(row * 128 + k / 4 * (ROWS * 128) + k % 4 * 32, 16);
  }
  // All columns of rows 16 k .. 16 k + 16, where the summed-over index runs across the rows (a transposed operand):
  // from 64 columns to the next 64, and 1024 bytes from 8 rows to the next 8.
  __device__ __forceinline__ u64 across(int k) const { return descriptor(k * 2048, ROWS * 128); }

  __device__ __forceinline__ u64 descriptor(u32 offset, u32 column_stride) const {
    u32 low = (base >> 4) + (offset >> 4) + (column_stride >> 4 << 16), high = 1024 >> 4 | 1u << 30;
    u64 both;
    asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low), "r"(high));
    return both;
  }
};

// ---- products; d[64, N] is spread over the warpgroup: warp w has rows 16 w .., there d[4 n ..] is laid out as mma's
// accumulator of columns 8 n .. ----

// Until at most N committed groups are still running.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After a wait: the compiler, which does not know what a wait waits for, reads d only from here on.
template <int N>
__device__ __forceinline__ void settled(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define F4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define F16(c, d, i) F4(c, d, i), F4(c, d, i + 4), F4(c, d, i + 8), F4(c, d, i + 12)
#define REGS_32                                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
  "%24, %25, %26, %27, %28, %29, %30, %31}"
#define REGS_64                                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "    \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define WGMMA_64 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS_32
#define WGMMA_128 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGS_64

// d = a b^T for a[64, 16], b[N, 16], both in shared memory with the summed-over index along their rows. That d is an
// output only matters: as an input too, it would tie the registers of a loop's steps together, and ptxas would
// serialize the products.
__device__ __forceinline__ void wgmma_first(float (&d)[32], u64 a, u64 b) {
  asm volatile(WGMMA_64 ", %32, %33, 0, 1, 1, 0, 0;" : F16("=f", d, 0), F16("=f", d, 16) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_first(float (&d)[64], u64 a, u64 b) {
  asm volatile(WGMMA_128 ", %64, %65, 0, 1, 1, 0, 0;"
               : F16("=f", d, 0), F16("=f", d, 16), F16("=f", d, 32), F16("=f", d, 48)
               : "l"(a), "l"(b));
}
// d += a b^T
__device__ __forceinline__ void wgmma(float (&d)[32], u64 a, u64 b) {
  asm volatile(WGMMA_64 ", %32, %33, 1, 1, 1, 0, 0;" : F16("+f", d, 0), F16("+f", d, 16) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[64], u64 a, u64 b) {
  asm volatile(WGMMA_128 ", %64, %65, 1, 1, 1, 0, 0;"
               : F16("+f", d, 0), F16("+f", d, 16), F16("+f", d, 32), F16("+f", d, 48)
               : "l"(a), "l"(b));
}
// d += a b for a[64, 16] in registers (laid out as two neighbouring accumulators) and b[16, N] in shared memory, the
// summed-over index across its rows.
__device__ __forceinline__ void wgmma(float (&d)[32], const u32* a, u64 b) {
  asm volatile(WGMMA_64 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : F16("+f", d, 0), F16("+f", d, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[64], const u32* a, u64 b) {
  asm volatile(WGMMA_128 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : F16("+f", d, 0), F16("+f", d, 16), F16("+f", d, 32), F16("+f", d, 48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d = A B^T for 64 rows of A from a_row and N rows of B from b_row.
template <int N, int A_ROWS, int B_ROWS, int WIDTH>
__device__ __forceinline__ void multiply_transposed(float (&d)[N / 2], SwizzledTile<A_ROWS, WIDTH> A, int a_row,
                                                    SwizzledTile<B_ROWS, WIDTH> B, int b_row) {
  wgmma_first(d, A.along(a_row, 0), B.along(b_row, 0));
#pragma unroll
  for (int i = 1; i < WIDTH / 16; i++) wgmma(d, A.along(a_row, i), B.along(b_row, i));
}
