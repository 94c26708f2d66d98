//! Device memory from the driver's stream-ordered pool. Freed memory stays in the pool, so that a step whose shapes
//! were seen before takes nothing from the system and waits for nothing.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use crate::error::{Called, driver_text};
use crate::gpu::end_of_beside;
use crate::{Error, Event, Gpu, Result};

/// What this process has taken of a device's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// In use.
    pub held: usize,
    /// The most that was in use since the last [`Gpu::reset_peak`].
    pub peak: usize,
    /// Taken from the system, in use or kept for later.
    pub reserved: usize,
}

/// A piece of device memory; it goes back to the pool when the last handle to it is dropped.
#[derive(Debug)]
pub struct Memory {
    gpu: &'static Gpu,
    address: u64,
    bytes: usize,
    /// Where the communication stream is done with it, if that used it last ([`Gpu::beside`]).
    beside: Mutex<Option<Arc<Event>>>,
}

#[derive(Debug)]
pub(crate) struct Pool {
    handle: sys::CUmemoryPool,
    total: usize,
    held: AtomicUsize,
    peak: AtomicUsize,
}

impl Pool {
    pub(crate) fn new(device: sys::CUdevice, total: usize) -> Result<Self> {
        // SAFETY: the device is valid.
        let handle =
            unsafe { result::device::get_default_mem_pool(device) }.called("cuDeviceGetDefaultMemPool")?;
        let mut keep = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        unsafe { result::mem_pool::set_attribute(handle, attribute, (&raw mut keep).cast()) }
            .called("cuMemPoolSetAttribute")?;
        Ok(Self { handle, total, held: AtomicUsize::new(0), peak: AtomicUsize::new(0) })
    }

    /// Memory for the use of `stream` and of streams ordered after it.
    pub(crate) fn take(&self, bytes: usize, stream: sys::CUstream) -> Result<u64> {
        // SAFETY: the stream is valid; zero bytes are refused by the driver, so none asks for them.
        match unsafe { result::malloc_async(stream, bytes.max(1)) } {
            Ok(address) => {
                let held = self.held.fetch_add(bytes, Relaxed) + bytes;
                self.peak.fetch_max(held, Relaxed);
                Ok(address)
            }
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let (held, peak) = (self.held.load(Relaxed), self.peak.load(Relaxed));
                let kept = self.reserved().saturating_sub(held);
                Err(Error::OutOfMemory { asked: bytes, free: free + kept, total: self.total, held, peak })
            }
            Err(e) => Err(Error::Driver { call: "cuMemAllocAsync", why: driver_text(e) }),
        }
    }

    fn reserved(&self) -> usize {
        let mut bytes = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        // SAFETY: this attribute is a 64-bit number.
        let read =
            unsafe { result::mem_pool::get_attribute(self.handle, attribute, (&raw mut bytes).cast()) };
        read.map_or(0, |()| bytes as usize)
    }
}

impl Gpu {
    /// Uninitialised memory, for use on the compute stream.
    pub fn alloc(&'static self, bytes: usize) -> Result<Arc<Memory>> {
        self.alloc_on(bytes, self.stream())
    }

    /// Zeroed memory.
    pub fn alloc_zeroed(&'static self, bytes: usize) -> Result<Arc<Memory>> {
        let memory = self.alloc(bytes)?;
        self.fill_zero(memory.address, bytes)?;
        Ok(memory)
    }

    pub(crate) fn alloc_on(&'static self, bytes: usize, stream: sys::CUstream) -> Result<Arc<Memory>> {
        self.bind()?;
        let address = self.pool.take(bytes, stream)?;
        Ok(Arc::new(Memory { gpu: self, address, bytes, beside: Mutex::new(end_of_beside()) }))
    }

    /// Writes zeros.
    pub fn fill_zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers name memory that they hold.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream()) }.called("cuMemsetD8Async")
    }

    /// Copies within the device.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers name memory that they hold.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream()) }.called("cuMemcpyDtoDAsync")
    }

    /// What is in use now, and what was at most.
    pub fn usage(&self) -> Usage {
        let (held, peak) = (self.pool.held.load(Relaxed), self.pool.peak.load(Relaxed));
        Usage { held, peak, reserved: self.pool.reserved() }
    }

    /// Starts a new count of the most memory in use.
    pub fn reset_peak(&self) {
        self.pool.peak.store(self.pool.held.load(Relaxed), Relaxed);
    }

    /// Gives memory that is kept for later back to the system.
    pub fn release_kept(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the pool is the device's own.
        unsafe { result::mem_pool::trim_to(self.pool.handle, 0) }.called("cuMemPoolTrimTo")
    }
}

impl Memory {
    /// The address on the device, for the next call. If the communication stream used it last and the call is not for
    /// that stream, the call waits for it.
    pub fn address(&self) -> u64 {
        let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
        match end_of_beside() {
            Some(end) => *beside = Some(end),
            // A stream that cannot wait is a lost device, as the call will say.
            None => drop(beside.take().map(|end| self.gpu.wait_for(&end))),
        }
        self.address
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A lost device reports itself at the next call that can fail; here there is nobody to tell.
        let _ = self.gpu.bind();
        // Each stream frees what it used last: it comes after all earlier uses by the other.
        let is_beside = self.beside.get_mut().is_ok_and(|end| end.is_some());
        let stream = self.gpu.one_of_two(is_beside);
        // SAFETY: the address came from the pool, and this is its last handle.
        let _ = unsafe { result::free_async(self.address, stream) };
        self.gpu.pool.held.fetch_sub(self.bytes, Relaxed);
    }
}
