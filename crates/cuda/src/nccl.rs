//! NCCL, found at run time like CUDA's other libraries: ranks that each have a device. Every call is asked for on the
//! compute stream of the rank's device, in the order of the calls.
//!
//! The functions are looked up here: the bindings' own loader knows no `libnccl.so.2`, which is the only name that
//! NVIDIA's packages have. What is used has had the same form since NCCL 2.18.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::os::unix::Library as Handle;

use crate::libraries::nccl_library;
use crate::{Error, Gpu, Result};

/// What rank 0 makes and all ranks of a communicator need; 128 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

type Comm = *mut c_void;
type Stream = *mut c_void;
type Status = c_int;

/// Element types, by NCCL's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A byte, for calls that only move.
    U8 = 1,
    /// 32-bit unsigned.
    U32 = 3,
    /// float32.
    F32 = 7,
    /// float64.
    F64 = 8,
    /// bfloat16.
    Bf16 = 9,
}

/// Reductions, by NCCL's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Sum.
    Sum = 0,
    /// Maximum.
    Max = 2,
}

/// The functions of the library.
struct Functions {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> Status,
    split: unsafe extern "C" fn(Comm, c_int, c_int, *mut Comm, *mut c_void) -> Status,
    abort: unsafe extern "C" fn(Comm) -> Status,
    async_error: unsafe extern "C" fn(Comm, *mut Status) -> Status,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    reduce_scatter:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> Status,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Stream) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    text: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
}

impl Functions {
    fn load() -> Result<Self> {
        let library = nccl_library();
        library.require()?;
        let missing = |why: String| Error::Library { library: "nccl", why, remedy: library.remedy };
        // SAFETY: the library is loaded already; this is another handle to it.
        let handle = unsafe { Handle::new(library.path.clone().unwrap_or_default()) };
        let handle = handle.map_err(|e| missing(e.to_string()))?;
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the types above are those of nccl.h.
                let found = unsafe { handle.get(concat!($name, "\0").as_bytes()) };
                *found.map_err(|_| missing(format!("it has no {}: 2.18 or newer is needed", $name)))?
            }};
        }
        let functions = Self {
            unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRank"),
            split: function!("ncclCommSplit"),
            abort: function!("ncclCommAbort"),
            async_error: function!("ncclCommGetAsyncError"),
            all_reduce: function!("ncclAllReduce"),
            reduce_scatter: function!("ncclReduceScatter"),
            all_gather: function!("ncclAllGather"),
            broadcast: function!("ncclBroadcast"),
            send: function!("ncclSend"),
            receive: function!("ncclRecv"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            text: function!("ncclGetErrorString"),
            last_error: function!("ncclGetLastError"),
        };
        // For the rest of the process.
        std::mem::forget(handle);
        Ok(functions)
    }

    fn words(&self, status: Status, comm: Comm) -> String {
        // SAFETY: both give text that lives as long as the library; a null communicator is allowed.
        let [text, last] = unsafe { [(self.text)(status), (self.last_error)(comm)] };
        let text = [text, last].into_iter().filter(|text| !text.is_null()).map(|text| {
            // SAFETY: see above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
        });
        text.filter(|text| !text.is_empty()).collect::<Vec<_>>().join(": ")
    }
}

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions>> = OnceLock::new();
    LOADED.get_or_init(Functions::load).as_ref().map_err(Clone::clone)
}

/// One rank of a communicator.
#[derive(Debug)]
pub struct Communicator {
    gpu: &'static Gpu,
    comm: Comm,
}

// SAFETY: NCCL allows any thread to use a communicator, one at a time per communicator; ranks call from one thread, and
// `abort` and `asynchronous_error` are made for others.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

/// What rank 0 makes for a new communicator and gives to all others.
pub fn unique_id() -> Result<[u8; 128]> {
    let functions = functions()?;
    let mut id = UniqueId([0; 128]);
    // SAFETY: writes 128 bytes.
    let status = unsafe { (functions.unique_id)(&raw mut id) };
    check(functions, "ncclGetUniqueId", status, std::ptr::null_mut())?;
    Ok(id.0.map(|c| c as u8))
}

fn check(functions: &Functions, call: &'static str, status: Status, comm: Comm) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::Nccl { call, why: functions.words(status, comm) }) }
}

impl Communicator {
    /// Joins the ranks that have the same id; waits for all of them.
    pub fn join(gpu: &'static Gpu, id: &[u8; 128], (rank, size): (usize, usize)) -> Result<Self> {
        gpu.bind()?;
        let (functions, mut comm) = (functions()?, std::ptr::null_mut());
        // SAFETY: the device is current; the id is one of NCCL's.
        let status = unsafe {
            (functions.init)(&raw mut comm, size as c_int, UniqueId(id.map(|b| b as c_char)), rank as c_int)
        };
        check(functions, "ncclCommInitRank", status, std::ptr::null_mut())?;
        Ok(Self { gpu, comm })
    }

