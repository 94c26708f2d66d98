// Statistics of logits over a vocabulary, and the soft-target loss with its gradient in place of the logits.
//
// Exponentials are powers of two of prescaled arguments. A thread only ever reads back what it has itself stored (how
// elements are dealt out is in row_stats.cuh), so that the passes over a row need no barrier but those of their sums.
#include "row_stats.cuh"
#include "tensor_core.cuh"

template <class T>
__device__ __forceinline__ void vocab_stats(float* top, u32* argmax, float* sum, const T* logits, int n, i64 ld, int first,
                                            bool begin) {
  const int r = blockIdx.x;
  const Row row = row_stats_any(logits + r * ld, n, ld);
  if (threadIdx.x != 0) return;
  float best = begin ? -INF : top[r], total = begin ? 0.f : sum[r];
  u32 at = begin ? 0 : argmax[r];
  const bool any = row.top > LOWEST;
  if (any && row.top > best) {
    total = total * exp2_fast((best - row.top) * LOG2E) + row.sum;
    best = row.top;
    at = first + row.argmax;
  } else if (any) {
    total += row.sum * exp2_fast((row.top - best) * LOG2E);
  } else {
    total += row.sum;  // zero, or NaN
  }
  top[r] = best;
  argmax[r] = at;
  sum[r] = total;
}

// Takes a block of columns, the first of which is column `first` of the vocabulary, into the running statistics of each
// row: top, argmax (the first of equals) and sum of e^(logit - top); begin = 1 starts anew. Blocks of columns come in
// ascending order.
// A block per row: grid rows; block any power of two up to 1024 that follows from n (256 for n <= 16384, else 1024); no
// dynamic shared memory.
extern "C" __global__ void __launch_bounds__(1024)
    vocab_stats_f(float* top, u32* argmax, float* sum, const float* logits, int rows, int n, i64 ld, int first,
                  int begin) {
  vocab_stats(top, argmax, sum, logits, n, ld, first, begin);
}
extern "C" __global__ void __launch_bounds__(1024)
    vocab_stats_b(float* top, u32* argmax, float* sum, const bf16* logits, int rows, int n, i64 ld, int first,
                  int begin) {
  vocab_stats(top, argmax, sum, logits, n, ld, first, begin);
}

// lse = top + ln(sum). Block 256; grid ceil(rows / 256); no dynamic shared memory.
extern "C" __global__ void vocab_stats_finish(float* lse, const float* top, const float* sum, int rows) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r < rows) lse[r] = top[r] + logf(sum[r]);
}

// Log-sum-exp of every row. Grid and block as for vocab_stats.
extern "C" __global__ void __launch_bounds__(1024) row_lse_b(float* lse, const bf16* logits, int rows, int n, i64 ld) {
  const Row row = row_stats_any(logits + blockIdx.x * ld, n, ld);
  if (threadIdx.x == 0) lse[blockIdx.x] = row.top + logf(row.sum);
}

struct SoftTarget {
  bf16* logits;
  float *ce, *acceptance;
  u32* argmax;
  const bf16* teacher;
  const float *teacher_lse, *whole_lse;
  const u32* teacher_row;
  const float *ce_weight, *acceptance_weight;
  int first_teacher, log_acceptance, vocab;
  i64 ld, ld_teacher;
  int write_gradient;
};

// Waits for all of this thread's groups of copies but the newest PENDING.
template <int PENDING>
__device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// The first pass: the row's statistics, and the row into `held` unless it stays where it is. All of a thread's part of
// the row is under way at once.
template <int V, bool HELD>
__device__ __forceinline__ Row first_pass(const bf16* z, bf16* held, int n) {
  if (!HELD) return row_stats<V>(z, n);
  const int first = threadIdx.x * V, step = blockDim.x * V;
  Seen s = {LOWEST, 0.f, -1};
  if (V == 8) {
    for (int c = first; c < n; c += step) {
      copy_async(shared_address(held + c), z + c, true);
      copy_commit();
    }
  }
  for (int c = first; c < n; c += step) {
    float v[V];
    if (V == 8) {
      if (n - c > 4 * step) wait_async<4>();
      else wait_async<0>();
    } else {
      held[c] = z[c];
    }
    load(held + c, v);
    take(s, v, c);
  }
  return over_block<V>(s, held);
}

