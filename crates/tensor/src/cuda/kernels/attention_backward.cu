// Attention backward for every GPU from sm_80 on, HEAD_DIM (a macro) 64, 80, 96, 128 or 256, on mma.sync. With
// P = exp(scale q.k - lse) and delta = sum of dout * out per query row:
//   dv = P^T dout,  dS = P (dout.v - delta),  dk = scale dS^T q,  dq = scale dS k,
// and the same for each row's extra keys. Probabilities are recomputed once for dk and dv (one block per key tile,
// whose gradients stay in registers while the queries that see the tile pass by) and once for dq (one block per query
// tile): 7 matrix products where 5 would do, but no sum depends on the order in which blocks run, and no scratch is
// larger than a number per row, head and extra.
//
// Every kernel takes Backward by value. Launch in this order:
//   attention_delta(b)                        grid (n_heads, padded / 64), block 256, no dynamic shared memory
//   attention_backward_extras(b, extras, grads)   only with extras;
//                                             grid ceil(rows * n_kv_heads * LANES / 256), block 256, none, where
//                                             LANES = 8 for HEAD_DIM 64, 16 for 80, 96 and 128, 32 for 256
//   attention_backward_dkv(b)                 grid ceil(keys / 64) * n_kv_heads, block 256, dynamic shared memory
//                                             256 HEAD_DIM + 4 HEAD_DIM QUERIES + 256 QUERIES + 16 QUERIES bytes
//                                             where QUERIES = 64, for HEAD_DIM 256: 32 (16 with -DSMALL_SHARED, for
//                                             devices that give a block less than 108 KB)
//   attention_backward_dq(b, extras)          grid ceil(rows / 64) * n_heads, block 128, dynamic shared memory
//                                             256 HEAD_DIM + 4 HEAD_DIM KEYS bytes where KEYS = 64, for 256: 32
// A grid of 0 is not launched; with 0 rows attention_backward_dkv still writes its zeros.
// On sm_90a attention_backward_wgmma.cu has faster replacements of the last two for HEAD_DIM 64 and 128.
#include "attention_backward.cuh"
#include "tensor_core_backward.cuh"

constexpr int D = HEAD_DIM;
constexpr int D8 = D / 8;
// Lanes that share one head of one row, 8 elements each.
constexpr int LANES = D8 <= 8 ? 8 : D8 <= 16 ? 16 : 32;

// Sum over the LANES lanes of a row's head; the same in all of them.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// This lane's 8 elements of a row's head; zeros for lanes past the head's end.
__device__ __forceinline__ void load_row(float (&x)[8], const bf16* head, int lane) {
  if (lane < D8) return load(head + 8 * lane, x);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = 0.f;
}

__device__ __forceinline__ void store_row(bf16* head, float (&x)[8], int lane, float factor, bool add) {
  if (lane >= D8) return;
  float old[8] = {};
  if (add) load(head + 8 * lane, old);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = x[i] * factor + old[i];
  store(head + 8 * lane, x);
}

__device__ __forceinline__ float dot(const float (&x)[8], const float (&y)[8]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += x[i] * y[i];
  return sum;
}

// Fills b.stats, rows past the end included.
extern "C" __global__ void __launch_bounds__(256) attention_delta(const __grid_constant__ Backward b) {
  int head = blockIdx.x, lane = threadIdx.x % LANES;
  for (int i = threadIdx.x / LANES; i < 64; i += 256 / LANES) {
    int r = blockIdx.y * 64 + i;
    float x[8] = {}, y[8] = {}, lse = -INF;
    if (r < b.rows) {
      load_row(x, b.out + (i64)r * b.ld_out + head * D, lane);
      load_row(y, b.dout + (i64)r * b.ld_dout + head * D, lane);
      lse = b.lse[(i64)r * b.n_heads + head];
    }
    float delta = row_sum(dot(x, y));
    bool none = lse == -INF;
    if (lane == 0) {
      b.stats[(i64)head * b.padded + r] = none ? INF : lse * LOG2_E;
      b.stats[(i64)(b.n_heads + head) * b.padded + r] = none ? 0.f : delta;
    }
  }
}

