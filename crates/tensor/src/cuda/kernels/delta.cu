// The gated delta rule, compiled for a width of queries and keys (KEY_DIM). A block has one value head of consecutive
// rows, a thread one column of its state, in registers: every sum over the state is within a thread.
#include "common.cuh"

constexpr int MOST = 256;  // columns of a state

// out [R, value_heads, value_dim] of qkv [R, (2 key_heads + ...) ...]; the rows of blockIdx.y are
// bounds[y] <= r < bounds[y + 1]. A row starts from states[from[r]], or where the row before it ended if that is NONE;
// the state after it goes to states[to[r]] unless that is NONE. states are [n, value_heads, KEY_DIM, value_dim].
// Block value_dim rounded up to 32 (at most 256); grid (value_heads, pieces); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(MOST)
    delta_rule(bf16* out, float* states, const bf16* qkv, const bf16* b, const bf16* a, const float* a_log,
               const float* dt_bias, const u32* from, const u32* to, const u32* bounds, int key_heads, int value_heads,
               int value_dim, i64 ldb, i64 lda) {
  __shared__ float shared_q[2][KEY_DIM], shared_k[2][KEY_DIM];
  const int head = blockIdx.x, key_head = head / (value_heads / key_heads), column = threadIdx.x, lane = column % 32;
  const i64 width = 2ll * key_heads * KEY_DIM + (i64)value_heads * value_dim;
  const i64 per_state = (i64)value_heads * KEY_DIM * value_dim;
  const bool valid = column < value_dim;
  const float rate = -expf(a_log[head]), bias = dt_bias[head];
  states += (i64)head * KEY_DIM * value_dim + column;
  float state[KEY_DIM];
#pragma unroll
  for (int i = 0; i < KEY_DIM; ++i) state[i] = 0.f;
#pragma unroll 1
  for (u32 r = bounds[blockIdx.y]; r < bounds[blockIdx.y + 1]; ++r) {
    const bf16* q = qkv + r * width + (i64)key_head * KEY_DIM;
    const bf16* k = q + (i64)key_heads * KEY_DIM;
    // Every warp has both norms; a buffer is written again only when all threads are past the row that read it.
    float squares_q = 0.f, squares_k = 0.f;
    for (int i = lane; i < KEY_DIM; i += 32) {
      squares_q = fmaf(to_float(q[i]), to_float(q[i]), squares_q);
      squares_k = fmaf(to_float(k[i]), to_float(k[i]), squares_k);
    }
    const float scale_q = rsqrtf(warp_sum(squares_q) + 1e-6f) * rsqrtf((float)KEY_DIM);
    const float scale_k = rsqrtf(warp_sum(squares_k) + 1e-6f);
    float* in_q = shared_q[r & 1];
    float* in_k = shared_k[r & 1];
    for (int i = column; i < KEY_DIM; i += blockDim.x) {
      in_q[i] = to_float(q[i]) * scale_q;
      in_k[i] = to_float(k[i]) * scale_k;
    }
    const u32 source = from[r], target = to[r];
    if (source != NONE && valid) {
#pragma unroll
      for (int i = 0; i < KEY_DIM; ++i) state[i] = states[source * per_state + (i64)i * value_dim];
    }
    const float x = to_float(a[r * lda + head]) + bias;
    const float keep = expf(rate * (x > 20.f ? x : log1pf(expf(x))));
    const float write = 1.f / (1.f + expf(-to_float(b[r * ldb + head])));
    __syncthreads();
    const float v = valid ? to_float(qkv[r * width + 2ll * key_heads * KEY_DIM + (i64)head * value_dim + column]) : 0.f;
    float seen = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < KEY_DIM; ++i) {
      state[i] *= keep;
      seen = fmaf(state[i], in_k[i], seen);
    }
    const float change = write * (v - seen);
#pragma unroll
    for (int i = 0; i < KEY_DIM; ++i) {
      state[i] = fmaf(in_k[i], change, state[i]);
      sum = fmaf(state[i], in_q[i], sum);
    }
    if (valid) store(out + ((i64)r * value_heads + head) * value_dim + column, sum);
    if (target != NONE && valid) {
#pragma unroll
      for (int i = 0; i < KEY_DIM; ++i) states[target * per_state + (i64)i * value_dim] = state[i];
    }
  }
}
