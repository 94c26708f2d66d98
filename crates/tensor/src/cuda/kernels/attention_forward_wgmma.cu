// Attention forward for Hopper (sm_90a; -DHEAD_DIM=64, 128 or 256), on warpgroup matrix instructions. Semantics,
// arguments and conditions are those of attention_forward.cu; its key tiles differ, so its bits do as well.
//
// Launch (R > 0): grid (n_heads, ceil(R / 128)), block 384, dynamic shared memory
// 256 * HEAD_DIM + 8 * KEYS * HEAD_DIM + 2048 bytes, with KEYS = 64 for 256 dimensions and else 128: 83968, 165888 and
// 198656 bytes for 64, 128 and 256 dimensions.
//
// A block takes one head of 128 query rows. Warpgroup 0 copies key and value tiles into two stages each; warpgroups 1
// and 2 compute, 64 rows each. A pair of named barriers makes these two take turns in starting products, so that one
// computes its softmax while the other's products keep the tensor cores busy. A turn starts the scores of a tile and
// the value product of the tile before it, for which no softmax has to be waited.
#include "attention_forward.cuh"
#include "warpgroup.cuh"

constexpr int ROWS = 128, KEYS = HEAD_DIM == 256 ? 64 : 128, STAGES = 2;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "head size");
constexpr u32 Q_BYTES = 64 * HEAD_DIM * 2;  // of one warpgroup
constexpr u32 STAGE_BYTES = KEYS * HEAD_DIM * 2;
constexpr u32 Q_PANEL = 64 * 128, KEY_PANEL = KEYS * 128;

// Named barriers, each + warpgroup: its turn to start products; its own threads.
constexpr int TURN = 1, WITHIN = 3;

// Shared memory: queries of both warpgroups, STAGES key tiles, STAGES value tiles, barriers, tile numbers.
struct Shared {
  u32 base;
  __device__ u32 queries(int group) const { return base + group * Q_BYTES; }
  __device__ u32 keys(int stage) const { return base + 2 * Q_BYTES + stage * STAGE_BYTES; }
  __device__ u32 values(int stage) const { return keys(STAGES + stage); }
  __device__ u32 barriers() const { return keys(2 * STAGES); }
  // `full`: all of a tile has arrived. `empty`: no warp reads it any more.
  __device__ u32 keys_full(int stage) const { return barriers() + 8 * stage; }
  __device__ u32 keys_empty(int stage) const { return barriers() + 8 * (STAGES + stage); }
  __device__ u32 values_full(int stage) const { return barriers() + 8 * (2 * STAGES + stage); }
  __device__ u32 values_empty(int stage) const { return barriers() + 8 * (3 * STAGES + stage); }
  // The number of the key tile in a stage; NONE after the last one.
  __device__ u32 tile(int stage) const { return barriers() + 8 * 4 * STAGES + 4 * stage; }
};

// Where the i-th tile lies, and the parity of the phase that its arrival ends.
__device__ __forceinline__ int stage_of(int i) { return i % STAGES; }
__device__ __forceinline__ u32 parity_of(int i) { return i / STAGES % 2; }

// What passes through the stages, in this order: the base tiles, an empty entry, and for each extra the rows that the
// block's queries see of it, in the order of the queries (in PARTS entries where a stage holds fewer).
constexpr int PARTS = ROWS / KEYS;

// The 64 threads that copy the keys (or the values).
template <bool IS_KEYS>
__device__ __forceinline__ void produce(const Shared& shared, const KeyTiles<ROWS / 32, KEYS>& tiles, const bf16* base,
                                        int ld, u32 T, const Extras& extras, int n_extras, int first, int R,
                                        int column) {
  const PanelCopy<KEYS, HEAD_DIM, 64> copy(threadIdx.x % 64);
  int i = 0;
  // Says that all copies into the stage of entry j have arrived, those of a later entry perhaps not.
  auto arrived = [&](int j) {
    publish_shared();
    barrier_arrive(IS_KEYS ? shared.keys_full(stage_of(j)) : shared.values_full(stage_of(j)));
  };
  // Starts the copies of the next entry when its stage is empty (a new barrier counts as having ended a phase of parity
  // 1: the first entries do not wait). Only then waits for the copies of the entry before.
  auto entry = [&](auto start) {
    int stage = stage_of(i);
    barrier_wait(IS_KEYS ? shared.keys_empty(stage) : shared.values_empty(stage), parity_of(i) ^ 1);
    start(IS_KEYS ? shared.keys(stage) : shared.values(stage));
    copy_commit();
    if (i > 0) {
      copy_wait<1>();
      arrived(i - 1);
    }
    ++i;
  };
  base += column;
  for (u32 tile = tiles.from(0);; tile = tiles.from(tile + 1)) {
    entry([&](u32 to) {
      if (IS_KEYS && threadIdx.x == 0)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared.tile(stage_of(i))), "r"(tile) : "memory");
      if (tile == NONE) return;
      const u32 start = tile * KEYS;
      if (start + KEYS <= T)
        copy.rows(to, base + (i64)start * ld, ld);
      else  // zeros past the end: a weight of 0 times whatever follows the buffer may be no number
        copy.gather(to, base, ld, [&](int row) { return start + row < T ? start + row : NONE; });
    });
    if (tile == NONE) break;
  }
  for (int e = 0; e < n_extras; ++e) {
    const bf16* from = (IS_KEYS ? extras.key[e] : extras.value[e]) + column;
    int ld_extra = IS_KEYS ? extras.ld_key[e] : extras.ld_value[e];
    for (int part = 0; part < PARTS; ++part) {
      entry([&](u32 to) {
        const int start = first + part * KEYS;
        if (!extras.index[e] && start + KEYS <= R)
          copy.rows(to, from + (i64)start * ld_extra, ld_extra);
        else
          copy.gather(to, from, ld_extra, [&](int row) { return extra_row(extras, e, min(start + row, R - 1)); });
      });
    }
  }
  copy_wait<0>();
  arrived(i - 1);
}

