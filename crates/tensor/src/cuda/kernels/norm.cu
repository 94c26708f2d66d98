// RMSNorm over groups of d elements: whole rows (groups = 1) or every head of a row by itself. Memory-bound: a group
// is read once, kept as packed bf16 in registers between its two passes (d <= 8192; re-read through the caches
// beyond), and written once. Groups of up to 256 elements have a warp each, larger ones the whole block.
// Limit: rows * groups < 2^31.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int SMALL = 256;  // the largest d that a warp takes

// Eight elements of a group as a thread holds them. With T threads on a group, element i of piece k of thread t is
// column (k T + t) 8 + i where rows can be read 16 bytes at a time (`wide`), else (8 k + i) T + t, so that
// neighbouring threads read neighbours.
struct Piece {
  u32 v[4];
  __device__ __forceinline__ float at(int i) const { return i & 1 ? high_half(v[i / 2]) : low_half(v[i / 2]); }
};

template <int T>
__device__ __forceinline__ int column(int k, int i, bool wide) {
  const int t = threadIdx.x % T;
  return wide ? (k * T + t) * 8 + i : (k * 8 + i) * T + t;
}

// Columns from d on read as zeros.
template <int T>
__device__ __forceinline__ Piece load_piece(const bf16* p, int d, int k, bool wide) {
  Piece r = {{0, 0, 0, 0}};
  if (wide) {
    const int c = column<T>(k, 0, true);
    if (c < d) {
      const uint4 u = *(const uint4*)(p + c);
      r.v[0] = u.x, r.v[1] = u.y, r.v[2] = u.z, r.v[3] = u.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = column<T>(k, i, false);
      if (c < d) r.v[i / 2] |= (u32)p[c] << (16 * (i & 1));
    }
  }
  return r;
}

template <int T>
__device__ __forceinline__ void store_piece(bf16* p, const float (&v)[8], int d, int k, bool wide) {
  if (wide) {
    const int c = column<T>(k, 0, true);
    if (c < d) store(p + c, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = column<T>(k, i, false);
      if (c < d) store(p + c, v[i]);
    }
  }
}

template <int T>
__device__ __forceinline__ float group_sum(float x) {
  return T == 32 ? warp_sum(x) : block_sum(x);
}

// Pieces per thread; HELD of them at most are kept in registers, HELD = 0 re-reads.
template <int T, int HELD>
__device__ __forceinline__ int n_pieces(int d) { return HELD ? HELD : (d + 8 * T - 1) / (8 * T); }

template <int T, int HELD>
__device__ __forceinline__ void forward(bf16* y, float* rstd, const bf16* x, const bf16* w, u32 n, int groups, int d,
                                        int ldx, int ldy, float eps, bool wide) {
  constexpr u32 PER_BLOCK = THREADS / T;
  const int pieces = n_pieces<T, HELD>(d);
  for (u32 g = blockIdx.x * PER_BLOCK + threadIdx.x / T; g < n; g += gridDim.x * PER_BLOCK) {
    const u32 row = g / groups, offset = (g - row * groups) * d;
    const bf16* from = x + (i64)row * ldx + offset;
    bf16* to = y + (i64)row * ldy + offset;
    Piece held[HELD ? HELD : 1];
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const Piece p = load_piece<T>(from, d, k, wide);
      if (HELD) held[HELD ? k : 0] = p;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(p.at(i), p.at(i), sum);
    }
    const float scale = 1.f / sqrtf(group_sum<T>(sum) / d + eps);
    if (threadIdx.x % T == 0) rstd[g] = scale;
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const Piece p = HELD ? held[HELD ? k : 0] : load_piece<T>(from, d, k, wide);
      const Piece weight = load_piece<T>(w, d, k, wide);
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = p.at(i) * scale * weight.at(i);
      store_piece<T>(to, out, d, k, wide);
    }
  }
}

