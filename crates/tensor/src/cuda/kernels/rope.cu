// Rotary position embedding, half-split pairing, optionally of a sum with rows of a table. A row is `rotated_heads`
// heads of head_dim, whose first 2 half elements rotate and whose rest is copied, and further columns that are copied.
// Memory-bound: each thread moves V neighbouring elements and, where they rotate, their V partners `half` further on,
// so that a row may be rotated in place. V is 8 where everything is a multiple of 8 and aligned, else 1.
#include "common.cuh"

struct Rope {
  const float *cos, *sin;
  const u32* positions;
  int rows, width, heads, head_dim, half;
};

// What one step of a thread covers: V columns from `first` on; j is their place in the tables' rows, or -1 where
// nothing rotates.
struct Unit {
  int first, j;
};

template <int V>
__device__ __forceinline__ int n_units(const Rope& a) {
  return a.heads * ((a.head_dim - a.half) / V) + (a.width - a.heads * a.head_dim) / V;
}

template <int V>
__device__ __forceinline__ Unit unit_at(const Rope& a, int u) {
  const int pairs = a.half / V, per_head = (a.head_dim - a.half) / V;
  if (u >= a.heads * per_head) return {a.heads * a.head_dim + (u - a.heads * per_head) * V, -1};
  const int head = u / per_head, i = u - head * per_head;
  if (i < pairs) return {head * a.head_dim + i * V, i * V};
  return {head * a.head_dim + 2 * a.half + (i - pairs) * V, -1};
}

// (x, y) becomes (x cos - sign y sin, y cos + sign x sin) with the angles of row r.
template <int V>
__device__ __forceinline__ void rotate(float (&x)[V], float (&y)[V], const Rope& a, i64 r, int j, float sign) {
  const i64 at = (i64)a.positions[r] * a.half + j;
  float cos[V], sin[V];
  load(a.cos + at, cos);
  load(a.sin + at, sin);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float s = sign * sin[i], p = x[i], q = y[i];
    x[i] = p * cos[i] - q * s;
    y[i] = q * cos[i] + p * s;
  }
}

// v += the V elements at p.
template <int V, class T>
__device__ __forceinline__ void add(float (&v)[V], const T* p) {
  float u[V];
  load(p, u);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] += u[i];
}

template <int V>
__device__ __forceinline__ void forward(bf16* y, const bf16* x, const bf16* table, const u32* index, const Rope& a,
                                        int ldx, int ldtable, int ldy, float sign) {
  const int units = n_units<V>(a);
  const RowTile t = row_tile(units);
  for (i64 r = t.row; r < a.rows; r += t.row_step) {
    const bf16* from = x + r * ldx;
    const u32 row = table ? index[r] : NONE;
    const bf16* extra = row != NONE ? table + (i64)row * ldtable : nullptr;
    bf16* to = y + r * ldy;
    for (int u = t.unit; u < units; u += t.unit_step) {
      const Unit at = unit_at<V>(a, u);
      float p[V], q[V];
      load(from + at.first, p);
      if (extra) add(p, extra + at.first);
      if (at.j >= 0) {
        load(from + at.first + a.half, q);
        if (extra) add(q, extra + at.first + a.half);
        rotate(p, q, a, r, at.j, sign);
        store(to + at.first + a.half, q);
      }
      store(to + at.first, p);
    }
  }
}

// y = rotation of s, s = x[r] + table[index[r]] (x[r] alone where table is null or index[r] is NONE); float32 up to one
// rounding at the end. y may be x. cos and sin are [P, half] and may be null, like positions, where half is 0.
// Block 256; grid min(rows, ceil(rows * width / 2048)) (any grid is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    rope(bf16* y, const bf16* x, const bf16* table, const u32* index, const float* cos, const float* sin,
         const u32* positions, int rows, int width, int rotated_heads, int head_dim, int half, int ldx, int ldtable,
         int ldy, int inverse) {
  const Rope a = {cos, sin, positions, rows, width, half > 0 ? rotated_heads : 0, head_dim, half};
  const bool wide = (width | head_dim | half | ldx | ldy) % 8 == 0 && aligned(x, y) && aligned(cos, sin) &&
                    (!table || (ldtable % 8 == 0 && aligned(table)));
  const float sign = inverse ? -1.f : 1.f;
  if (wide) forward<8>(y, x, table, index, a, ldx, ldtable, ldy, sign);
  else forward<1>(y, x, table, index, a, ldx, ldtable, ldy, sign);
}

template <int V>
__device__ __forceinline__ void backward(bf16* dx, float* dtable, const bf16* dy, const u32* index, const Rope& a,
                                         int lddy, int lddtable, int lddx) {
  const int units = n_units<V>(a);
  const RowTile t = row_tile(units);
  for (i64 r = t.row; r < a.rows; r += t.row_step) {
    const bf16* from = dy + r * lddy;
    const u32 row = dtable ? index[r] : NONE;
    float* sum = row != NONE ? dtable + (i64)row * lddtable : nullptr;
    bf16* to = dx + r * lddx;
    for (int u = t.unit; u < units; u += t.unit_step) {
      const Unit at = unit_at<V>(a, u);
      float p[V], q[V];
      load(from + at.first, p);
      if (at.j >= 0) {
        load(from + at.first + a.half, q);
        rotate(p, q, a, r, at.j, -1.f);
        store(to + at.first + a.half, q);
        if (sum) {
          add(q, sum + at.first + a.half);
          store(sum + at.first + a.half, q);
        }
      }
      store(to + at.first, p);
      if (sum) {
        add(p, sum + at.first);
        store(sum + at.first, p);
      }
    }
  }
}

// Gradient of rope: dx = inverse rotation of dy, and dtable[index[r]] += the same before its rounding, where dtable is
// given and index[r] is not NONE; the indices of a call are distinct. dx may be dy.
// Block 256; grid as for rope; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    rope_backward(bf16* dx, float* dtable, const bf16* dy, const u32* index, const float* cos, const float* sin,
                  const u32* positions, int rows, int width, int rotated_heads, int head_dim, int half, int lddy,
                  int lddtable, int lddx) {
  const Rope a = {cos, sin, positions, rows, width, half > 0 ? rotated_heads : 0, head_dim, half};
  const bool wide = (width | head_dim | half | lddy | lddx) % 8 == 0 && aligned(dx, dy) && aligned(cos, sin) &&
                    (!dtable || (lddtable % 8 == 0 && aligned(dtable)));
  if (wide) backward<8>(dx, dtable, dy, index, a, lddy, lddtable, lddx);
  else backward<1>(dx, dtable, dy, index, a, lddy, lddtable, lddx);
}
