// Products of rows with the matrix of their expert, for every card (8-bit operands from sm_89 on).
//
// Launch: grid ceil(n / 128) times the tiles of 128 rows of all experts, or more of them, up to a multiple of TOGETHER;
// block 256, dynamic shared memory 99328 bytes.
// Rows of x and w are multiples of 16 bytes and aligned. A row's sums have the same order whatever rows are beside it.
#include "grouped.cuh"

constexpr int THREADS = 256, ROWS = 128, COLUMNS = 128, STAGES = 3;
constexpr u32 X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + COLUMNS * 128;

// d[16 x 8] += a[16 x 32] b[32 x 8] of e4m3; the operands' bytes are those of matrix_multiply.
__device__ __forceinline__ void multiply_e4m3(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Adds a panel's products: 64 rows and 32 columns of the warp, whose first ones are `row` and `column`.
template <bool EIGHT_BITS>
__device__ __forceinline__ void multiply_panel(float (&sums)[4][4][4], u32 x, u32 w, int row, int column) {
  const int lane = threadIdx.x % 32;
  const int x_row = row + lane % 16, w_row = column + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    u32 a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load_matrices(a[i], x + (x_row + 16 * i) * 128 + ((2 * step + lane / 16) ^ x_row % 8) * 16);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      load_matrices(b[j], w + (w_row + 16 * j) * 128 + ((2 * step + lane / 8 % 2) ^ w_row % 8) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
        if (EIGHT_BITS) multiply_e4m3(sums[i][j], a[i], b0, b1);
        else matrix_multiply(sums[i][j], a[i], b0, b1);
      }
    }
  }
}

template <bool EIGHT_BITS>
__device__ __forceinline__ void linear_grouped(const Grouped& g) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 base = (shared_address(memory) + 1023) / 1024 * 1024;
  const Place place = place_of(g, COLUMNS);
  const Tile tile = tile_of<ROWS>(g, place.rows);
  if (tile.rows == 0) return;
  const int first = place.columns * COLUMNS, columns = g.n - first < COLUMNS ? g.n - first : COLUMNS;
  const u8* x = g.x + (i64)tile.first * g.row_bytes;
  const u8* w = g.w + ((i64)tile.expert * g.n + first) * g.row_bytes;
  const int panels = (g.row_bytes + 127) / 128;
  auto start = [&](int i) {
    if (i < panels) {
      const u32 to = base + i % STAGES * STAGE_BYTES;
      const int at = i * 128, bytes = g.row_bytes - at;
      copy_panel<ROWS, THREADS>(to, x + at, g.row_bytes, tile.rows, bytes, threadIdx.x);
      copy_panel<COLUMNS, THREADS>(to + X_BYTES, w + at, g.row_bytes, columns, bytes, threadIdx.x);
    }
    copy_commit();
  };
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 2 * 64, column = threadIdx.x / 64 * 32;
  float sums[4][4][4] = {};
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) start(i);
  for (int i = 0; i < panels; ++i) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // a panel is there for all, and nobody reads the one before it any more
    start(i + STAGES - 1);
    const u32 at = base + i % STAGES * STAGE_BYTES;
    multiply_panel<EIGHT_BITS>(sums, at, at + X_BYTES, row, column);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * i + 8 * h + lane / 4;
      if (r >= tile.rows) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        store_pair<EIGHT_BITS>(g, tile.expert, tile.first + r, first + column + 8 * j + 2 * (lane % 4),
                               sums[i][j][2 * h], sums[i][j][2 * h + 1]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_grouped_b(const __grid_constant__ Grouped g) { linear_grouped<false>(g); }
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_grouped_e(const __grid_constant__ Grouped g) { linear_grouped<true>(g); }
