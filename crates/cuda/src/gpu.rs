//! One device: its context, its streams, and what waits for what.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::blas::Blas;
use crate::compiler::{Architecture, Compiler};
use crate::error::{Called, driver_text};
use crate::libraries::{driver_version, libraries};
use crate::memory::Pool;
use crate::pinned::Staging;
use crate::unit::Units;
use crate::{Error, Result};

thread_local! {
    /// Whether this thread's kernels go to the second stream.
    static ON_SIDE: Cell<bool> = const { Cell::new(false) };
    /// While this thread asks the communication stream for work: the end of that work.
    static BESIDE: RefCell<Option<Arc<Event>>> = const { RefCell::new(None) };
}

/// Devices that one process can open.
const MOST: usize = 16;

/// One CUDA device, opened for the rest of the process.
///
/// All work goes to one stream, in the order of the calls; a [`Memory`](crate::Memory) that is dropped is reused by
/// later calls only. So no call has to wait for the device, and none needs a lock. What goes to other streams is put in
/// order here: [`Gpu::side_by_side`], [`Gpu::beside`].
#[derive(Debug)]
pub struct Gpu {
    ordinal: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copies: sys::CUstream,
    side: sys::CUstream,
    communication: sys::CUstream,
    properties: Properties,
    pub(crate) pool: Pool,
    pub(crate) staging: Mutex<Staging>,
    pub(crate) units: Units,
    pub(crate) blas: Mutex<Blas>,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there (`bind`).
unsafe impl Send for Gpu {}
// SAFETY: as above; what is changed by calls is behind locks or atomics.
unsafe impl Sync for Gpu {}

/// What a device is.
#[derive(Debug, Clone, PartialEq)]
pub struct Properties {
    /// The vendor's name for it.
    pub name: String,
    /// Compute capability, for example (9, 0).
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub memory: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may take.
    pub shared_memory: usize,
    /// CUDA version of the driver, 13000 for 13.0.
    pub driver: i32,
}

/// A point in the compute stream, for timing and for waiting.
#[derive(Debug)]
pub struct Event {
    handle: sys::CUevent,
}

// SAFETY: an event may be recorded and waited for from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Gpu {
    /// The device of this number. The first call opens it; an error is the same for every later call.
    pub fn open(ordinal: usize) -> Result<&'static Self> {
        static OPENED: [OnceLock<Result<Gpu>>; MOST] = [const { OnceLock::new() }; MOST];
        let Some(slot) = OPENED.get(ordinal) else {
            return Err(Error::NoDevice { ordinal, why: format!("devices are numbered 0 to {}", MOST - 1) });
        };
        slot.get_or_init(|| Self::new(ordinal)).as_ref().map_err(Clone::clone)
    }

    /// How many devices the driver sees.
    pub fn count() -> Result<usize> {
        libraries()[0].require()?;
        let none = |e: DriverError| Error::NoDevice { ordinal: 0, why: driver_text(e) };
        result::init().map_err(none)?;
        Ok(result::device::get_count().map_err(none)? as usize)
    }

    fn new(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, why: format!("it has {count}") });
        }
        let driver = driver_version().unwrap_or_default();
        if driver < 12_000 {
            return Err(Error::TooOld {
                what: "the driver".to_owned(),
                got: format!("for CUDA {}.{}", driver / 1000, driver % 1000 / 10),
                needed: "CUDA 12.0",
                remedy: "update NVIDIA's driver to 525 or newer",
            });
        }
        libraries()[1..].iter().try_for_each(crate::Library::require)?;
        let device = result::device::get(ordinal as i32).called("cuDeviceGet")?;
        let properties = Properties::of(device, driver)?;
        if properties.capability < (8, 0) {
            return Err(Error::TooOld {
                what: format!("{}'s compute capability", properties.name),
                got: format!("{}.{}", properties.capability.0, properties.capability.1),
                needed: "8.0 (Ampere)",
                remedy: "use a newer card, or device = \"cpu\"",
            });
        }
        // SAFETY: the device is valid; its primary context is kept for the rest of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.called("cuDevicePrimaryCtxRetain")?;
        // SAFETY: the context was just made.
        unsafe { result::ctx::set_current(context) }.called("cuCtxSetCurrent")?;
        let new_stream =
            || result::stream::create(result::stream::StreamKind::NonBlocking).called("cuStreamCreate");
        let (stream, copies, side, communication) =
            (new_stream()?, new_stream()?, new_stream()?, new_stream()?);
        let architecture = Architecture::of(properties.capability);
        let pool = Pool::new(device, properties.memory)?;
        let blas = Blas::new(&pool, stream)?;
        let units = Units::new(Compiler::new()?, architecture);
        let (staging, blas) = (Mutex::new(Staging::default()), Mutex::new(blas));
        Ok(Self {
            ordinal,
            context,
            stream,
            copies,
            side,
            communication,
            properties,
            pool,
            staging,
            units,
            blas,
        })
    }

    /// The device's number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// The architecture that kernels are compiled for.
    pub fn architecture(&self) -> &Architecture {
        self.units.architecture()
    }

    /// Makes the device current on the calling thread; every call that reaches the driver does this first.
    pub(crate) fn bind(&self) -> Result<()> {
        thread_local!(static CURRENT: Cell<usize> = const { Cell::new(usize::MAX) });
        if CURRENT.get() != self.ordinal {
            // SAFETY: the context lives as long as the process.
            unsafe { result::ctx::set_current(self.context) }.called("cuCtxSetCurrent")?;
            CURRENT.set(self.ordinal);
        }
        Ok(())
    }

    /// The stream that this thread's calls go to.
    pub(crate) fn stream(&self) -> sys::CUstream {
        if end_of_beside().is_some() { self.communication } else { self.stream }
    }

    /// The communication stream, or the compute stream.
    pub(crate) fn one_of_two(&self, is_beside: bool) -> sys::CUstream {
        if is_beside { self.communication } else { self.stream }
    }

    pub(crate) fn copies(&self) -> sys::CUstream {
        self.copies
    }

    /// Asks for two pieces of work that may run at the same time; what is asked for later waits for both. `second` may
    /// only launch kernels.
    pub fn side_by_side<E: From<Error>>(
        &self,
        first: impl FnOnce() -> Result<(), E>,
        second: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        self.bind()?;
        Self::order(self.stream, self.side)?;
        first()?;
        ON_SIDE.set(true);
        let done = second();
        ON_SIDE.set(false);
        Self::order(self.side, self.stream)?;
        done
    }

    /// Asks the communication stream for what `f` asks for: after everything that was asked for so far, and beside what
    /// is asked for next. Memory that `f` takes the address of is waited for where its address is taken next, see
    /// [`Memory::address`](crate::Memory::address). Matrix products are not for `f`: they stay on the compute stream.
    pub fn beside<T, E: From<Error>>(&self, f: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.bind()?;
        Self::order(self.stream, self.communication)?;
        let end = Arc::new(Event::new()?);
        let outer = BESIDE.replace(Some(end.clone()));
        assert!(outer.is_none(), "work beside the compute stream has begun already");
        let done = f();
        BESIDE.set(None);
        end.record(self.communication)?;
        done
    }

    /// Lets what is asked for next on the compute stream, and beside it, wait for an event.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<()> {
        self.bind()?;
        [self.stream, self.side].into_iter().try_for_each(|stream| event.hold(stream))
    }

    /// The stream that kernels are launched on.
    pub(crate) fn launch_stream(&self) -> sys::CUstream {
        if ON_SIDE.get() { self.side } else { self.stream() }
    }

    /// Waits until everything asked for so far is done.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        [self.stream, self.communication].into_iter().try_for_each(|stream| {
            // SAFETY: the streams live as long as the device.
            unsafe { result::stream::synchronize(stream) }.called("cuStreamSynchronize")
        })
    }

    /// Marks this point of the stream that this thread's calls go to.
    pub fn record(&self) -> Result<Event> {
        self.bind()?;
        let event = Event::new()?;
        event.record(self.stream())?;
        Ok(event)
    }

    /// Lets the stream `later` wait for what was asked of `earlier` so far.
    pub(crate) fn order(earlier: sys::CUstream, later: sys::CUstream) -> Result<()> {
        let event = Event::new()?;
        event.record(earlier)?;
        event.hold(later)
    }
}

