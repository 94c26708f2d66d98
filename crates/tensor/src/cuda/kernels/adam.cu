// AdamW over many tensors in one launch, and the sums of squares that clipping needs.
//
// The float32 master of a bf16 parameter is kept as the parameter, the master rounded to nearest, and 16 further bits
// low = (i16)(master bits - (parameter bits << 16)), which restore it bit for bit: a step moves 28 bytes a parameter.
// Rounding to nearest leaves 65537 differences, -0x8000..=0x8000, for every parameter that is even, so the two ends have
// to fall apart: ties round away from zero here, which leaves 65536.
#include "common.cuh"

// A tensor of n elements; the host fills a table of them. Either param and low are set (bf16 storage, split master) or
// exact (float32 storage). With t the tensor's own step number from 1, the host computes in float64 and rounds:
// step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t). share: how much of the gradient's squares counts.
struct AdamTensor {
  bf16* param;
  float* exact;
  u16* low;
  float *m, *v;
  const float* grad;
  i64 n;
  float step_size, root_correction;
  double share;
};

static_assert(sizeof(AdamTensor) == 72, "the host's table has this layout");

constexpr i64 CHUNK = 65536;  // elements of a block
constexpr int THREADS = 256;

__device__ __forceinline__ float join(bf16 param, u16 low) {
  return __uint_as_float(((u32)param << 16) + (u32)(int)(short)low);
}

// Returns low << 16 | param. NaN stays NaN: the rounding's carry must not make another number of it.
__device__ __forceinline__ u32 split(float master) {
  const u32 bits = __float_as_uint(master);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits << 16) | 0x7fc0u;
  return (bits << 16) | ((bits + 0x8000u) >> 16);
}

// V neighbouring 16-bit elements as two to a word; a single one in the low half.
template <int V>
struct Words {
  static constexpr int N = (V + 1) / 2;
  u32 v[N];
  __device__ __forceinline__ u16 at(int i) const { return (u16)(v[i / 2] >> (16 * (i & 1))); }
  __device__ __forceinline__ void set(int i, u32 x) {
    v[i / 2] = i & 1 ? (v[i / 2] & 0xffffu) | (x << 16) : (v[i / 2] & 0xffff0000u) | (x & 0xffffu);
  }
};
__device__ __forceinline__ void read(const u16* p, Words<1>& w) { w.v[0] = *p; }
__device__ __forceinline__ void read(const u16* p, Words<8>& w) {
  const uint4 u = *(const uint4*)p;
  w.v[0] = u.x, w.v[1] = u.y, w.v[2] = u.z, w.v[3] = u.w;
}
__device__ __forceinline__ void write(u16* p, const Words<1>& w) { *p = (u16)w.v[0]; }
__device__ __forceinline__ void write(u16* p, const Words<8>& w) { *(uint4*)p = make_uint4(w.v[0], w.v[1], w.v[2], w.v[3]); }

template <int V>
__device__ __forceinline__ void load_master(const bf16* param, const u16* low, float (&x)[V]) {
  Words<V> high, rest;
  read(param, high);
  read(low, rest);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = join(high.at(i), rest.at(i));
}
template <int V>
__device__ __forceinline__ void store_master(bf16* param, u16* low, const float (&x)[V]) {
  Words<V> high = {}, rest = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const u32 bits = split(x[i]);
    high.set(i, bits & 0xffffu);
    rest.set(i, bits >> 16);
  }
  write(param, high);
  write(low, rest);
}

// What every element's update needs, rounded to float32 where cpu/adam.rs does.
struct Step {
  float rate, keep, beta1, beta2, rest1, rest2, eps, scale, root_correction;
};

// No contraction into fused operations, so that the bits are those of cpu/adam.rs.
__device__ __forceinline__ void update(float& p, float& m, float& v, float grad, const Step& s) {
  const float g = __fmul_rn(grad, s.scale);
  m = __fadd_rn(__fmul_rn(s.beta1, m), __fmul_rn(s.rest1, g));
  v = __fadd_rn(__fmul_rn(s.beta2, v), __fmul_rn(__fmul_rn(s.rest2, g), g));
  const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root_correction), s.eps);
  p = __fsub_rn(__fmul_rn(p, s.keep), __fdiv_rn(__fmul_rn(s.rate, m), root));
}

template <int V>
__device__ __forceinline__ void update_at(const AdamTensor& t, i64 i, const Step& s) {
  float p[V], m[V], v[V], g[V];
  if (t.exact) load(t.exact + i, p);
  else load_master(t.param + i, t.low + i, p);
  load(t.m + i, m);
  load(t.v + i, v);
  load(t.grad + i, g);
#pragma unroll
  for (int k = 0; k < V; ++k) update(p[k], m[k], v[k], g[k], s);
  if (t.exact) store(t.exact + i, p);
  else store_master(t.param + i, t.low + i, p);
  store(t.m + i, m);
  store(t.v + i, v);
}