// A warpgroup's queries as the first operand of the scores: in registers where those suffice, since shared memory is
// busy enough with keys, values and copies.
constexpr bool KEEP_Q = HEAD_DIM <= 128;
struct Queries {
  u32 tile;  // of the warpgroup, in shared memory
  u32 kept[KEEP_Q ? HEAD_DIM / 4 : 1];

  __device__ __forceinline__ void load(u32 (&a)[4], int step) const {
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16;
    load_matrices(a, tile + panel_offset(Q_PANEL, row, 2 * step + threadIdx.x / 16 % 2));
  }
  __device__ __forceinline__ explicit Queries(u32 tile) : tile(tile) {
    if constexpr (KEEP_Q) {
#pragma unroll
      for (int step = 0; step < HEAD_DIM / 16; ++step) {
        u32 a[4];
        load(a, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[4 * step + i] = a[i];
      }
    }
  }
};

// Starts s = q k^T for a warpgroup's 64 queries.
__device__ __forceinline__ void start_scores(float (&s)[KEYS / 2], const Queries& queries, u32 keys) {
  const u64 a = describe(queries.tile, 16), b = describe(keys, 16);
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const u64 b_step = advance(b, step / 4 * KEY_PANEL + step % 4 * 32);
    if constexpr (KEEP_Q)
      warpgroup_multiply<KEYS, false>(s, queries.kept + 4 * step, b_step, step > 0);
    else
      warpgroup_multiply<KEYS>(s, advance(a, step / 4 * Q_PANEL + step % 4 * 32), b_step, step > 0);
  }
  products_commit();
}

// Starts o += p v.
__device__ __forceinline__ void start_values(float (&o)[HEAD_DIM / 2], const u32 (&p)[KEYS / 4], u32 values) {
  constexpr int WIDTH = HEAD_DIM == 64 ? 64 : 128;
  u64 b = describe(values, KEY_PANEL);
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / WIDTH; ++n)
      warpgroup_multiply<WIDTH, true>(o + n * (WIDTH / 2), p + 4 * step,
                                      advance(b, n * 2 * KEY_PANEL + step * 16 * 128), true);
  }
  products_commit();
}

