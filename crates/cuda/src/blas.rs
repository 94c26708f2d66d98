//! Matrix products by cuBLASLt: float32 accumulation, the library's first choice of algorithm for a shape, kept.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::size_of_val;

use cudarc::cublaslt::{result, sys};
use cudarc::driver;

use crate::error::Called;
use crate::libraries::libraries;
use crate::memory::Pool;
use crate::{Error, Gpu, Result};

use sys::cublasLtMatmulDescAttributes_t as Desc;
use sys::cublasLtMatmulPreferenceAttributes_t as Preference;

/// Scratch memory for algorithms that split a product.
const WORKSPACE: usize = 64 << 20;
/// Algorithms are chosen for row counts rounded up to this: packed rows differ at every step.
const ROWS: usize = 128;

/// Element types of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GemmType {
    /// bfloat16.
    Bf16,
    /// 8-bit float, four bits of exponent; inputs only.
    E4m3,
    /// float32; outputs only.
    F32,
}

/// A matrix in row-major storage.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    /// Its first element.
    pub address: u64,
    /// Elements from one stored row to the next.
    pub ld: usize,
    /// Whether the product reads it transposed.
    pub transposed: bool,
}

/// `D[m, n] = A[m, k] · B[k, n] (+ beta · C) (+ bias)`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// The length that is summed over.
    pub k: usize,
    /// The left matrix; stored `[k, m]` where it is read transposed.
    pub a: Operand,
    /// The right matrix; stored `[n, k]` where it is read transposed.
    pub b: Operand,
    /// Element type of A and B.
    pub input: GemmType,
    /// The result.
    pub d: Operand,
    /// Element type of the result and of C.
    pub output: GemmType,
    /// What is added: a matrix of D's type, which may be D itself.
    pub c: Option<Operand>,
    /// Added to every row, bf16 `[n]`.
    pub bias: Option<u64>,
    /// Factors of A's rows and B's columns, float32 `[m]` and `[n]`; for 8-bit inputs.
    pub scales: Option<[u64; 2]>,
}

/// The version of cuBLASLt, for example (13, 1); `None` where it is missing.
pub fn blas_version() -> Option<(usize, usize)> {
    libraries()[2].require().ok()?;
    // SAFETY: the library is loaded; the call takes nothing and gives a number.
    let version = unsafe { sys::cublasLtGetVersion() };
    Some((version / 10_000, version / 100 % 100))
}

/// What the choice of an algorithm depends on.
type Key = (usize, usize, usize, [bool; 4], [GemmType; 2], [usize; 4], [u32; 4]);

#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    stream: driver::sys::CUstream,
    algorithms: BTreeMap<Key, Option<Algorithm>>,
    /// The products run since recording began; `None` while nothing is recorded.
    recorded: Option<Vec<Gemm>>,
}

#[derive(Debug, Clone, Copy)]
struct Algorithm(sys::cublasLtMatmulAlgo_t);

// SAFETY: the handle may be used from any thread, one at a time: it is behind a lock.
unsafe impl Send for Blas {}

impl Blas {
    pub(crate) fn new(pool: &Pool, stream: driver::sys::CUstream) -> Result<Self> {
        let handle = result::create_handle().called("cublasLtCreate")?;
        let workspace = pool.take(WORKSPACE, stream)?;
        Ok(Self { handle, workspace, stream, algorithms: BTreeMap::new(), recorded: None })
    }

    fn run(&mut self, gemm: &Gemm) -> Result<bool> {
        // An older library does not know the scales' attributes.
        let problem = match Problem::new(gemm) {
            Err(_) if gemm.scales.is_some() => return Ok(false),
            problem => problem?,
        };
        let key = gemm.key();
        if !self.algorithms.contains_key(&key) {
            // Chosen for the rounded row count, run with the true one: which product came first decides nothing.
            let up = |n: usize| n.next_multiple_of(ROWS);
            let rounded = if gemm.a.transposed {
                Gemm { k: up(gemm.k), ..*gemm }
            } else {
                Gemm { m: up(gemm.m), ..*gemm }
            };
            let chosen = Problem::new(&rounded)?.choose(self.handle, gemm.alignments())?;
            self.algorithms.insert(key, chosen);
        }
        let Some(algorithm) = self.algorithms[&key] else { return Ok(false) };
        let (alpha, beta) = (1f32, if gemm.c.is_some() { 1f32 } else { 0f32 });
        let scalar = |v: &f32| std::ptr::from_ref(v).cast::<c_void>();
        let c = gemm.c.unwrap_or(gemm.d);
        // SAFETY: layouts and description fit the operands, which callers hold; the workspace is used by one product
        // after the other, in the order of the stream.
        let done = unsafe {
            result::matmul(
                self.handle,
                problem.desc,
                scalar(&alpha),
                scalar(&beta),
                gemm.b.address as *const c_void,
                problem.layouts[0],
                gemm.a.address as *const c_void,
                problem.layouts[1],
                c.address as *const c_void,
                problem.layouts[2],
                gemm.d.address as *mut c_void,
                problem.layouts[3],
                &raw const algorithm.0,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.stream.cast(),
            )
        };
        done.map_err(|e| Error::Blas(format!("{e:?} for {gemm:?}")))?;
        if let Some(recorded) = &mut self.recorded {
            recorded.push(*gemm);
        }
        Ok(true)
    }
}

impl Gemm {
    fn key(&self) -> Key {
        let m = if self.a.transposed { self.m } else { self.m.next_multiple_of(ROWS) };
        let flags = [self.a.transposed, self.b.transposed, self.c.is_some(), self.bias.is_some()];
        let ld = [self.a.ld, self.b.ld, self.d.ld, self.c.map_or(0, |c| c.ld)];
        // The summed length of a weight's gradient is the number of rows.
        let k = if self.a.transposed { self.k.next_multiple_of(ROWS) } else { self.k };
        (m, self.n, k, flags, [self.input, self.output], ld, self.alignments())
    }

