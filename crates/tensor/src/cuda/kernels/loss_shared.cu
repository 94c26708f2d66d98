// The soft-target loss where ranks share the vocabulary: each has a block of columns of the draft's and the teacher's
// logits. Between these kernels the ranks combine what the last one wrote. Formulas are those of loss.cu.
#include "row_stats.cuh"
#include "tensor_core.cuh"

// For each of `rows` rows: the sum of e^(logit - own top) becomes that of e^(logit - top), top being the largest of all
// ranks; and if that is this rank's, `place` is `last` minus its token (of which the largest is that of the first token),
// else zero. Block 256; grid ceil(rows / 256); no dynamic shared memory.
extern "C" __global__ void rescale_stats(float* sum, u32* place, const float* own_top, const u32* argmax,
                                         const float* top, int last, int rows) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  sum[r] *= exp2_fast((own_top[r] - top[r]) * LOG2E);
  place[r] = own_top[r] == top[r] ? (u32)last - argmax[r] : 0u;
}

// Statistics of all ranks: of draft rows 0..rows, then of the chunk's teacher rows.
struct SharedTarget {
  bf16* logits;
  const bf16* teacher;
  float* parts;
  const float *top, *sum, *whole_lse;
  const u32* teacher_row;
  int first_teacher, rows, vocab;
  i64 ld, ld_teacher;
  __device__ __forceinline__ int local() const { return (int)(teacher_row[blockIdx.x] - (u32)first_teacher); }
  // What is added to logits, times log2(e), in the exponents of the draft's probability and of the teacher's: over the
  // draft vocabulary and over the whole one.
  __device__ __forceinline__ float to_q() const {
    return -fmaf(top[blockIdx.x], LOG2E, log2f(sum[blockIdx.x]));
  }
  __device__ __forceinline__ float to_p() const {
    const int t = rows + local();
    return -fmaf(top[t], LOG2E, log2f(sum[t]));
  }
  __device__ __forceinline__ float to_cp() const { return -whole_lse[teacher_row[blockIdx.x]] * LOG2E; }
  __device__ __forceinline__ bool wide() const {
    return (vocab | ld | ld_teacher) % 8 == 0 && aligned(logits, teacher);
  }
};

// Sums over this rank's columns: expected draft logit and mass of the teacher, acceptance, and the draft's probability
// where it is below the teacher's.
template <int V>
__device__ __forceinline__ void parts_of_row(const SharedTarget& a) {
  const int r = blockIdx.x;
  const bf16 *z = a.logits + r * a.ld, *teacher = a.teacher + a.local() * a.ld_teacher;
  const float to_q = a.to_q(), to_p = a.to_p(), to_cp = a.to_cp();
  float expected = 0.f, mass = 0.f, acceptance = 0.f, below = 0.f;
  for (int c = threadIdx.x * V; c < a.vocab; c += blockDim.x * V) {
    float q[V], t[V];
    load(z + c, q);
    load(teacher + c, t);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float x = fmaf(q[i], LOG2E, to_q), y = fmaf(t[i], LOG2E, to_cp), least = exp2_fast(fminf(x, y));
      const float p = exp2_fast(fmaf(t[i], LOG2E, to_p));
      acceptance += least;
      below += x < y ? least : 0.f;
      mass += p;
      expected = fmaf(p, q[i], expected);
    }
  }
  expected = block_sum(expected);
  mass = block_sum(mass);
  acceptance = block_sum(acceptance);
  below = block_sum(below);
  if (threadIdx.x != 0) return;
  float* out = a.parts + 4 * r;
  out[0] = expected, out[1] = mass, out[2] = acceptance, out[3] = below;
}

#define ARGUMENTS                                                                                                   \
  bf16 *logits, const bf16 *teacher, float *parts, const float *top, const float *sum, const float *whole_lse,      \
      const u32 *teacher_row, int first_teacher, int rows, int vocab, i64 ld, i64 ld_teacher
#define TARGET {logits, teacher, parts, top, sum, whole_lse, teacher_row, first_teacher, rows, vocab, ld, ld_teacher}

// parts [rows, 4]. A block per row: grid rows; block 512; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(512) shared_parts(ARGUMENTS) {
  const SharedTarget a = TARGET;
  if (a.wide()) parts_of_row<8>(a);
  else parts_of_row<1>(a);
}

// The gradient of the objective in place of this rank's logits.
template <int V>
__device__ __forceinline__ void gradient_of_row(const SharedTarget& a, float ce_weight, float weight) {
  const int r = blockIdx.x;
  bf16* z = a.logits + r * a.ld;
  const bf16* teacher = a.teacher + a.local() * a.ld_teacher;
  const float to_q = a.to_q(), to_p = a.to_p(), to_cp = a.to_cp(), below = a.parts[4 * r + 3];
  const float on_below = ce_weight + weight * (1.f - below), on_rest = ce_weight - weight * below;
  for (int c = threadIdx.x * V; c < a.vocab; c += blockDim.x * V) {
    float q[V], t[V];
    load(z + c, q);
    load(teacher + c, t);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float x = fmaf(q[i], LOG2E, to_q), y = fmaf(t[i], LOG2E, to_cp);
      const float p = exp2_fast(fmaf(t[i], LOG2E, to_p));
      q[i] = fmaf(exp2_fast(x), x < y ? on_below : on_rest, -ce_weight * p);
    }
    store(z + c, q);
  }
}

// Figures of each row from the sums of all ranks, and with write_gradient the gradient in place of the logits.
// A block per row: grid rows; block 512; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(512)
    shared_gradient(ARGUMENTS, float* ce, float* acceptance, u32* argmax, const u32* place, const float* ce_weight,
                    const float* acceptance_weight, int log_acceptance, int last, int write_gradient) {
  const SharedTarget a = TARGET;
  const int r = blockIdx.x;
  const float expected = parts[4 * r], mass = parts[4 * r + 1], accepted = parts[4 * r + 2];
  if (threadIdx.x == 0) {
    ce[r] = top[r] + logf(sum[r]) - expected / mass;
    acceptance[r] = accepted;
    argmax[r] = (u32)last - place[r];
  }
  if (!write_gradient) return;
  float weight = acceptance_weight[r];
  if (log_acceptance) weight = of_logarithm(weight, accepted);
  if (a.wide()) gradient_of_row<8>(a, ce_weight[r], weight);
  else gradient_of_row<1>(a, ce_weight[r], weight);
}
