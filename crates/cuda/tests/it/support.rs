//! The device, and kernels to run on it.

use specforge_cuda::{Gpu, Unit};

/// The first CUDA device, if this machine has one.
pub(crate) fn gpu() -> Option<&'static Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

/// `y[i] = a x[i] + b` and what came of every other kind of argument.
pub(crate) const KERNELS: Unit = Unit {
    name: "test",
    source: r#"
#include "part.cuh"
struct Pair { int first; double second; };
extern "C" __global__ void line(float* y, const float* x, long long n, float a, double b) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + (float)b;
}
extern "C" __global__ void arguments(double* out, int i, unsigned u, long long l, float f, double d, int flag, Pair p) {
  double all[] = {(double)i, (double)u, (double)l, (double)f, d, (double)flag, (double)p.first, p.second, NUMBER, part()};
  for (int k = 0; k < 10; k++) out[k] = all[k];
}
extern "C" __global__ void reversed(int* y, const int* x, int n) {
  extern __shared__ int held[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = held[n - 1 - i];
}
"#,
    headers: &[("part.cuh", "__device__ inline double part() { return 0.25; }")],
};
