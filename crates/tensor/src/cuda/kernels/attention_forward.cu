// Attention forward for cards from Ampere (sm_80) on, any of HEAD_DIM = 64, 80, 96, 128, 256 (compile with
// -DHEAD_DIM=...). Hopper has a faster one for some head sizes: attention_forward_wgmma.cu.
//
//   out [R, n_heads * HEAD_DIM] = softmax(scale * q k^T over the keys each row sees) v,   lse [R, n_heads]
//
// q [R, n_heads * HEAD_DIM], k and v [T, n_kv_heads * HEAD_DIM], all bf16 with rows ldq, ldk, ldv, ldo elements apart.
// Row r sees base keys lo[r] <= t < hi[r], its extras (attention.cuh) and, if sinks is not null, a key of score
// sinks[head] and value zero. A row that sees nothing gives zeros and lse = -inf (or, with sinks, the sink).
// Pointers and row strides must be multiples of 16 bytes; scale must be positive.
//
// Launch (R > 0): grid (n_heads, ceil(R / 64)), block 128, dynamic shared memory
// 384 * (HEAD_DIM % 64 == 0 ? HEAD_DIM : HEAD_DIM + 8) bytes (at most 96 KiB: fits every card).
//
// A block takes one head of 64 query rows, 16 per warp, and walks over tiles of 64 keys. K and V have one buffer each:
// a tile's values arrive while its scores are computed, the next tile's keys while softmax and the second product run.
#include "attention_forward.cuh"

constexpr int ROWS = 64, KEYS = 64, THREADS = 128;
constexpr int K_STEPS = HEAD_DIM / 16;
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head size");

// Fragments of the queries stay in registers where those suffice.
constexpr bool KEEP_Q = HEAD_DIM <= 128;

// Byte offset of 8 elements in a shared tile. Eight consecutive rows must lie in different banks: the 16-byte chunks of
// a row are permuted by its number or, where a row is no multiple of 128 bytes, rows are padded to an odd count of
// chunks.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
  if (HEAD_DIM % 64 == 0) return (row * (HEAD_DIM / 8) + (chunk ^ (row % 8))) * 16;
  return (row * (HEAD_DIM / 8 + 1) + chunk) * 16;
}
constexpr u32 TILE_BYTES = 64 * (HEAD_DIM % 64 == 0 ? HEAD_DIM : HEAD_DIM + 8) * 2;

// Copies 64 rows of one head into a tile. Each thread copies one chunk of every STEP-th row, so that it spends few
// instructions on a copy; for some head sizes a few threads are left over.
struct TileCopy {
  static constexpr int CHUNKS = HEAD_DIM / 8, STEP = CHUNKS <= 8 ? 16 : CHUNKS <= 16 ? 8 : 4, COPIES = 64 / STEP;
  static_assert(STEP * CHUNKS <= THREADS, "one chunk of a row per thread");
  int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;

  // Consecutive rows.
  __device__ __forceinline__ void rows(u32 to, const bf16* from, int ld) const {
    if (row >= STEP) return;
    const u8* p = (const u8*)(from + (i64)row * ld + chunk * 8);
    const i64 step = (i64)STEP * ld * 2;
#pragma unroll
    for (int i = 0; i < COPIES; ++i, p += step) copy_async(to + chunk_offset(row + i * STEP, chunk), p, true);
  }