// One step. Block b updates chunk block_chunk[b] (CHUNK elements, the last may be shorter) of tensors[block_tensor[b]].
// The gradients are first divided by *weight and, if max_norm > 0, clipped: their norm is sqrt(*norm_sq) / *weight.
// Nothing is written where that norm is not finite. `lr` is for the decay alone; see AdamTensor for the rest.
// Grid: all chunks of all tensors; block 256; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const AdamTensor* tensors, const u32* block_tensor, const u32* block_chunk, double lr, double beta1,
          double beta2, double eps, double weight_decay, const double* norm_sq, const double* weight, double max_norm) {
  const AdamTensor t = tensors[block_tensor[blockIdx.x]];
  const double inv_weight = 1.0 / *weight, norm = sqrt(*norm_sq) * inv_weight;
  if (!(norm <= 1.7976931348623157e308)) return;
  double clip = 1.0;
  if (max_norm > 0.0 && max_norm < norm + 1e-6) clip = max_norm / (norm + 1e-6);
  const Step s = {t.step_size,          (float)(1.0 - lr * weight_decay), (float)beta1, (float)beta2,
                  (float)(1.0 - beta1), (float)(1.0 - beta2),             (float)eps,   (float)(inv_weight * clip),
                  t.root_correction};
  const i64 begin = block_chunk[blockIdx.x] * CHUNK, end = begin + CHUNK < t.n ? begin + CHUNK : t.n;
  const bool wide = aligned(t.param, t.low) && aligned(t.exact, t.m) && aligned(t.v, t.grad);
  const i64 whole = wide ? (end - begin) / 8 : 0;
#pragma unroll 1
  for (i64 i = threadIdx.x; i < whole; i += THREADS) update_at<8>(t, begin + i * 8, s);
#pragma unroll 1
  for (i64 i = begin + whole * 8 + threadIdx.x; i < end; i += THREADS) update_at<1>(t, i, s);
}

// The sum over the block, in thread 0: a tree of fixed shape.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double part[THREADS];
  part[threadIdx.x] = x;
  for (int o = THREADS / 2; o > 0; o >>= 1) {
    __syncthreads();
    if ((int)threadIdx.x < o) part[threadIdx.x] += part[threadIdx.x + o];
  }
  return part[0];
}

// *out = sum of squares of x[begin..end]: eight elements at a time in float32, their sums in float64.
__device__ __forceinline__ void sum_squares(double* out, const float* x, i64 begin, i64 end) {
  const i64 whole = aligned(x) ? (end - begin) / 8 : 0;
  double sum = 0.0;
#pragma unroll 2
  for (i64 i = threadIdx.x; i < whole; i += THREADS) {
    float v[8], squares = 0.f;
    load(x + begin + i * 8, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) squares = fmaf(v[k], v[k], squares);
    sum += squares;
  }
  for (i64 i = begin + whole * 8 + threadIdx.x; i < end; i += THREADS) sum += x[i] * x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

// partial[b] = what counts of the sum of squares of the gradient's chunk that block b has in adamw. Grid and block as for adamw.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_squares_partial(double* partial, const AdamTensor* tensors, const u32* block_tensor, const u32* block_chunk) {
  const AdamTensor& t = tensors[block_tensor[blockIdx.x]];
  const i64 begin = block_chunk[blockIdx.x] * CHUNK;
  sum_squares(partial + blockIdx.x, t.grad, begin, begin + CHUNK < t.n ? begin + CHUNK : t.n);
  if (threadIdx.x == 0) partial[blockIdx.x] *= t.share;
}

// partial[b] = sum of squares of x[b CHUNK..(b + 1) CHUNK]. Grid ceil(n / 65536); block 256; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) sum_squares_f(double* partial, const float* x, i64 n) {
  const i64 begin = blockIdx.x * CHUNK;
  sum_squares(partial + blockIdx.x, x, begin, begin + CHUNK < n ? begin + CHUNK : n);
}

// out[0] = the sum of partial[0..n], in a fixed order; out[1] = weight. Grid 1; block 256; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) sum_squares_finish(double* out, const double* partial, int n, double weight) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < n; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[0] = sum, out[1] = weight;
}

// dst = the masters that param and low hold. Block 256; grid ceil(n / 2048) (any is correct); no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) join_master(float* dst, const bf16* param, const u16* low, i64 n) {
  for_elements(n, aligned(dst, param) && aligned(low), [&](i64 i, auto w) {
    float x[decltype(w)::value];
    load_master(param + i, low + i, x);
    store(dst + i, x);
  });
}

// The inverse. Grid and block as for join_master.
extern "C" __global__ void __launch_bounds__(THREADS) split_master(bf16* param, u16* low, const float* src, i64 n) {
  for_elements(n, aligned(src, param) && aligned(low), [&](i64 i, auto w) {
    float x[decltype(w)::value];
    load(src + i, x);
    store_master(param + i, low + i, x);
  });
}
