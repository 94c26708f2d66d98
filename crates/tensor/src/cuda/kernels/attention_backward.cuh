// What the attention backward kernels share: their argument, and which rows see which keys.
#pragma once
#include "attention.cuh"
#include "common.cuh"

// The one argument of every kernel of a backward pass, by value (the extras' kernels take Extras beside it). Query row
// r sees the base keys lo[r] <= t < hi[r]; lo and hi never decrease. Matrices of bf16 are rows of heads of HEAD_DIM
// elements; ld_x is the elements between rows of x. All pointers are aligned to 16 bytes, all ld_x multiples of 8.
struct Backward {
  const bf16* q;     // [rows, n_heads]
  const bf16* k;     // [keys, n_kv_heads]
  const bf16* v;     // [keys, n_kv_heads]
  const bf16* out;   // [rows, n_heads]
  const bf16* dout;  // [rows, n_heads]
  const float* lse;  // [rows, n_heads], natural logarithm, -inf for rows that see nothing
  const u32* lo;     // [rows]
  const u32* hi;     // [rows]
  // Scratch. Per query head, each [n_heads, padded]: the log-sum-exp times log2(e) (+inf for rows that see nothing and
  // for those past the end, which makes their probabilities 0), then delta = sum of dout * out.
  float* stats;
  float* extra_ds;  // scratch [rows, n_heads, n_extras]: the gradients of the extras' scores, before scale
  bf16* dq;         // [rows, n_heads]
  bf16* dk;         // [keys, n_kv_heads]
  bf16* dv;         // [keys, n_kv_heads]
  int rows;
  int keys;
  int n_heads;
  int n_kv_heads;
  int n_extras;
  int padded;  // rows rounded up to a multiple of 128, plus 128
  int ld_q;
  int ld_k;
  int ld_v;
  int ld_out;
  int ld_dout;
  int ld_dq;
  int ld_dk;
  int ld_dv;
  float scale;
  u32 accumulate;  // bit 0: add to dq instead of writing it; bit 1: dk; bit 2: dv
};
constexpr u32 ADD_DQ = 1, ADD_DK = 2, ADD_DV = 4;
constexpr float LOG2_E = 1.4426950408889634f;

// Where the extras' gradients go, by value: [rows, n_kv_heads] each. Bit e of the masks: add to extra e's.
struct ExtraGrads {
  bf16* dkey[MAX_EXTRAS];
  bf16* dvalue[MAX_EXTRAS];
  int ld_dkey[MAX_EXTRAS];
  int ld_dvalue[MAX_EXTRAS];
  u32 accumulate_key;
  u32 accumulate_value;
};

// The range of rows that see any of the keys first_key .. first_key + n_keys, from the first row whose hi is above
// first_key to the first whose lo is past the last key (rows in between may see nothing). For whole warps: two
// searches side by side, 32 probes a round each, because every round waits for memory once.
__device__ __forceinline__ void rows_that_see(const Backward& b, int first_key, int n_keys, int& begin, int& end) {
  const u32* values[2] = {b.hi, b.lo};
  u32 bound[2] = {(u32)first_key, (u32)(first_key + n_keys - 1)};
  int lane = threadIdx.x & 31, from[2] = {0, 0}, n[2] = {b.rows, b.rows};
  while (n[0] > 0 || n[1] > 0) {
    bool above[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int probe = lane * ((n[i] + 31) / 32);
      above[i] = probe >= n[i] || values[i][from[i] + probe] > bound[i];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 votes = __ballot_sync(0xffffffffu, above[i]);
      int step = (n[i] + 31) / 32, first = votes ? __ffs(votes) - 1 : 32;
      // Between the last probe that is not above and the first that is.
      int skip = first == 0 ? 0 : (first - 1) * step + 1;
      n[i] = first == 0 ? 0 : min(first * step, n[i]) - skip;
      from[i] += skip;
    }
  }
  begin = from[0];
  end = from[1];
}

// Two neighbouring elements of a result, added to what is there if asked; rounded once.
__device__ __forceinline__ void store_pair(bf16* p, float x, float y, bool add) {
  if (add) {
    u32 old = *(const u32*)p;
    x += low_half(old);
    y += high_half(old);
  }
  *(u32*)p = pack_bf16(x, y);
}

// Adds the part of dq that comes from the extras to a lane's accumulators, N fragments of query rows r (acc[4 n],
// acc[4 n + 1]) and r + 8 (acc[4 n + 2], acc[4 n + 3]), columns 8 n + 2 t and the next.
template <int N>
__device__ __forceinline__ void add_extras(float* acc, const Backward& b, const Extras& extras, int r, int head,
                                           int t) {
  int kv_head = head / (b.n_heads / b.n_kv_heads);
#pragma unroll 2
  for (int e = 0; e < b.n_extras; e++) {
    // Both rows' loads at once: this waits for memory more than it computes.
    float ds[2];
    u32 pairs[2][N];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      i64 row = min(r + 8 * i, b.rows - 1);
      ds[i] = b.extra_ds[(row * b.n_heads + head) * b.n_extras + e];
      const bf16* key = extras.key[e] + row * extras.ld_key[e] + kv_head * (8 * N) + 2 * t;
#pragma unroll
      for (int n = 0; n < N; n++) pairs[i][n] = *(const u32*)(key + 8 * n);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int n = 0; n < N; n++) {
        acc[4 * n + 2 * i] += ds[i] * low_half(pairs[i][n]);
        acc[4 * n + 2 * i + 1] += ds[i] * high_half(pairs[i][n]);
      }
    }
  }
}
