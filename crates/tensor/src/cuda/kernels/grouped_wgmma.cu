// Products of rows with the matrix of their expert for Hopper (sm_90a). Semantics are those of grouped.cu; its sums
// have another order.
//
// Launch: grid (ceil(n / 256), tiles of 128 rows of all experts, or more), block 384, dynamic shared memory 197696
// bytes. Warpgroup 0 copies panels of x and w into four stages; warpgroups 1 and 2 multiply, 64 rows each.
#include "grouped.cuh"
#include "warpgroup.cuh"

constexpr int ROWS = 128, COLUMNS = 256, STAGES = 4;
constexpr int AHEAD = 2;  // panels whose copies are on the way
constexpr u32 X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + COLUMNS * 128;

// Shared memory: the stages, then their barriers. `full`: all of a panel has arrived. `empty`: no warp reads it.
struct Shared {
  u32 base;
  __device__ u32 x(int stage) const { return base + stage * STAGE_BYTES; }
  __device__ u32 w(int stage) const { return x(stage) + X_BYTES; }
  __device__ u32 full(int stage) const { return x(STAGES) + 8 * stage; }
  __device__ u32 empty(int stage) const { return full(STAGES + stage); }
};

// Where the i-th panel lies, and the parity of the phase that its arrival ends.
__device__ __forceinline__ int stage_of(int i) { return i % STAGES; }
__device__ __forceinline__ u32 parity_of(int i) { return i / STAGES % 2; }

__device__ __forceinline__ void produce(const Shared& shared, const Grouped& g, const Tile& tile, int first,
                                        int panels) {
  const int columns = g.n - first < COLUMNS ? g.n - first : COLUMNS;
  const u8* x = g.x + (i64)tile.first * g.row_bytes;
  const u8* w = g.w + ((i64)tile.expert * g.n + first) * g.row_bytes;
  auto arrived = [&](int i) {
    publish_shared();
    barrier_arrive(shared.full(stage_of(i)));
  };
  for (int i = 0; i < panels; ++i) {
    const int stage = stage_of(i), at = i * 128, bytes = g.row_bytes - at;
    // A new barrier counts as having ended a phase of parity 1: the first panels do not wait.
    barrier_wait(shared.empty(stage), parity_of(i) ^ 1);
    copy_panel<ROWS, 128>(shared.x(stage), x + at, g.row_bytes, tile.rows, bytes, threadIdx.x);
    copy_panel<COLUMNS, 128>(shared.w(stage), w + at, g.row_bytes, columns, bytes, threadIdx.x);
    copy_commit();
    copy_wait<AHEAD>();
    if (i >= AHEAD) arrived(i - AHEAD);
  }
  copy_wait<0>();
  for (int i = panels < AHEAD ? 0 : panels - AHEAD; i < panels; ++i) arrived(i);
}

// Starts the products of a panel on top of d: 64 rows from x on, COLUMNS columns.
template <bool EIGHT_BITS>
__device__ __forceinline__ void start_panel(float (&d)[COLUMNS / 2], u32 x, u32 w, bool accumulate) {
  const u64 a = describe(x, 16), b = describe(w, 16);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u64 b_half = advance(b, half * 128 * 128 + step * 32);
      if (EIGHT_BITS) warpgroup_multiply_e4m3(d + 64 * half, advance(a, step * 32), b_half, accumulate || step > 0);
      else warpgroup_multiply<128>(d + 64 * half, advance(a, step * 32), b_half, accumulate || step > 0);
    }
  }
  products_commit();
}

template <bool EIGHT_BITS>
__device__ __forceinline__ void consume(const Shared& shared, const Grouped& g, const Tile& tile, int first,
                                        int panels) {
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  float d[COLUMNS / 2];
  auto release = [&](int i) {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.empty(stage_of(i)));
  };
  for (int i = 0; i < panels; ++i) {
    const int stage = stage_of(i);
    barrier_wait(shared.full(stage), parity_of(i));
    products_begin();
    start_panel<EIGHT_BITS>(d, shared.x(stage) + group * 64 * 128, shared.w(stage), i > 0);
    if (i > 0) {
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      release(i - 1);
    }
  }
  products_wait<0>(d);
  const int row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
    if (r >= tile.rows) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
      store_pair<EIGHT_BITS>(g, tile.expert, tile.first + r, first + 8 * j + 2 * (lane % 4), d[4 * j + 2 * h],
                             d[4 * j + 2 * h + 1]);
  }
}

template <bool EIGHT_BITS>
__device__ __forceinline__ void linear_grouped(const Grouped& g) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared = {(shared_address(memory) + 1023) / 1024 * 1024};
  const Tile tile = tile_of<ROWS>(g, blockIdx.y);
  if (tile.rows == 0) return;
  const int first = blockIdx.x * COLUMNS, panels = (g.row_bytes + 127) / 128;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.full(stage), 128);
      barrier_init(shared.empty(stage), 8);  // one for each multiplying warp
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<40>();
    produce(shared, g, tile, first, panels);
  } else {
    grow_registers<232>();
    consume<EIGHT_BITS>(shared, g, tile, first, panels);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_grouped_wgmma_b(const __grid_constant__ Grouped g) { linear_grouped<false>(g); }
extern "C" __global__ void __launch_bounds__(384, 1)
    linear_grouped_wgmma_e(const __grid_constant__ Grouped g) { linear_grouped<true>(g); }
