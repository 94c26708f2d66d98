// Attention backward's two large kernels for sm_90a, HEAD_DIM (a macro) 64 or 128, on wgmma; the plan is that of
// attention_backward.cu, whose attention_delta and attention_backward_extras run before these.
//
// A block has a warpgroup that copies tiles into a ring of slots in shared memory, and two that multiply, each for 64
// rows of the block's own 128; while one of them is busy with exponentials the other keeps the tensor cores busy. A
// product whose left operand was just computed (P, dS) takes it from registers.
//
//   attention_backward_dkv_wgmma(b)           grid ceil(keys / 128) * n_kv_heads, block 384, dynamic shared memory
//                                             512 HEAD_DIM + 8 (128 HEAD_DIM + 1024) + 1024 bytes
//   attention_backward_dq_wgmma(b, extras)    grid ceil(rows / 128) * n_heads, block 384, dynamic shared memory
//                                             512 HEAD_DIM + 4 * 256 HEAD_DIM + 1024 bytes
//
// After a change compile with --ptxas-options=-v and look for messages C7510 to C7519: they say that products no longer
// run beside other instructions.
#include "attention_backward.cuh"
#include "wgmma_backward.cuh"

constexpr int D = HEAD_DIM;
constexpr int D8 = D / 8;
constexpr int THREADS = 384;
constexpr int CONSUMER_WARPS = 8;
constexpr int PRODUCER_WARPS = 4;
static_assert(D == 64 || D == 128, "head sizes of the wgmma kernels");

extern __shared__ __align__(1024) u8 shared_bytes[];

// A ring of SLOTS slots through which the copying warpgroup hands items to the multiplying ones, item i in slot
// i % SLOTS. In shared memory: a `full` and an `empty` barrier for every slot.
// One lane arrives for its warp, after __syncwarp, which compute-sanitizer's racecheck does not follow: it reports
// hazards here, and none when all lanes arrive.
template <int SLOTS>
struct Ring {
  u32 barriers;

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < SLOTS; i++) barrier_init(full(i), PRODUCER_WARPS), barrier_init(empty(i), CONSUMER_WARPS);
  }
  __device__ __forceinline__ u32 full(int i) const { return barriers + i % SLOTS * 16; }
  __device__ __forceinline__ u32 empty(int i) const { return barriers + i % SLOTS * 16 + 8; }
  __device__ __forceinline__ void wait_full(int i) const { barrier_wait_in_place(full(i), i / SLOTS & 1); }
  __device__ __forceinline__ void release(int i) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(i));
  }

  // The copying warpgroup's loop: copy(i) starts this thread's copies of item i. An item is handed over when the next
  // one's copies have started, or while their slot is still in use.
  template <class F>
  __device__ __forceinline__ void produce(int items, F copy) const {
    int handed = 0;
    auto hand_over = [&] {
      publish_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(full(handed));
      handed++;
    };
    for (int i = 0; i < items; i++) {
      u32 parity = (i / SLOTS - 1) & 1;
      if (i >= SLOTS && !__all_sync(0xffffffffu, barrier_done(empty(i), parity))) {
        if (handed < i) copy_wait<0>(), hand_over();
        barrier_wait_in_place(empty(i), parity);
      }
      copy(i);
      copy_commit();
      if (handed < i) copy_wait<1>(), hand_over();
    }
    if (handed < items) copy_wait<0>(), hand_over();
  }
};

// Writes a lane's accumulators, rows g and g + 8 and columns 8 n + 2 t and the next; `to` is where the first one goes,
// `rows` how many rows there are from row g on.
__device__ __forceinline__ void store_fragment(const float (&acc)[D / 2], bf16* to, i64 ld, int rows, float factor,
                                               bool add) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if (8 * row >= rows) continue;
    bf16* p = to + 8 * row * ld;
#pragma unroll
    for (int n = 0; n < D8; n++)
      store_pair(p + 8 * n, acc[4 * n + 2 * row] * factor, acc[4 * n + 2 * row + 1] * factor, add);
  }
}

