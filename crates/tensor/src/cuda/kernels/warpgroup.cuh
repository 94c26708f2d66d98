// Hopper's warpgroup matrix instructions and what feeds them: shared memory barriers, named barriers, proxy fences.
// Compiles for sm_90a only.
//
// Matrices in shared memory are in panels of 64 columns (128 bytes): row r of a panel starts at byte 128 r, and its
// 16-byte chunk i lies at place i ^ (r % 8), so that neither rows nor columns of chunks meet in one bank. Panels start
// at multiples of 1024 bytes, which makes the permutation one of address bits; the hardware undoes it.
#pragma once
#include "tensor_core.cuh"

// ---- Barriers in shared memory -------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of the phase of this parity; phases alternate 0, 1, 0, ...
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// One arrival, which says how many bytes the copy engine will bring in this phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// What the copy engine has to know of a matrix of bytes; see TensorMap of the crate cuda.
struct alignas(64) TensorMap {
  u64 opaque[16];
};
// Starts copying the map's box from this byte and row on into shared memory, and tells the barrier when it is there.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int byte, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"((u64)&map), "r"(byte), "r"(row), "r"(barrier)
      : "memory");
}

// Named barriers for some of a block's threads; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's writes to shared memory visible to the matrix instructions, which read through another path.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Moves registers between the warpgroups of a block; every warp of a warpgroup calls it.
template <int N>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Matrices ------------------------------------------------------------------------------------------------------

// Copies ROWS rows of COLUMNS elements into panels. `thread` counts the THREADS that do it: each copies one chunk of
// every STEP-th row, so that its places differ by constants and it spends few instructions on a copy.
template <int ROWS, int COLUMNS, int THREADS>
struct PanelCopy {
  static constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS, COPIES = ROWS / STEP;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0 && 8 % STEP == 0, "whole rows per step");
  int chunk, row;

  __device__ __forceinline__ explicit PanelCopy(int thread) : chunk(thread % CHUNKS), row(thread / CHUNKS) {}

  __device__ __forceinline__ u32 place(u32 to, int i) const {
    // row < STEP, which divides 8: bits of row and of i * STEP do not meet.
    return (to + chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8 ^ row) * 16 ^ i * STEP % 8 * 16)) + i * STEP * 128;
  }

  // Consecutive rows.
  __device__ __forceinline__ void rows(u32 to, const bf16* from, int ld) const {
    const u8* p = (const u8*)(from + (i64)row * ld + chunk * 8);
    const i64 step = (i64)STEP * ld * 2;
#pragma unroll
    for (int i = 0; i < COPIES; ++i, p += step) copy_async(place(to, i), p, true);
  }

  // Row i comes from row at(i), and zeros where that is NONE.
  template <class At>
  __device__ __forceinline__ void gather(u32 to, const bf16* from, int ld, At at) const {
    from += chunk * 8;
#pragma unroll 8
    for (int i = 0; i < COPIES; ++i) {
      u32 r = at(row + i * STEP);
      copy_async(place(to, i), from + (i64)(r == NONE ? 0 : r) * ld, r != NONE);
    }
  }
};

// Byte offset of chunk `chunk` (8 elements) of a row, in panels of `panel` bytes.
__device__ __forceinline__ u32 panel_offset(u32 panel, int row, int chunk) {
  return chunk / 8 * panel + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

// Describes a matrix in panels. Where columns run along the inner dimension of the product, rows of 8 follow each other
// at 1024 bytes and `panel` is not read. Where rows do (values), it is the distance of panels.
__device__ __forceinline__ u64 describe(u32 address, u32 panel) {
  return (u64)(address >> 4) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// The same matrix some bytes further on.
__device__ __forceinline__ u64 advance(u64 matrix, u32 bytes) { return matrix + (bytes >> 4); }

// Before products that use registers written since the last ones.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are in flight. x is the result of a group that has ended: the compiler must not
// read it earlier.
template <int PENDING, int N>
__device__ __forceinline__ void products_wait(float (&x)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
// Their names in the instructions' text: the first 32 or 64 operands.
#define NAMES_32                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                      \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_16(d, i) \
  REGISTERS_4(d, i), REGISTERS_4(d, i + 4), REGISTERS_4(d, i + 8), REGISTERS_4(d, i + 12)

// d[64 x N] (+)= a[64 x 16] b[N x 16]^T, both in shared memory with columns along the inner dimension. Each warp holds
// 16 rows of d, in the layout of matrix_multiply.
template <int N>
__device__ __forceinline__ void warpgroup_multiply(float* d, u64 a, u64 b, bool accumulate) {
  static_assert(N == 64 || N == 128, "width");
  if constexpr (N == 64) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, "
        "%32, %33, p, 1, 1, 0, 0; }"
        : REGISTERS_16(d, 0), REGISTERS_16(d, 16)
        : "l"(a), "l"(b), "r"((int)accumulate));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, "
        "%64, %65, p, 1, 1, 0, 0; }"
        : REGISTERS_16(d, 0), REGISTERS_16(d, 16), REGISTERS_16(d, 32), REGISTERS_16(d, 48)
        : "l"(a), "l"(b), "r"((int)accumulate));
  }
}

// The same with a in registers (layout of matrix_multiply) and, if TRANSPOSED, a plain b[16 x N] instead.
template <int N, bool TRANSPOSED>
__device__ __forceinline__ void warpgroup_multiply(float* d, const u32* a, u64 b, bool accumulate) {
  static_assert(N == 64 || N == 128, "width");
  if constexpr (N == 64) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
        : REGISTERS_16(d, 0), REGISTERS_16(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"((int)TRANSPOSED));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
        : REGISTERS_16(d, 0), REGISTERS_16(d, 16), REGISTERS_16(d, 32), REGISTERS_16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"((int)TRANSPOSED));
  }
}

// d[64 x 128] (+)= a[64 x 32] b[128 x 32]^T of e4m3, both in shared memory; bytes and layouts as above.
__device__ __forceinline__ void warpgroup_multiply_e4m3(float* d, u64 a, u64 b, bool accumulate) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAMES_64 "}, "
      "%64, %65, p, 1, 1; }"
      : REGISTERS_16(d, 0), REGISTERS_16(d, 16), REGISTERS_16(d, 32), REGISTERS_16(d, 48)
      : "l"(a), "l"(b), "r"((int)accumulate));
}

#undef NAMES_64
#undef NAMES_32
#undef REGISTERS_16
#undef REGISTERS_4
