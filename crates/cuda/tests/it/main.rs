//! The CUDA layer on a machine with a device: memory, copies, kernels and matrix products; and the compiler without
//! one. Where there is no device (or no NVRTC), each test says that it was skipped.

#[cfg(test)]
mod compiler;
#[cfg(test)]
mod gemm;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod support;