// y = x rstd w and rstd [rows * groups]; y may be x.
// Block 256; grid ceil(rows * groups / 8) if d <= 256, else rows * groups (any grid is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(bf16* y, float* rstd, const bf16* x, const bf16* w, int rows, int groups, int d, int ldx, int ldy,
             float eps) {
  const bool wide = (d | ldx | ldy) % 8 == 0 && aligned(x, y) && aligned(w);
  const u32 n = (u32)rows * groups;
  if (d <= SMALL) forward<32, 1>(y, rstd, x, w, n, groups, d, ldx, ldy, eps, wide);
  else if (d <= 2048) forward<THREADS, 1>(y, rstd, x, w, n, groups, d, ldx, ldy, eps, wide);
  else if (d <= 4096) forward<THREADS, 2>(y, rstd, x, w, n, groups, d, ldx, ldy, eps, wide);
  else if (d <= 8192) forward<THREADS, 4>(y, rstd, x, w, n, groups, d, ldx, ldy, eps, wide);
  else forward<THREADS, 0>(y, rstd, x, w, n, groups, d, ldx, ldy, eps, wide);
}

// With g = w dy: dx (+)= rstd (g - x rstd^2 mean(g x)). The weight's gradient gathers in registers over all groups of
// the block (in its row of dw_partial where the group is not held: a column belongs to one thread).
template <int T, int HELD>
__device__ __forceinline__ void backward(bf16* dx, float* dw_partial, const bf16* dy, const bf16* x, const bf16* w,
                                         const float* rstd, u32 n, int groups, int d, int lddy, int ldx, int lddx,
                                         bool accumulate, bool wide) {
  constexpr u32 PER_BLOCK = THREADS / T;
  const int pieces = n_pieces<T, HELD>(d);
  float* mine = dw_partial ? dw_partial + (i64)blockIdx.x * d : nullptr;
  float dw[HELD ? HELD : 1][8] = {};
  if (!HELD && mine) {
    for (int c = threadIdx.x; c < d; c += THREADS) mine[c] = 0.f;
    __syncthreads();  // the columns are dealt out otherwise below
  }
  for (u32 g = blockIdx.x * PER_BLOCK + threadIdx.x / T; g < n; g += gridDim.x * PER_BLOCK) {
    const u32 row = g / groups, offset = (g - row * groups) * d;
    const bf16 *from_y = dy + (i64)row * lddy + offset, *from_x = x + (i64)row * ldx + offset;
    bf16* to = dx + (i64)row * lddx + offset;
    Piece held_y[HELD ? HELD : 1], held_x[HELD ? HELD : 1];
    float dot = 0.f;
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const Piece py = load_piece<T>(from_y, d, k, wide), px = load_piece<T>(from_x, d, k, wide);
      const Piece weight = load_piece<T>(w, d, k, wide);
      if (HELD) held_y[HELD ? k : 0] = py, held_x[HELD ? k : 0] = px;
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(py.at(i) * weight.at(i), px.at(i), dot);
    }
    const float scale = rstd[g], mean = group_sum<T>(dot) * scale * scale / d;
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const Piece py = HELD ? held_y[HELD ? k : 0] : load_piece<T>(from_y, d, k, wide);
      const Piece px = HELD ? held_x[HELD ? k : 0] : load_piece<T>(from_x, d, k, wide);
      const Piece weight = load_piece<T>(w, d, k, wide);
      Piece old = {{0, 0, 0, 0}};
      if (accumulate) old = load_piece<T>(to, d, k, wide);
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] = fmaf(fmaf(-mean, px.at(i), py.at(i) * weight.at(i)), scale, old.at(i));
        const float term = py.at(i) * px.at(i) * scale;
        if (HELD) dw[HELD ? k : 0][i] += term;
        else if (mine && column<T>(k, i, wide) < d) mine[column<T>(k, i, wide)] += term;
      }
      store_piece<T>(to, out, d, k, wide);
    }
  }
  if (!HELD || !mine) return;
  if constexpr (T == 32) {  // the warps' sums, added in order
    __shared__ float sums[WARPS][SMALL];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column<T>(0, i, wide) < d) sums[threadIdx.x / 32][column<T>(0, i, wide)] = dw[0][i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += THREADS) {
      float sum = 0.f;
      for (int i = 0; i < WARPS; ++i) sum += sums[i][c];
      mine[c] = sum;
    }
  } else {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column<T>(k, i, wide) < d) mine[column<T>(k, i, wide)] = dw[k][i];
      }
    }
  }
}

