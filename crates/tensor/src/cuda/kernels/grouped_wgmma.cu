// Products of rows with the matrix of their expert for Hopper (sm_90a). Semantics are those of grouped.cu; its sums
// have another order.
//
// Launch: grid ceil(n / 256) times the tiles of 128 rows of all experts, or more of them, up to a multiple of TOGETHER;
// block 384, dynamic shared memory 197696 bytes. The copy engine brings panels of x [m, row_bytes] and w [experts n, row_bytes] into four stages, asked by one
// thread; two warpgroups multiply, 64 rows each. A box may reach into the rows of the next expert, whose products are
// not stored.
#include "grouped.cuh"
#include "warpgroup.cuh"

constexpr int ROWS = 128, COLUMNS = 256, STAGES = 4;
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

__device__ __forceinline__ void produce(const Shared& shared, const Grouped& g, const TensorMap& x, const TensorMap& w,
                                        const Tile& tile, int first, int panels) {
  for (int i = 0; i < panels; ++i) {
    const int stage = stage_of(i);
    // A new barrier counts as having ended a phase of parity 1: the first panels do not wait.
    barrier_wait(shared.empty(stage), parity_of(i) ^ 1);
    barrier_expect(shared.full(stage), STAGE_BYTES);
    copy_box(shared.x(stage), x, i * 128, tile.first, shared.full(stage));
    copy_box(shared.w(stage), w, i * 128, tile.expert * g.n + first, shared.full(stage));
  }
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
__device__ __forceinline__ void linear_grouped(const Grouped& g, const TensorMap& x, const TensorMap& w) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared = {(shared_address(memory) + 1023) / 1024 * 1024};
  const Place place = place_of(g, COLUMNS);
  const Tile tile = tile_of<ROWS>(g, place.rows);
  if (tile.rows == 0) return;
  const int first = place.columns * COLUMNS, panels = (g.row_bytes + 127) / 128;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), 8);  // one for each multiplying warp
    }
    publish_shared();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<40>();
    if (threadIdx.x == 0) produce(shared, g, x, w, tile, first, panels);
  } else {
    grow_registers<232>();
    consume<EIGHT_BITS>(shared, g, tile, first, panels);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_grouped_wgmma_b(const __grid_constant__ Grouped g, const __grid_constant__ TensorMap x,
                           const __grid_constant__ TensorMap w) { linear_grouped<false>(g, x, w); }
extern "C" __global__ void __launch_bounds__(384, 1)
    linear_grouped_wgmma_e(const __grid_constant__ Grouped g, const __grid_constant__ TensorMap x,
                           const __grid_constant__ TensorMap w) { linear_grouped<true>(g, x, w); }