// The gradients of the extras' keys and values, and b.extra_ds, from which attention_backward_dq takes their part of
// dq.
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_extras(const __grid_constant__ Backward b, const __grid_constant__ Extras extras,
                              const __grid_constant__ ExtraGrads grads) {
  i64 item = ((i64)blockIdx.x * 256 + threadIdx.x) / LANES;
  int lane = threadIdx.x % LANES;
  // The last block's spare lanes repeat the last item's reads, because sums need whole warps.
  bool spare = item >= (i64)b.rows * b.n_kv_heads;
  if (spare) item = (i64)b.rows * b.n_kv_heads - 1;
  int r = (int)(item / b.n_kv_heads), kv_head = (int)(item % b.n_kv_heads);
  int group = b.n_heads / b.n_kv_heads;
  for (int e = 0; e < b.n_extras; e++) {
    float key[8], value[8], dkey[8] = {}, dvalue[8] = {};
    load_row(key, extras.key[e] + (i64)r * extras.ld_key[e] + kv_head * D, lane);
    load_row(value, extras.value[e] + (i64)r * extras.ld_value[e] + kv_head * D, lane);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      float q[8], dout[8];
      load_row(q, b.q + (i64)r * b.ld_q + head * D, lane);
      load_row(dout, b.dout + (i64)r * b.ld_dout + head * D, lane);
      float lse = b.stats[(i64)head * b.padded + r], delta = b.stats[(i64)(b.n_heads + head) * b.padded + r];
      float p = exp2_fast(row_sum(dot(q, key)) * (b.scale * LOG2_E) - lse);
      float ds = p * (row_sum(dot(dout, value)) - delta);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        dkey[i] += ds * q[i];
        dvalue[i] += p * dout[i];
      }
      if (lane == 0 && !spare) b.extra_ds[((i64)r * b.n_heads + head) * b.n_extras + e] = ds;
    }
    if (spare) continue;
    bf16* dk = grads.dkey[e] + (i64)r * grads.ld_dkey[e] + kv_head * D;
    bf16* dv = grads.dvalue[e] + (i64)r * grads.ld_dvalue[e] + kv_head * D;
    store_row(dk, dkey, lane, b.scale, grads.accumulate_key >> e & 1);
    store_row(dv, dvalue, lane, 1.f, grads.accumulate_value >> e & 1);
  }
}

extern __shared__ __align__(1024) u8 shared_bytes[];

// The shared memory of attention_backward_dkv, in order: k and v [64, D], q and dout [QUERIES, D], P^T and dS^T
// [64, QUERIES], and of each query its log-sum-exp, delta, lo and hi.
namespace dkv {
constexpr int THREADS = 256;
constexpr int KEYS = 64;
#ifdef SMALL_SHARED
constexpr int QUERIES = D > 128 ? 16 : 64;
#else
constexpr int QUERIES = D > 128 ? 32 : 64;
#endif
// Products over keys x queries: 4 warps along the keys (16 each) x 2 along the queries. Products over keys x D: the
// same along the keys, and 2 along D.
constexpr int S_N = QUERIES / 16;
constexpr int D_N = D / 16;
}  // namespace dkv