    /// Those that give the same colour, ordered by `key`; all ranks call this.
    pub fn split(&self, colour: usize, key: usize) -> Result<Self> {
        self.gpu.bind()?;
        let (functions, mut comm) = (functions()?, std::ptr::null_mut());
        // SAFETY: the communicator is valid; no configuration means its own.
        let status = unsafe {
            (functions.split)(self.comm, colour as c_int, key as c_int, &raw mut comm, std::ptr::null_mut())
        };
        check(functions, "ncclCommSplit", status, self.comm)?;
        Ok(Self { gpu: self.gpu, comm })
    }

    /// The device.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    fn call(&self, call: &'static str, f: impl FnOnce(&Functions, Comm, Stream) -> Status) -> Result<()> {
        self.gpu.bind()?;
        let functions = functions()?;
        check(functions, call, f(functions, self.comm, self.gpu.stream().cast()), self.comm)
    }

    /// `to = all ranks' from`, combined; addresses may be equal.
    pub fn all_reduce(&self, from: u64, to: u64, n: usize, element: Element, how: Reduction) -> Result<()> {
        // SAFETY: callers name memory that they hold until the stream has passed the call; so below.
        self.call("ncclAllReduce", |f, comm, stream| unsafe {
            (f.all_reduce)(
                from as *const c_void,
                to as *mut c_void,
                n,
                element as c_int,
                how as c_int,
                comm,
                stream,
            )
        })
    }

    /// `to[n]` = this rank's piece of the sum of all ranks' `from[size n]`.
    pub fn reduce_scatter(&self, from: u64, to: u64, n: usize, element: Element) -> Result<()> {
        // SAFETY: see `all_reduce`.
        self.call("ncclReduceScatter", |f, comm, stream| unsafe {
            let sum = Reduction::Sum as c_int;
            (f.reduce_scatter)(
                from as *const c_void,
                to as *mut c_void,
                n,
                element as c_int,
                sum,
                comm,
                stream,
            )
        })
    }

    /// `to[size n]` = all ranks' `from[n]`, in bytes.
    pub fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: see `all_reduce`.
        self.call("ncclAllGather", |f, comm, stream| unsafe {
            (f.all_gather)(
                from as *const c_void,
                to as *mut c_void,
                bytes,
                Element::U8 as c_int,
                comm,
                stream,
            )
        })
    }

    /// Everyone's bytes become those of `root`.
    pub fn broadcast(&self, at: u64, bytes: usize, root: usize) -> Result<()> {
        // SAFETY: see `all_reduce`.
        self.call("ncclBroadcast", |f, comm, stream| unsafe {
            let (element, root) = (Element::U8 as c_int, root as c_int);
            (f.broadcast)(at as *const c_void, at as *mut c_void, bytes, element, root, comm, stream)
        })
    }

    /// Sends and receives at once: (address, bytes, other rank) each.
    pub fn exchange(&self, sends: &[(u64, usize, usize)], receives: &[(u64, usize, usize)]) -> Result<()> {
        // SAFETY: changes the state of this thread alone.
        self.call("ncclGroupStart", |f, _, _| unsafe { (f.group_start)() })?;
        let element = Element::U8 as c_int;
        let mut asked = Ok(());
        for &(from, bytes, to) in sends {
            // SAFETY: see `all_reduce`.
            let sent = self.call("ncclSend", |f, comm, stream| unsafe {
                (f.send)(from as *const c_void, bytes, element, to as c_int, comm, stream)
            });
            asked = asked.and(sent);
        }
        for &(to, bytes, from) in receives {
            // SAFETY: see `all_reduce`.
            let received = self.call("ncclRecv", |f, comm, stream| unsafe {
                (f.receive)(to as *mut c_void, bytes, element, from as c_int, comm, stream)
            });
            asked = asked.and(received);
        }
        // SAFETY: see above.
        asked.and(self.call("ncclGroupEnd", |f, _, _| unsafe { (f.group_end)() }))
    }

    /// What went wrong on the network or on another rank since, if anything.
    pub fn asynchronous_error(&self) -> Option<String> {
        let functions = functions().ok()?;
        let mut status = 0;
        // SAFETY: the communicator is valid, and this call may come from any thread.
        let asked = unsafe { (functions.async_error)(self.comm, &raw mut status) };
        // 7: still in progress.
        let failed = [asked, status].into_iter().find(|status| *status != 0 && *status != 7)?;
        Some(functions.words(failed, self.comm))
    }

    /// Ends what is going on, so that nobody waits for it; the communicator is of no use any more.
    pub fn abort(&self) {
        if let Ok(functions) = functions() {
            // SAFETY: the communicator is valid; nothing is asked of it afterwards, since the process ends.
            unsafe { (functions.abort)(self.comm) };
        }
    }
}
