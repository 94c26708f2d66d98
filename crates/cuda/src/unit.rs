//! Kernel sources, loaded at first use, and their launch.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::Mutex;

use cudarc::driver::{result, sys};

use crate::compiler::{Architecture, Compiler};
use crate::error::Called;
use crate::{Gpu, Result};

/// One kernel source with the headers it includes.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// A name for messages and cache files.
    pub name: &'static str,
    /// CUDA C++ without any header of CUDA.
    pub source: &'static str,
    /// Names and texts of the headers it includes.
    pub headers: &'static [(&'static str, &'static str)],
}

/// Macros that a source is compiled with; each combination is a module of its own.
pub type Defines = &'static [(&'static str, u32)];

/// Which kernel to run on how many threads.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The source.
    pub unit: &'a Unit,
    /// Its macros.
    pub defines: Defines,
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A number or an address, in the low bytes.
    Word(u64),
    /// A structure passed by value.
    Bytes(&'a [u8]),
}

macro_rules! word {
    ($($type:ty => $bits:expr),* $(,)?) => {
        $(impl From<$type> for Arg<'_> {
            fn from(value: $type) -> Self {
                let bits: fn($type) -> u64 = $bits;
                Arg::Word(bits(value))
            }
        })*
    };
}

word! {
    u64 => |v| v,
    u32 => u64::from,
    i32 => |v| u64::from(v as u32),
    i64 => |v| v as u64,
    f32 => |v| u64::from(v.to_bits()),
    f64 => f64::to_bits,
    bool => u64::from,
}

/// Loaded kernels.
#[derive(Debug)]
pub(crate) struct Units {
    compiler: Compiler,
    architecture: Architecture,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: BTreeMap<(&'static str, Defines), Handle<sys::CUmodule>>,
    functions: BTreeMap<(&'static str, &'static str, Defines), Function>,
}

/// A handle of the driver's, valid on every thread.
#[derive(Debug, Clone, Copy)]
struct Handle<T>(T);

// SAFETY: modules and functions may be used from any thread.
unsafe impl<T> Send for Handle<T> {}

#[derive(Debug, Clone, Copy)]
struct Function {
    handle: Handle<sys::CUfunction>,
    /// Dynamic shared memory it may use so far.
    shared: usize,
}

/// What a kernel may use without being asked.
const FREE_SHARED: usize = 48 << 10;

impl Units {
    pub(crate) fn new(compiler: Compiler, architecture: Architecture) -> Self {
        Self { compiler, architecture, loaded: Mutex::default() }
    }

    pub(crate) fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn module(&self, loaded: &mut Loaded, unit: &Unit, defines: Defines) -> Result<sys::CUmodule> {
        if let Some(module) = loaded.modules.get(&(unit.name, defines)) {
            return Ok(module.0);
        }
        let cubin = self.compiler.cubin(unit, defines, &self.architecture)?;
        // SAFETY: the image is machine code that NVRTC made, read whole.
        let module =
            unsafe { result::module::load_data(cubin.as_ptr().cast()) }.called("cuModuleLoadData")?;
        loaded.modules.insert((unit.name, defines), Handle(module));
        Ok(module)
    }

    fn function(&self, launch: &Launch<'_>) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded.lock().expect("loading a kernel does not panic");
        let key = (launch.unit.name, launch.kernel, launch.defines);
        let function = if let Some(function) = loaded.functions.get(&key) {
            *function
        } else {
            let module = self.module(&mut loaded, launch.unit, launch.defines)?;
            let name = CString::new(launch.kernel).expect("kernel names have no zero bytes");
            // SAFETY: the module is loaded for the rest of the process.
            let handle =
                unsafe { result::module::get_function(module, name) }.called("cuModuleGetFunction")?;
            let function = Function { handle: Handle(handle), shared: FREE_SHARED };
            loaded.functions.insert(key, function);
            function
        };
        if launch.shared > function.shared {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe {
                result::function::set_function_attribute(function.handle.0, most, launch.shared as i32)
            }
            .called("cuFuncSetAttribute")?;
            loaded.functions.insert(key, Function { shared: launch.shared, ..function });
        }
        Ok(function.handle.0)
    }
}

impl Gpu {
    /// Compiles and loads a source without running it.
    pub fn load(&self, unit: &Unit, defines: Defines) -> Result<()> {
        self.bind()?;
        let mut loaded = self.units.loaded.lock().expect("loading a kernel does not panic");
        self.units.module(&mut loaded, unit, defines).map(|_| ())
    }

    /// Runs a kernel after everything asked for before. Its arguments have to be those the source declares; an empty
    /// grid does nothing.
    pub fn launch(&self, launch: &Launch<'_>, args: &[Arg<'_>]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let function = self.units.function(launch)?;
        let pointer = |arg: &Arg<'_>| match arg {
            Arg::Word(word) => std::ptr::from_ref(word).cast_mut().cast::<c_void>(),
            Arg::Bytes(bytes) => bytes.as_ptr().cast_mut().cast(),
        };
        let mut pointers: Vec<*mut c_void> = args.iter().map(pointer).collect();
        let grid = launch.grid.map(|n| n as u32);
        let (grid, block) = ((grid[0], grid[1], grid[2]), (launch.block as u32, 1, 1));
        // SAFETY: the arguments are read before the call returns; the kernels of this workspace stay within the
        // memory that their callers hold, which tests check against the CPU's results.
        unsafe {
            result::launch_kernel(
                function,
                grid,
                block,
                launch.shared as u32,
                self.launch_stream(),
                &mut pointers,
            )
        }
        .called(launch.kernel)
    }
}