__device__ __forceinline__ void release(u32 barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ void to_operand(u32 (&p)[KEYS / 4], const float (&s)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ u32 tile_in(const Shared& shared, int stage) {
  u32 tile;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(tile) : "r"(shared.tile(stage)) : "memory");
  return tile;
}

// Base keys for a warpgroup's 64 rows. Returns the number of tiles.
__device__ __forceinline__ int consume_tiles(const Shared& shared, int group, const Queries& queries, Softmax& softmax,
                                             float (&o)[HEAD_DIM / 2]) {
  float s[KEYS / 2], factor[2];
  u32 p[KEYS / 4];
  int i = 0;
  barrier_wait(shared.keys_full(0), 0);
  u32 tile = tile_in(shared, 0);
  if (group == 1) named_arrive(TURN + 0, 256);
  if (tile != NONE) {
    products_begin();
    start_scores(s, queries, shared.keys(0));
    products_wait<0>(s);
    release(shared.keys_empty(0));
    softmax.tile(s, tile * KEYS, factor);
    to_operand(p, s);
    for (i = 1;; ++i) {
      int stage = stage_of(i), before = stage_of(i - 1);
      barrier_wait(shared.keys_full(stage), parity_of(i));
      tile = tile_in(shared, stage);
      if (tile == NONE) break;
      named_sync(TURN + group, 256);
      products_begin();
      start_scores(s, queries, shared.keys(stage));
      barrier_wait(shared.values_full(before), parity_of(i - 1));
      products_begin();
      start_values(o, p, shared.values(before));
      named_arrive(TURN + (group ^ 1), 256);
      products_wait<1>(s);
      release(shared.keys_empty(stage));
      // Computing the softmax before this wait was slower: the other warpgroup's products fill that time anyway.
      products_wait<0>(o);
      release(shared.values_empty(before));
      softmax.tile(s, tile * KEYS, factor);
      rescale(o, factor);
      to_operand(p, s);
    }
    int before = stage_of(i - 1);
    barrier_wait(shared.values_full(before), parity_of(i - 1));
    products_begin();
    start_values(o, p, shared.values(before));
    products_wait<0>(o);
    release(shared.values_empty(before));
  }
  if (group == 0) named_sync(TURN + 0, 256);  // The turn that nobody took.
  return i;
}

// Extras for a warpgroup's 64 rows, from entry i of the stages on.
__device__ __forceinline__ void consume_extras(const Shared& shared, int group, const Queries& queries,
                                               Softmax& softmax, float (&o)[HEAD_DIM / 2], const Extras& extras,
                                               int n_extras, int row, int R, int i) {
  // Where the lane's rows of load_matrices lie (attention_forward.cu has the order of the matrices).
  const int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
  const int in_stage = threadIdx.x / 32 % 4 * 16 + (PARTS == 1 ? group * 64 : 0);
  u32 at[2], next[2];
  extra_rows(next, extras, 0, row, R);
  for (int e = 0; e < n_extras; ++e) {
    at[0] = next[0], at[1] = next[1];
    if (e + 1 < n_extras) extra_rows(next, extras, e + 1, row, R);  // early: these loads take long
    for (int part = 0; part < PARTS; ++part, ++i) {
      int stage = stage_of(i);
      bool mine = PARTS == 1 || part == group;
      float p[2], factor[2];
      barrier_wait(shared.keys_full(stage), parity_of(i));
      if (mine) {
        extra_scores(p, at, [&](u32(&a)[4], int step) { queries.load(a, step); }, [&](u32(&b)[4], int step) {
          load_matrices(b, shared.keys(stage) + panel_offset(KEY_PANEL, in_stage + high * 8 + low, 2 * step + middle));
        });
        softmax.one(p, factor);
        rescale(o, factor);
      }
      release(shared.keys_empty(stage));
      barrier_wait(shared.values_full(stage), parity_of(i));
      if (mine) {
        extra_values(o, p, [&](u32(&b)[4], int n) {
          load_matrices_transposed(
              b, shared.values(stage) + panel_offset(KEY_PANEL, in_stage + middle * 8 + low, 2 * n + high));
        });
      }
      release(shared.values_empty(stage));
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_forward_wgmma(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, const u32* lo,
                            const u32* hi, const float* sinks, const __grid_constant__ Extras extras, int n_extras,
                            int R, int T, int n_heads, int n_kv_heads, int ldq, int ldk, int ldv, int ldo,
                            float scale, float cap) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared = {(shared_address(memory) + 1023) / 1024 * 1024};
  // Causal rows see more keys the later they are; the longest tiles start first so that the short ones fill the end.
  const int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int kv_head = head / (n_heads / n_kv_heads);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.keys_full(stage), 64);
      barrier_init(shared.values_full(stage), 64);
      barrier_init(shared.keys_empty(stage), 8);  // one for each computing warp
      barrier_init(shared.values_empty(stage), 8);
    }
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    shrink_registers<40>();
    KeyTiles<ROWS / 32, KEYS> tiles(lo, hi, first, R);
    if (threadIdx.x < 64)
      produce<true>(shared, tiles, k, ldk, T, extras, n_extras, first, R, kv_head * HEAD_DIM);
    else
      produce<false>(shared, tiles, v, ldv, T, extras, n_extras, first, R, kv_head * HEAD_DIM);
  } else {
    grow_registers<232>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
    const int row = first + group * 64 + warp * 16 + threadIdx.x % 32 / 4;
    // Rows past the last query repeat it.
    constexpr int THREADS = HEAD_DIM == 64 ? 64 : 128;
    if (threadIdx.x % 128 < THREADS)
      PanelCopy<64, HEAD_DIM, THREADS>(threadIdx.x % 128)
          .gather(shared.queries(group), q + head * HEAD_DIM, ldq,
                  [&](int i) { return (u32)min(first + group * 64 + i, R - 1); });
    copy_commit();
    Softmax softmax(lo, hi, row, R, scale, cap);
    copy_wait<0>();
    publish_shared();
    named_sync(WITHIN + group, 128);
    const Queries queries(shared.queries(group));
    float o[HEAD_DIM / 2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.f;
    int n = consume_tiles(shared, group, queries, softmax, o);
    softmax.end_tiles();
    if (n_extras > 0) {
      // The empty entry.
      barrier_wait(shared.values_full(stage_of(n)), parity_of(n));
      release(shared.keys_empty(stage_of(n)));
      release(shared.values_empty(stage_of(n)));
      consume_extras(shared, group, queries, softmax, o, extras, n_extras, row, R, n + 1);
    }
    finish(o, softmax, sinks, out, lse, ldo, row, R, head, n_heads);
  }
}