    /// Bytes that the addresses of A, B, C and D are multiples of, up to 256.
    fn alignments(&self) -> [u32; 4] {
        let of = |address: u64| 1u32 << address.trailing_zeros().min(8);
        [self.a.address, self.b.address, self.c.map_or(0, |c| c.address), self.d.address].map(of)
    }
}

/// A product in the library's terms: everything column-major, so `Dᵀ = Bᵀ Aᵀ`.
struct Problem {
    desc: sys::cublasLtMatmulDesc_t,
    /// Of B, A, C and D.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
}

fn data_type(t: GemmType) -> sys::cudaDataType_t {
    match t {
        GemmType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        GemmType::E4m3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        GemmType::F32 => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Problem {
    fn new(gemm: &Gemm) -> Result<Self> {
        let (m, n, k) = (gemm.m, gemm.n, gemm.k);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, data_type(GemmType::F32))
            .called("cublasLtMatmulDescCreate")?;
        // A row-major [rows, cols] is a column-major cols x rows.
        let stored = |operand: &Operand, rows: usize, cols: usize, t| {
            let (rows, cols) = if operand.transposed { (cols, rows) } else { (rows, cols) };
            result::create_matrix_layout(data_type(t), cols as u64, rows as u64, operand.ld as i64)
                .called("cublasLtMatrixLayoutCreate")
        };
        let c = gemm.c.unwrap_or(gemm.d);
        let layouts = [
            stored(&gemm.b, k, n, gemm.input)?,
            stored(&gemm.a, m, k, gemm.input)?,
            stored(&c, m, n, gemm.output)?,
            stored(&gemm.d, m, n, gemm.output)?,
        ];
        let problem = Self { desc, layouts };
        problem.set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(gemm.b.transposed))?;
        problem.set(Desc::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(gemm.a.transposed))?;
        if let Some(bias) = gemm.bias {
            problem
                .set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            problem.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        if let Some([rows, columns]) = gemm.scales {
            let outer = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            problem.set(Desc::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &outer)?;
            problem.set(Desc::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &outer)?;
            problem.set(Desc::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &columns)?;
            problem.set(Desc::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &rows)?;
        }
        if gemm.input == GemmType::E4m3 {
            // As servers run such products: Hopper's tensor cores then keep partial sums to 2^-13 or so, far below what
            // 8-bit inputs have lost.
            problem.set(Desc::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1i8)?;
        }
        Ok(problem)
    }

    fn set<T>(&self, attribute: Desc, value: &T) -> Result<()> {
        let pointer = std::ptr::from_ref(value).cast();
        // SAFETY: the value has the type that the attribute asks for, and is copied.
        unsafe { result::set_matmul_desc_attribute(self.desc, attribute, pointer, size_of_val(value)) }
            .called("cublasLtMatmulDescSetAttribute")
    }

    /// The library's first choice; `None` where it has no algorithm.
    fn choose(&self, handle: sys::cublasLtHandle_t, alignments: [u32; 4]) -> Result<Option<Algorithm>> {
        let preference = result::create_matmul_pref().called("cublasLtMatmulPreferenceCreate")?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the value has the type that the attribute asks for, and is copied.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, bytes) }
                .called("cublasLtMatmulPreferenceSetAttribute")
        };
        let pointer = |v: &u32| std::ptr::from_ref(v).cast();
        let workspace = WORKSPACE;
        set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
        // Partial sums in float32, added in a fixed order.
        let scheme = 2u32;
        set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, pointer(&scheme), 4)?;
        // The library calls our right matrix A.
        let [a, b, c, d] = alignments;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, pointer(&b), 4)?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, pointer(&a), 4)?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, pointer(&c), 4)?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, pointer(&d), 4)?;
        let [b, a, c, d] = self.layouts;
        // SAFETY: description, layouts and preference are valid.
        let found = unsafe { result::get_matmul_algo_heuristic(handle, self.desc, b, a, c, d, preference) };
        // SAFETY: the preference is not used again.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        Ok(found.ok().map(|found| Algorithm(found.algo)))
    }
}

impl Drop for Problem {
    fn drop(&mut self) {
        for layout in self.layouts {
            // SAFETY: made by `new`, not used again.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: made by `new`, not used again.
        let _ = unsafe { result::destroy_matmul_desc(self.desc) };
    }
}

impl Gpu {
    /// Runs a matrix product; fails where the library has no algorithm for it.
    pub fn gemm(&self, gemm: &Gemm) -> Result<()> {
        if self.try_gemm(gemm)? {
            return Ok(());
        }
        Err(Error::Blas(format!("no algorithm for {gemm:?}")))
    }

    /// As [`Gpu::gemm`]; false where the library has no algorithm, as older ones for some 8-bit products.
    pub fn try_gemm(&self, gemm: &Gemm) -> Result<bool> {
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(true);
        }
        self.bind()?;
        self.blas.lock().expect("no product panics").run(gemm)
    }

    /// Starts (or stops) a list of the products that run from here on, for measuring. Their addresses are those of
    /// memory that may be gone when the list is read.
    pub fn record_gemms(&self, on: bool) {
        self.blas.lock().expect("no product panics").recorded = on.then(Vec::new);
    }

    /// The products run since [`Gpu::record_gemms`] or the last call of this; recording goes on.
    pub fn take_gemms(&self) -> Vec<Gemm> {
        let recorded = &mut self.blas.lock().expect("no product panics").recorded;
        recorded.as_mut().map(std::mem::take).unwrap_or_default()
    }
}