// Shared memory: k and v [128, D]; slots of a tile [64, D] and 1024 bytes for its rows' numbers; the ring's barriers.
// Even items are q with each row's log-sum-exp, lo and hi; odd ones dout with delta.
namespace dkv {
constexpr int KEYS = 128;
constexpr int QUERIES = 64;
constexpr int SLOTS = 8;
constexpr int SLOT_BYTES = QUERIES * D * 2 + 1024;
constexpr int FIRST_SLOT = 2 * KEYS * D * 2;
}  // namespace dkv

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_dkv_wgmma(const __grid_constant__ Backward b) {
  using namespace dkv;
  u32 base = shared_address(shared_bytes);
  Ring<SLOTS> ring{base + FIRST_SLOT + SLOTS * SLOT_BYTES};
  SwizzledTile<KEYS, D> k{base}, v{base + KEYS * D * 2};
  auto slot = [&](int item) { return base + FIRST_SLOT + item % SLOTS * SLOT_BYTES; };

  int kv_head = blockIdx.x % b.n_kv_heads, group = b.n_heads / b.n_kv_heads;
  // Causal attention's heaviest tiles, the first, start first.
  int first_key = blockIdx.x / b.n_kv_heads * KEYS, n_keys = min(KEYS, b.keys - first_key);
  if (threadIdx.x < 256) {
    k.template copy<256>(threadIdx.x, b.k + (i64)first_key * b.ld_k + kv_head * D, b.ld_k, n_keys);
    v.template copy<256>(threadIdx.x, b.v + (i64)first_key * b.ld_v + kv_head * D, b.ld_v, n_keys);
  } else if (threadIdx.x == 256) {
    ring.init();
  }
  copy_commit();
  int first_row, end_row;
  rows_that_see(b, first_key, n_keys, first_row, end_row);
  int tiles = max(0, (end_row - first_row + QUERIES - 1) / QUERIES), steps = tiles * group;
  copy_wait<0>();
  publish_shared();
  __syncthreads();

  if (threadIdx.x >= 256) {
    shrink_registers<24>();
    int thread = threadIdx.x - 256, head = kv_head * group - 1, row = end_row;
    ring.produce(2 * steps, [&](int item) {
      SwizzledTile<QUERIES, D> tile{slot(item)};
      u32 numbers = tile.base + tile.BYTES + thread % 64 * 4;
      if (item % 2 == 0) {
        row += QUERIES;
        if (row >= end_row) row = first_row, head++;
        int valid = b.rows - row, r = row + thread % 64;
        tile.template copy<128>(thread, b.q + (i64)row * b.ld_q + head * D, b.ld_q, valid);
        bool in = thread % 64 < valid;
        if (thread < 64) copy_async_4(numbers, b.stats + (i64)head * b.padded + r, true);
        if (thread < 64) copy_async_4(numbers + 256, b.lo + r, in);
        else copy_async_4(numbers + 512, b.hi + r, in);
      } else {
        tile.template copy<128>(thread, b.dout + (i64)row * b.ld_dout + head * D, b.ld_dout, b.rows - row);
        if (thread < 64) copy_async_4(numbers, b.stats + (i64)(b.n_heads + head) * b.padded + row + thread, true);
      }
    });
  } else {
    grow_registers<240>();
    int half = same_in_warp(threadIdx.x / 128) * 64;
    int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int key = first_key + half + warp * 16 + g;
    int begin = first_key + half, end = min(begin + 64, b.keys);
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;
    float scale = b.scale * LOG2_E;
    int row = end_row;
    for (int step = 0; step < steps; step++) {
      row += QUERIES;
      if (row >= end_row) row = first_row;
      SwizzledTile<QUERIES, D> q{slot(2 * step)}, dout{slot(2 * step + 1)};
      const u8* q_numbers = shared_bytes + (q.base + q.BYTES - base);
      const float2* lse = (const float2*)q_numbers + t;
      const uint2* lo = (const uint2*)(q_numbers + 256) + t;
      const uint2* hi = (const uint2*)(q_numbers + 512) + t;
      const float2* delta = (const float2*)(shared_bytes + (dout.base + dout.BYTES - base)) + t;
      // S^T and dP^T [64 keys, 64 queries].
      float s[32], dp[32];
      ring.wait_full(2 * step);
      products_begin();
      multiply_transposed<QUERIES>(s, k, half, q, 0);
      products_commit();
      // The step before is done with its tiles.
      wgmma_wait<1>();
      if (step > 0) {
        ring.release(2 * step - 2);
        ring.release(2 * step - 1);
      }
      ring.wait_full(2 * step + 1);
      products_begin();
      multiply_transposed<QUERIES>(dp, v, half, dout, 0);
      products_commit();
      int last = min(QUERIES, b.rows - row) - 1;
      bool all = ((const u32*)(q_numbers + 256))[last] <= begin && ((const u32*)(q_numbers + 512))[0] >= end;
      wgmma_wait<1>();
      settled(s);
      u32 p_half[16], ds_half[16];
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float2 l = lse[4 * n];
#pragma unroll
        for (int i = 0; i < 4; i++) s[4 * n + i] = exp2_fast(s[4 * n + i] * scale - (i % 2 ? l.y : l.x));
      }
      if (!all) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
          uint2 l = lo[4 * n], h = hi[4 * n];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            u32 at = key + i / 2 * 8;
            if (at < (i % 2 ? l.y : l.x) || at >= (i % 2 ? h.y : h.x)) s[4 * n + i] = 0.f;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 16; i++) p_half[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
      products_begin();
#pragma unroll
      for (int i = 0; i < QUERIES / 16; i++) wgmma(dv, p_half + 4 * i, dout.across(i));
      products_commit();
      wgmma_wait<1>();
      settled(dp);
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float2 d = delta[4 * n];
#pragma unroll
        for (int i = 0; i < 2; i++)
          ds_half[2 * n + i] = pack_bf16(s[4 * n + 2 * i] * (dp[4 * n + 2 * i] - d.x),
                                         s[4 * n + 2 * i + 1] * (dp[4 * n + 2 * i + 1] - d.y));
      }
      products_begin();
#pragma unroll
      for (int i = 0; i < QUERIES / 16; i++) wgmma(dk, ds_half + 4 * i, q.across(i));
      products_commit();
    }
    wgmma_wait<0>();
    settled(dk);
    settled(dv);
    i64 column = kv_head * D + 2 * t;
    store_fragment(dk, b.dk + (i64)key * b.ld_dk + column, b.ld_dk, b.keys - key, b.scale, b.accumulate & ADD_DK);
    store_fragment(dv, b.dv + (i64)key * b.ld_dv + column, b.ld_dv, b.keys - key, 1.f, b.accumulate & ADD_DV);
  }
}

