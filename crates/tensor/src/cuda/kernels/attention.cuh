// What the attention kernels' forward and backward passes share: the keys that a query sees beyond its base keys.
#pragma once
#include "common.cuh"

constexpr int MAX_EXTRAS = 32;

// Extra keys of the queries (the diagonal keys of test-time training), passed by value: entry e of query row r is row
// index[e][r] of key[e] and value[e] (row r where index[e] is null; nothing where the index is NONE). Keys and values
// are [*, n_kv_heads * HEAD_DIM]; ld_key and ld_value are the elements between their rows.
struct Extras {
  const bf16* key[MAX_EXTRAS];
  const bf16* value[MAX_EXTRAS];
  const u32* index[MAX_EXTRAS];
  int ld_key[MAX_EXTRAS];
  int ld_value[MAX_EXTRAS];
};

// The row of extra e that query row r sees, or NONE.
__device__ __forceinline__ u32 extra_row(const Extras& extras, int e, int r) {
  const u32* index = extras.index[e];
  return index ? index[r] : (u32)r;
}