// Semantics of row_loss in cpu/loss.rs. In powers of two, a draft probability is q = 2^(z log2e + to_q), the teacher's
// over the draft vocabulary p = 2^(t log2e + to_p), over its whole vocabulary c p = 2^(t log2e + to_cp). What is below
// what is decided by the exponents, in both passes alike.
template <int V, bool HELD>
__device__ __forceinline__ void soft_target_row(const SoftTarget& a, bf16* shared) {
  const int r = blockIdx.x, n = a.vocab, first = threadIdx.x * V, step = blockDim.x * V;
  bf16* z = a.logits + r * a.ld;
  bf16* held = HELD ? shared : z;
  const u32 row = a.teacher_row[r], local = row - a.first_teacher;
  const bf16* teacher = a.teacher + local * a.ld_teacher;
  const float pruned_lse = a.teacher_lse[local], whole_lse = a.whole_lse[row];
  const Row stats = first_pass<V, HELD>(z, held, n);
  const float to_q = -fmaf(stats.top, LOG2E, log2f(stats.sum)), to_p = -pruned_lse * LOG2E, to_cp = -whole_lse * LOG2E;
  const float ce_weight = a.write_gradient ? a.ce_weight[r] : 0.f;
  float weight = a.write_gradient ? a.acceptance_weight[r] : 0.f;
  float acceptance = 0.f, expected = 0.f, mass = 0.f;
  if (weight != 0.f) {  // the gradient of the acceptance needs two sums over the row first
    float below = 0.f;
    for (int c = first; c < n; c += step) {
      float q[V], t[V];
      load(held + c, q);
      load(teacher + c, t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x = fmaf(q[i], LOG2E, to_q), y = fmaf(t[i], LOG2E, to_cp), least = exp2_fast(fminf(x, y));
        acceptance += least;
        below += x < y ? least : 0.f;
      }
    }
    acceptance = block_sum(acceptance);
    below = block_sum(below);
    if (a.log_acceptance) weight = of_logarithm(weight, acceptance);
    const float on_below = ce_weight + weight * (1.f - below), on_rest = ce_weight - weight * below;
    for (int c = first; c < n; c += step) {
      float q[V], t[V];
      load(held + c, q);
      load(teacher + c, t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x = fmaf(q[i], LOG2E, to_q), y = fmaf(t[i], LOG2E, to_cp);
        const float p = exp2_fast(fmaf(t[i], LOG2E, to_p));
        mass += p;
        expected = fmaf(p, q[i], expected);
        q[i] = fmaf(exp2_fast(x), x < y ? on_below : on_rest, -ce_weight * p);
      }
      store(z + c, q);
    }
  } else {
    const float share = exp2_fast((pruned_lse - whole_lse) * LOG2E);
    for (int c = first; c < n; c += step) {
      float q[V], t[V];
      load(held + c, q);
      load(teacher + c, t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float draft = exp2_fast(fmaf(q[i], LOG2E, to_q)), p = exp2_fast(fmaf(t[i], LOG2E, to_p));
        mass += p;
        expected = fmaf(p, q[i], expected);
        acceptance += fminf(share * p, draft);
        q[i] = ce_weight * (draft - p);
      }
      if (a.write_gradient) store(z + c, q);
    }
    acceptance = block_sum(acceptance);
  }
  expected = block_sum(expected);
  mass = block_sum(mass);
  if (threadIdx.x != 0) return;
  // Dividing by the mass, which is one up to the rounding of the log-sum-exp, keeps that rounding out of the figure.
  a.ce[r] = stats.top + logf(stats.sum) - expected / mass;
  a.acceptance[r] = acceptance;
  a.argmax[r] = stats.argmax;
}

template <bool HELD>
__device__ __forceinline__ void soft_target_any(const SoftTarget& a, bf16* shared) {
  const bool wide = (a.vocab | a.ld | a.ld_teacher) % 8 == 0 && aligned(a.logits, a.teacher);
  if (wide) soft_target_row<8, HELD>(a, shared);
  else soft_target_row<1, HELD>(a, shared);
}

#define ARGUMENTS                                                                                             \
  bf16 *logits, float *ce, float *acceptance, u32 *argmax, const bf16 *teacher, const float *teacher_lse,     \
      const float *whole_lse, const u32 *teacher_row, const float *ce_weight, const float *acceptance_weight, \
      int first_teacher, int log_acceptance, int rows, int vocab, i64 ld, i64 ld_teacher, int write_gradient
#define ROW                                                                                                   \
  {logits, ce, acceptance, argmax, teacher, teacher_lse, whole_lse, teacher_row, ce_weight, acceptance_weight, \
   first_teacher, log_acceptance, vocab, ld, ld_teacher, write_gradient}

// Draft row r against teacher row t = teacher_row[r], whose logits are row t - first_teacher of `teacher`, teacher_lse
// their log-sum-exp and whole_lse[t] that over the whole vocabulary. Writes ce, acceptance and argmax; with
// write_gradient the gradient replaces the logits (the weights may be null without). The row waits in shared memory
// between the passes: the logits are read once. Three exponentials an element, four with an acceptance gradient.
// A block per row: grid rows; block 512; dynamic shared memory 2 * vocab rounded up to 16 bytes. (Three blocks
// fit on a multiprocessor with vocab = 32000.)
extern "C" __global__ void __launch_bounds__(512, 3) soft_target(ARGUMENTS) {
  extern __shared__ uint4 dynamic[];
  const SoftTarget a = ROW;
  soft_target_any<true>(a, (bf16*)dynamic);
}

// The same for a vocabulary that exceeds shared memory: the logits are read again by each pass.
// Grid rows; block 512; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(512, 2) soft_target_large(ARGUMENTS) {
  const SoftTarget a = ROW;
  soft_target_any<false>(a, nullptr);
}