// Shared memory: q and dout [128, D]; slots of a tile [128, D]; the ring's barriers. Even items are k, odd ones v.
namespace dq {
constexpr int QUERIES = 128;
constexpr int KEYS = 128;
constexpr int SLOTS = 4;
constexpr int SLOT_BYTES = KEYS * D * 2;
constexpr int FIRST_SLOT = 2 * QUERIES * D * 2;
}  // namespace dq

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_dq_wgmma(const __grid_constant__ Backward b, const __grid_constant__ Extras extras) {
  using namespace dq;
  u32 base = shared_address(shared_bytes);
  Ring<SLOTS> ring{base + FIRST_SLOT + SLOTS * SLOT_BYTES};
  SwizzledTile<QUERIES, D> q{base}, dout{base + QUERIES * D * 2};
  auto slot = [&](int item) { return base + FIRST_SLOT + item % SLOTS * SLOT_BYTES; };

  // Causal attention's heaviest tiles, the last, start first.
  int tiles = (b.rows + QUERIES - 1) / QUERIES;
  int head = blockIdx.x % b.n_heads, first_row = (tiles - 1 - (int)(blockIdx.x / b.n_heads)) * QUERIES;
  int kv_head = head / (b.n_heads / b.n_kv_heads), n_rows = min(QUERIES, b.rows - first_row);
  if (threadIdx.x < 256) {
    q.template copy<256>(threadIdx.x, b.q + (i64)first_row * b.ld_q + head * D, b.ld_q, n_rows);
    dout.template copy<256>(threadIdx.x, b.dout + (i64)first_row * b.ld_dout + head * D, b.ld_dout, n_rows);
  } else if (threadIdx.x == 256) {
    ring.init();
  }
  copy_commit();
  // Keys that some row sees.
  int begin = b.lo[first_row], end = b.hi[first_row + n_rows - 1];
  int steps = max(0, (end - begin + KEYS - 1) / KEYS);
  copy_wait<0>();
  publish_shared();
  __syncthreads();

  if (threadIdx.x >= 256) {
    shrink_registers<24>();
    int thread = threadIdx.x - 256;
    ring.produce(2 * steps, [&](int item) {
      SwizzledTile<KEYS, D> tile{slot(item)};
      int key = begin + item / 2 * KEYS, valid = b.keys - key;
      if (item % 2 == 0) tile.template copy<128>(thread, b.k + (i64)key * b.ld_k + kv_head * D, b.ld_k, valid);
      else tile.template copy<128>(thread, b.v + (i64)key * b.ld_v + kv_head * D, b.ld_v, valid);
    });
  } else {
    grow_registers<240>();
    int half = same_in_warp(threadIdx.x / 128) * 64;
    int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int row = first_row + half + warp * 16 + g;
    // This lane's two rows, and the keys that all of the warpgroup's rows see. Rows past the end have probabilities 0
    // anyway. A row's keys are counted from the lane's first column on, because with the lane's number in the loop
    // ptxas serializes the products (its message C7515).
    int from[2], to[2];
    float lse[2], delta[2], acc[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) acc[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int r = row + 8 * i, clamped = min(r, b.rows - 1);
      from[i] = (int)b.lo[clamped] - 2 * t;
      to[i] = (int)b.hi[clamped] - 2 * t;
      lse[i] = b.stats[(i64)head * b.padded + r];
      delta[i] = b.stats[(i64)(b.n_heads + head) * b.padded + r];
    }
    int all_begin = b.lo[min(first_row + half + 63, b.rows - 1)], all_end = b.hi[min(first_row + half, b.rows - 1)];

    float scale = b.scale * LOG2_E;
    for (int step = 0; step < steps; step++) {
      SwizzledTile<KEYS, D> k{slot(2 * step)}, v{slot(2 * step + 1)};
      // S and dP [64 queries, 128 keys].
      float s[64], dp[64];
      ring.wait_full(2 * step);
      products_begin();
      multiply_transposed<KEYS>(s, q, half, k, 0);
      products_commit();
      // The step before is done with its keys (while its dQ ran, this step's S was already waiting in line).
      wgmma_wait<1>();
      if (step > 0) ring.release(2 * step - 2);
      ring.wait_full(2 * step + 1);
      products_begin();
      multiply_transposed<KEYS>(dp, dout, half, v, 0);
      products_commit();
      wgmma_wait<1>();
      settled(s);
#pragma unroll
      for (int i = 0; i < 64; i++) s[i] = exp2_fast(s[i] * scale - lse[i / 2 % 2]);
      wgmma_wait<0>();
      settled(dp);
      ring.release(2 * step + 1);
      int key = begin + step * KEYS;
      if (key < all_begin || key + KEYS > all_end) {
#pragma unroll
        for (int i = 0; i < 64; i++) {
          int c = i / 4 * 8 + i % 2;
          if (c < from[i / 2 % 2] - key || c >= to[i / 2 % 2] - key) s[i] = 0.f;
        }
      }
      u32 ds[32];
#pragma unroll
      for (int i = 0; i < 32; i++)
        ds[i] = pack_bf16(s[2 * i] * (dp[2 * i] - delta[i % 2]), s[2 * i + 1] * (dp[2 * i + 1] - delta[i % 2]));
      products_begin();
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++) wgmma(acc, ds + 4 * i, k.across(i));
      products_commit();
    }
    wgmma_wait<0>();
    settled(acc);
    add_extras<D8>(acc, b, extras, row, head, t);
    store_fragment(acc, b.dq + (i64)row * b.ld_dq + head * D + 2 * t, b.ld_dq, b.rows - row, b.scale,
                   b.accumulate & ADD_DQ);
  }
}