extern "C" __global__ void __launch_bounds__(dkv::THREADS, D > 128 ? 1 : 2)
    attention_backward_dkv(const __grid_constant__ Backward b) {
  using namespace dkv;
  u32 base = shared_address(shared_bytes);
  Tile<D> k{base}, v{k.base + KEYS * D * 2}, q{v.base + KEYS * D * 2}, dout{q.base + QUERIES * D * 2};
  Tile<QUERIES> p_t{dout.base + QUERIES * D * 2}, ds_t{p_t.base + KEYS * QUERIES * 2};
  const float* lse = (const float*)(shared_bytes + (ds_t.base + KEYS * QUERIES * 2 - base));
  const float* delta = lse + QUERIES;
  const u32* lo = (const u32*)(delta + QUERIES);
  const u32* hi = lo + QUERIES;

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int kv_head = blockIdx.x % b.n_kv_heads, group = b.n_heads / b.n_kv_heads;
  // Causal attention's heaviest tiles, the first, start first.
  int first_key = blockIdx.x / b.n_kv_heads * KEYS, n_keys = min(KEYS, b.keys - first_key);
  k.copy<THREADS>(b.k + (i64)first_key * b.ld_k + kv_head * D, b.ld_k, KEYS, n_keys);
  v.copy<THREADS>(b.v + (i64)first_key * b.ld_v + kv_head * D, b.ld_v, KEYS, n_keys);
  // Every warp finds them for itself.
  int first_row, end_row;
  rows_that_see(b, first_key, n_keys, first_row, end_row);
  int tiles = max(0, (end_row - first_row + QUERIES - 1) / QUERIES), steps = tiles * group;

  auto load = [&](int step) {
    int head = kv_head * group + step / tiles, row = first_row + step % tiles * QUERIES;
    int valid = b.rows - row;
    q.copy<THREADS>(b.q + (i64)row * b.ld_q + head * D, b.ld_q, QUERIES, valid);
    dout.copy<THREADS>(b.dout + (i64)row * b.ld_dout + head * D, b.ld_dout, QUERIES, valid);
    int i = threadIdx.x % QUERIES, which = threadIdx.x / QUERIES;
    u32 dst = shared_address(lse) + (which * QUERIES + i) * 4;
    // The stats are padded.
    if (which < 2) copy_async_4(dst, b.stats + (i64)(which * b.n_heads + head) * b.padded + row + i, true);
    else if (which < 4) copy_async_4(dst, (which == 2 ? b.lo : b.hi) + (i < valid ? row + i : 0), i < valid);
  };

  float dk[D_N][4] = {}, dv[D_N][4] = {};
  int key_row = warp % 4 * 16, half = warp / 4;
  float scale = b.scale * LOG2_E;
  for (int step = 0; step < steps; step++) {
    load(step);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float s[S_N][4] = {}, dp[S_N][4] = {};
    int column = half * (QUERIES / 2);
    multiply_transposed(s, k, key_row, q, column);
    multiply_transposed(dp, v, key_row, dout, column);
    int valid = min(QUERIES, b.rows - (first_row + step % tiles * QUERIES));
    bool all = lo[valid - 1] <= first_key && hi[0] >= first_key + n_keys;
#pragma unroll
    for (int n = 0; n < S_N; n++) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        float p[2], ds[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int c = column + 8 * n + 2 * t + i, key = first_key + key_row + g + 8 * row;
          p[i] = exp2_fast(s[n][2 * row + i] * scale - lse[c]);
          if (!all && (key < lo[c] || key >= hi[c])) p[i] = 0.f;
          ds[i] = p[i] * (dp[n][2 * row + i] - delta[c]);
        }
        int unit = half * (QUERIES / 16) + n;
        u32 offset = p_t.at(key_row + g + 8 * row, unit) - base + 4 * t;
        *(u32*)(shared_bytes + offset) = pack_bf16(p[0], p[1]);
        *(u32*)(shared_bytes + offset + KEYS * QUERIES * 2) = pack_bf16(ds[0], ds[1]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++) {
      u32 a[4];
      p_t.left(a, key_row, 2 * i);
      multiply(dv, a, dout, 16 * i, half * D_N);
      ds_t.left(a, key_row, 2 * i);
      multiply(dk, a, q, 16 * i, half * D_N);
    }
    __syncthreads();
  }
  copy_wait<0>();
#pragma unroll
  for (int row = 0; row < 2; row++) {
    int key = key_row + g + 8 * row;
    if (key >= n_keys) continue;
    i64 column = kv_head * D + half * (D / 2) + 2 * t;
    bf16* to_dk = b.dk + (i64)(first_key + key) * b.ld_dk + column;
    bf16* to_dv = b.dv + (i64)(first_key + key) * b.ld_dv + column;
#pragma unroll
    for (int n = 0; n < D_N; n++) {
      store_pair(to_dk + 8 * n, dk[n][2 * row] * b.scale, dk[n][2 * row + 1] * b.scale, b.accumulate & ADD_DK);
      store_pair(to_dv + 8 * n, dv[n][2 * row], dv[n][2 * row + 1], b.accumulate & ADD_DV);
    }
  }
}