// Gradient of rms_norm; dx may be dy. Persistent: with d > 256 block b takes the groups b, b + grid, ...; with
// d <= 256 its eight warps take the groups 8 b + warp, 8 (b + grid) + warp, ... Row b of dw_partial [grid, d] is the
// block's sum of dy x rstd, written whole even by a block without groups. The grid decides the order of the sum, so it
// must follow from the shapes: e.g. min(264, number of groups, or of eights of groups).
// Block 256; grid any; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rms_norm_backward(bf16* dx, float* dw_partial, const bf16* dy, const bf16* x, const bf16* w, const float* rstd,
                      int rows, int groups, int d, int lddy, int ldx, int lddx, int accumulate) {
  const bool wide = (d | lddy | ldx | lddx) % 8 == 0 && aligned(dx, dy) && aligned(x, w);
  const u32 n = (u32)rows * groups;
#define RUN(T, HELD) \
  backward<T, HELD>(dx, dw_partial, dy, x, w, rstd, n, groups, d, lddy, ldx, lddx, accumulate, wide)
  if (d <= SMALL) RUN(32, 1);
  else if (d <= 2048) RUN(THREADS, 1);
  else if (d <= 4096) RUN(THREADS, 2);
  else if (d <= 8192) RUN(THREADS, 4);
  else RUN(THREADS, 0);
#undef RUN
}

// Adds the 8 sums that the warps of a block have for one column each lane, in order; the result is in warp 0.
__device__ __forceinline__ float sum_of_warps(float x) {
  __shared__ float sums[WARPS][32];
  sums[threadIdx.x / 32][threadIdx.x % 32] = x;
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.x < 32) {
    for (int i = 0; i < WARPS; ++i) sum += sums[i][threadIdx.x];
  }
  return sum;
}

// dst[c] += sum over i of partial[i, c], partial [n, d].
// Block 256: 32 columns, each by eight threads that take every eighth row; grid ceil(d / 32); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) column_sum(float* dst, const float* partial, int n, int d) {
  const int c = blockIdx.x * 32 + threadIdx.x % 32;
  float sum = 0.f;
  if (c < d) {
#pragma unroll 4
    for (int i = threadIdx.x / 32; i < n; i += WARPS) sum += partial[(i64)i * d + c];
  }
  sum = sum_of_warps(sum);
  if (threadIdx.x < 32 && c < d) dst[c] += sum;
}

// partial[by, c] = sum of column c over the by-th slab of ceil(rows / gridDim.y) rows (zeros for an empty slab).
// Block 256: warps on every eighth row, a lane on eight columns; grid (ceil(width / 256), slabs), where the number of
// slabs must follow from the shapes; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_partial(float* partial, const bf16* dy, int rows, int width, int ld) {
  __shared__ float sums[WARPS][256];
  const bool wide = (width | ld) % 8 == 0 && aligned(dy);
  const int first = blockIdx.x * 256, n = width - first < 256 ? width - first : 256, warp = threadIdx.x / 32;
  const int slab = (rows + gridDim.y - 1) / gridDim.y;
  const i64 begin = (i64)blockIdx.y * slab, end = begin + slab < rows ? begin + slab : rows;
  float sum[8] = {};
#pragma unroll 2
  for (i64 r = begin + warp; r < end; r += WARPS) {
    const Piece p = load_piece<32>(dy + r * ld + first, n, 0, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += p.at(i);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp][column<32>(0, i, wide)] = sum[i];
  __syncthreads();
  if ((int)threadIdx.x >= n) return;
  float total = 0.f;
  for (int i = 0; i < WARPS; ++i) total += sums[i][threadIdx.x];
  partial[(i64)blockIdx.y * width + first + threadIdx.x] = total;
}