  // Row i comes from row at(i), and zeros where that is NONE.
  template <class At>
  __device__ __forceinline__ void gather(u32 to, const bf16* from, int ld, At at) const {
    if (row >= STEP) return;
#pragma unroll 4
    for (int i = 0; i < COPIES; ++i) {
      u32 r = at(row + i * STEP);
      copy_async(to + chunk_offset(row + i * STEP, chunk), from + (i64)(r == NONE ? 0 : r) * ld + chunk * 8, r != NONE);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, const u32* lo, const u32* hi,
                      const float* sinks, const __grid_constant__ Extras extras, int n_extras, int R, int T,
                      int n_heads, int n_kv_heads, int ldq, int ldk, int ldv, int ldo, float scale, float cap) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 q_tile = shared_address(shared), k_tile = q_tile + TILE_BYTES, v_tile = k_tile + TILE_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Causal rows see more keys the later they are; the longest tiles start first so that the short ones fill the end.
  const int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS, row = first + warp * 16 + lane / 4;
  const int kv_head = head / (n_heads / n_kv_heads);
  const int column = kv_head * HEAD_DIM;  // of the head in keys and values

  KeyTiles<ROWS / 32, KEYS> tiles(lo, hi, first, R);
  Softmax softmax(lo, hi, row, R, scale, cap);
  float o[HEAD_DIM / 2];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.f;

  // Fragments. Queries: matrices (rows 0-7, 8-15) x (columns 0-7, 8-15), rows first. Keys, which enter as columns:
  // columns first. Values, transposed: rows first.
  const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
  auto load_queries = [&](u32(&a)[4], int step) {
    load_matrices(a, q_tile + chunk_offset(warp * 16 + middle * 8 + low, 2 * step + high));
  };
  auto load_keys = [&](u32(&b)[4], int key, int step) {
    load_matrices(b, k_tile + chunk_offset(key + high * 8 + low, 2 * step + middle));
  };
  auto load_values = [&](u32(&b)[4], int key, int n) {
    load_matrices_transposed(b, v_tile + chunk_offset(key + middle * 8 + low, 2 * n + high));
  };
  // Rows past the last query repeat it. Rows past the last key are zeros: a weight of 0 times whatever follows the
  // buffer may be no number.
  const TileCopy copy;
  auto query_row = [&](int i) { return (u32)min(first + i, R - 1); };
  auto copy_base = [&](u32 to, const bf16* from, int ld, u32 tile) {
    const u32 start = tile * KEYS;
    if (start + KEYS <= (u32)T)
      copy.rows(to, from + (i64)start * ld + column, ld);
    else
      copy.gather(to, from + column, ld, [&](int i) { return start + i < (u32)T ? start + i : NONE; });
  };
  auto copy_extra = [&](u32 to, const bf16* from, int ld, int e) {
    copy.gather(to, from + column, ld, [&](int i) { return extra_row(extras, e, (int)query_row(i)); });
  };
  auto arrive = [&] {
    copy_commit();
    copy_wait<0>();
    __syncthreads();
  };

  u32 tile = tiles.from(0);
  copy.gather(q_tile, q + head * HEAD_DIM, ldq, query_row);
  if (tile != NONE) copy_base(k_tile, k, ldk, tile);
  else if (n_extras > 0) copy_extra(k_tile, extras.key[0], extras.ld_key[0], 0);
  arrive();
  u32 queries[KEEP_Q ? K_STEPS : 1][4];
  if (KEEP_Q) {
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) load_queries(queries[KEEP_Q ? step : 0], step);
  }

  while (tile != NONE) {
    copy_base(v_tile, v, ldv, tile);
    float s[KEYS / 2];
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = 0.f;
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
      if (!KEEP_Q) load_queries(queries[0], step);
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        u32 b[4];
        load_keys(b, n * 16, step);
        matrix_multiply(s + 8 * n, queries[KEEP_Q ? step : 0], b[0], b[1]);
        matrix_multiply(s + 8 * n + 4, queries[KEEP_Q ? step : 0], b[2], b[3]);
      }
    }
    arrive();  // The values are there and no warp reads the keys any more.
    u32 next = tiles.from(tile + 1);
    if (next != NONE) copy_base(k_tile, k, ldk, next);
    else if (n_extras > 0) copy_extra(k_tile, extras.key[0], extras.ld_key[0], 0);

    float factor[2];
    softmax.tile(s, tile * KEYS, factor);
    rescale(o, factor);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      u32 p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = pack_bf16(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 16; ++n) {
        u32 b[4];
        load_values(b, step * 16, n);
        matrix_multiply(o + 8 * n, p, b[0], b[1]);
        matrix_multiply(o + 8 * n + 4, p, b[2], b[3]);
      }
    }
    arrive();  // The next keys are there and no warp reads the values any more.
    tile = next;
  }

  softmax.end_tiles();
  for (int e = 0; e < n_extras; ++e) {
    copy_extra(v_tile, extras.value[e], extras.ld_value[e], e);
    u32 at[2];
    extra_rows(at, extras, e, row, R);
    float p[2], factor[2];
    extra_scores(p, at, load_queries, [&](u32(&b)[4], int step) { load_keys(b, warp * 16, step); });
    arrive();
    if (e + 1 < n_extras) copy_extra(k_tile, extras.key[e + 1], extras.ld_key[e + 1], e + 1);
    softmax.one(p, factor);
    rescale(o, factor);
    extra_values(o, p, [&](u32(&b)[4], int n) { load_values(b, warp * 16, n); });
    arrive();
  }
  finish(o, softmax, sinks, out, lse, ldo, row, R, head, n_heads);
}