// The shared memory of attention_backward_dq, in order: q and dout [64, D], k and v [KEYS, D]. Every warp has 16 query
// rows.
namespace dq {
constexpr int THREADS = 128;
constexpr int QUERIES = 64;
constexpr int KEYS = D > 128 ? 32 : 64;
}  // namespace dq

extern "C" __global__ void __launch_bounds__(dq::THREADS, D > 128 ? 1 : 3)
    attention_backward_dq(const __grid_constant__ Backward b, const __grid_constant__ Extras extras) {
  using namespace dq;
  u32 base = shared_address(shared_bytes);
  Tile<D> q{base}, dout{q.base + QUERIES * D * 2}, k{dout.base + QUERIES * D * 2}, v{k.base + KEYS * D * 2};
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Causal attention's heaviest tiles, the last, start first.
  int tiles = (b.rows + QUERIES - 1) / QUERIES;
  int head = blockIdx.x % b.n_heads, first_row = (tiles - 1 - (int)(blockIdx.x / b.n_heads)) * QUERIES;
  int kv_head = head / (b.n_heads / b.n_kv_heads), n_rows = min(QUERIES, b.rows - first_row);
  q.copy<THREADS>(b.q + (i64)first_row * b.ld_q + head * D, b.ld_q, QUERIES, n_rows);
  dout.copy<THREADS>(b.dout + (i64)first_row * b.ld_dout + head * D, b.ld_dout, QUERIES, n_rows);
  // Keys that some row sees, and those that all rows see.
  int begin = b.lo[first_row], end = b.hi[first_row + n_rows - 1];
  int all_begin = b.lo[first_row + n_rows - 1], all_end = b.hi[first_row];
  // This lane's two rows.
  int lo[2], hi[2];
  float lse[2], delta[2], acc[D8][4] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int r = first_row + warp * 16 + g + 8 * i;
    lo[i] = r < b.rows ? b.lo[r] : 0;
    hi[i] = r < b.rows ? b.hi[r] : 0;
    lse[i] = b.stats[(i64)head * b.padded + r];
    delta[i] = b.stats[(i64)(b.n_heads + head) * b.padded + r];
  }

  float scale = b.scale * LOG2_E;
  for (int key = begin; key < end; key += KEYS) {
    k.copy<THREADS>(b.k + (i64)key * b.ld_k + kv_head * D, b.ld_k, KEYS, b.keys - key);
    v.copy<THREADS>(b.v + (i64)key * b.ld_v + kv_head * D, b.ld_v, KEYS, b.keys - key);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
    multiply_transposed(s, q, warp * 16, k, 0);
    multiply_transposed(dp, dout, warp * 16, v, 0);
    bool all = key >= all_begin && key + KEYS <= all_end;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int c = key + 8 * n + 2 * t + i % 2;
        float p = exp2_fast(s[n][i] * scale - lse[i / 2]);
        if (!all && (c < lo[i / 2] || c >= hi[i / 2])) p = 0.f;
        s[n][i] = p * (dp[n][i] - delta[i / 2]);
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      // Two neighbouring accumulator fragments are laid out as one left operand.
      const float(&x)[4] = s[2 * n], (&y)[4] = s[2 * n + 1];
      u32 a[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
      multiply(acc, a, k, 16 * n, 0);
    }
    __syncthreads();
  }
  copy_wait<0>();
  add_extras<D8>(&acc[0][0], b, extras, first_row + warp * 16 + g, head, t);
#pragma unroll
  for (int row = 0; row < 2; row++) {
    int r = first_row + warp * 16 + g + 8 * row;
    if (r >= b.rows) continue;
    bf16* to = b.dq + (i64)r * b.ld_dq + head * D + 2 * t;
#pragma unroll
    for (int n = 0; n < D8; n++)
      store_pair(to + 8 * n, acc[n][2 * row] * b.scale, acc[n][2 * row + 1] * b.scale, b.accumulate & ADD_DQ);
  }
}