/// The end of the work beside the compute stream that this thread is asking for, if it is.
pub(crate) fn end_of_beside() -> Option<Arc<Event>> {
    BESIDE.with_borrow(Clone::clone)
}

impl Event {
    pub(crate) fn new() -> Result<Self> {
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).called("cuEventCreate")?;
        Ok(Self { handle })
    }

    pub(crate) fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both handles are valid.
        unsafe { result::event::record(self.handle, stream) }.called("cuEventRecord")
    }

    /// Lets a stream wait for it.
    fn hold(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are valid; the driver keeps the event until it is passed.
        unsafe { result::stream::wait_event(stream, self.handle, flags) }.called("cuStreamWaitEvent")
    }

    /// Whether the stream has passed it.
    pub(crate) fn is_done(&self) -> bool {
        // SAFETY: the handle is valid.
        unsafe { result::event::query(self.handle) }.is_ok()
    }

    /// Whether the stream of a device has passed it, asked from any thread.
    pub fn is_passed(&self, gpu: &Gpu) -> bool {
        gpu.bind().is_ok() && self.is_done()
    }

    /// Waits until the stream has passed it.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the handle is valid.
        unsafe { result::event::synchronize(self.handle) }.called("cuEventSynchronize")
    }

    /// Milliseconds between an earlier event and this one; waits for this one.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f64> {
        self.wait()?;
        // SAFETY: both events were recorded and are passed.
        let ms =
            unsafe { result::event::elapsed(earlier.handle, self.handle) }.called("cuEventElapsedTime")?;
        Ok(f64::from(ms))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is valid and not used again; a failure here has nobody to go to.
        let _ = unsafe { result::event::destroy(self.handle) };
    }
}

impl Properties {
    fn of(device: sys::CUdevice, driver: i32) -> Result<Self> {
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |which| {
            // SAFETY: the device is valid.
            unsafe { result::device::get_attribute(device, which) }.called("cuDeviceGetAttribute")
        };
        // SAFETY: the device is valid.
        let memory = unsafe { result::device::total_mem(device) }.called("cuDeviceTotalMem")?;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            name: result::device::get_name(device).called("cuDeviceGetName")?,
            capability: (major as u32, minor as u32),
            memory,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_memory: shared as usize,
            driver,
        })
    }
}
