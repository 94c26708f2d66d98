//! Copies between host and device through pinned memory: uploads that nobody waits for, and results that are read
//! when they have arrived.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;

use crate::error::Called;
use crate::{Event, Gpu, Memory, Result};

/// Up to so many bytes the driver copies from any memory before the call returns.
const BY_DRIVER: usize = 64 << 10;
/// Larger copies go in pieces of this size: filling one overlaps with copying the one before.
const PIECE: usize = 8 << 20;

/// Pinned host memory.
#[derive(Debug)]
struct Pinned {
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory; whoever holds the value has it alone.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(bytes: usize) -> Result<Self> {
        // SAFETY: the context is current; the memory is freed in `drop`.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.called("cuMemHostAlloc")?;
        Ok(Self { pointer, bytes })
    }

    fn as_slice(&self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.bytes, "{bytes} of {} bytes", self.bytes);
        // SAFETY: the memory is that large, and written before it is read.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), bytes) }
    }

    fn as_mut_slice(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes, "{bytes} of {} bytes", self.bytes);
        // SAFETY: the memory is that large, and held by this value alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `new`, and copies that use it are done (`Staging`, `Readback`).
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

/// Pinned buffers of copies by size, oldest first: each is used again once its copy is done.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    by_size: BTreeMap<usize, VecDeque<(Pinned, Event)>>,
}

impl Staging {
    /// A free buffer of at least this size.
    fn take(&mut self, bytes: usize) -> Result<(Pinned, Event)> {
        let size = bytes.next_power_of_two().max(1 << 12);
        let buffers = self.by_size.entry(size).or_default();
        // Copies end in the order they were asked for, as good as always.
        match buffers.front() {
            Some((_, copied)) if copied.is_done() => Ok(buffers.pop_front().expect("just seen")),
            _ => Ok((Pinned::new(size)?, Event::new()?)),
        }
    }

    fn give_back(&mut self, buffer: (Pinned, Event)) {
        self.by_size.entry(buffer.0.bytes).or_default().push_back(buffer);
    }
}

/// Bytes on their way from the device.
#[derive(Debug)]
pub struct Readback {
    gpu: &'static Gpu,
    /// Always there until it is dropped.
    buffer: Option<(Pinned, Event)>,
    bytes: usize,
}

impl Readback {
    /// The bytes, once they have arrived.
    pub fn wait(&self) -> Result<&[u8]> {
        let (buffer, arrived) = self.buffer.as_ref().expect("the buffer is given back in drop alone");
        arrived.wait()?;
        Ok(buffer.as_slice(self.bytes))
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        // The next user of the buffer waits for the copy.
        self.gpu.give_back(self.buffer.take());
    }
}

impl Gpu {
    fn give_back(&self, buffer: Option<(Pinned, Event)>) {
        if let (Ok(mut staging), Some(buffer)) = (self.staging.lock(), buffer) {
            staging.give_back(buffer);
        }
    }

    fn pinned(&self, bytes: usize) -> Result<(Pinned, Event)> {
        self.staging.lock().expect("no copy panics while it holds the buffers").take(bytes)
    }

    /// A copy of host bytes on the device. Small ones go with the compute stream; large ones piece by piece on a stream
    /// of their own, while earlier work runs, and later work waits for them.
    pub fn upload(&'static self, bytes: &[u8]) -> Result<Arc<Memory>> {
        if bytes.len() <= BY_DRIVER {
            return self.upload_now(bytes);
        }
        self.upload_with(bytes.len(), 1, |first, piece| piece.copy_from_slice(&bytes[first..][..piece.len()]))
    }

    fn upload_now(&'static self, bytes: &[u8]) -> Result<Arc<Memory>> {
        self.bind()?;
        let memory = self.alloc(bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: the destination has these bytes, and the driver takes so few before it returns.
            unsafe { result::memcpy_htod_async(memory.address(), bytes, self.stream()) }
                .called("cuMemcpyHtoDAsync")?;
        }
        Ok(memory)
    }

    /// As [`Gpu::upload`], of bytes that are written where they leave from: `fill` is given the first byte of a piece and
    /// the piece, which is whole units of `unit` bytes.
    pub fn upload_with(
        &'static self,
        bytes: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [u8]),
    ) -> Result<Arc<Memory>> {
        if bytes <= BY_DRIVER {
            let mut all = vec![0; bytes];
            fill(0, &mut all);
            return self.upload_now(&all);
        }
        self.bind()?;
        let memory = self.alloc_on(bytes, self.copies())?;
        let most = (PIECE / unit.max(1) * unit).max(unit);
        for first in (0..bytes).step_by(most) {
            let n = most.min(bytes - first);
            let (mut buffer, copied) = self.pinned(n)?;
            fill(first, buffer.as_mut_slice(n));
            // SAFETY: the destination has these bytes; the buffer is not touched before `copied` is passed.
            unsafe {
                result::memcpy_htod_async(memory.address() + first as u64, buffer.as_slice(n), self.copies())
            }
            .called("cuMemcpyHtoDAsync")?;
            copied.record(self.copies())?;
            self.give_back(Some((buffer, copied)));
        }
        Self::order(self.copies(), self.stream())?;
        Ok(memory)
    }

    /// Starts to copy device memory to the host; what is written to it later is not seen.
    pub fn read_back(&'static self, address: u64, bytes: usize) -> Result<Readback> {
        self.bind()?;
        let (mut buffer, arrived) = self.pinned(bytes)?;
        if bytes > 0 {
            // SAFETY: callers name memory that they hold; the buffer is not read before `arrived` is passed.
            unsafe { result::memcpy_dtoh_async(buffer.as_mut_slice(bytes), address, self.stream()) }
                .called("cuMemcpyDtoHAsync")?;
        }
        arrived.record(self.stream())?;
        Ok(Readback { gpu: self, buffer: Some((buffer, arrived)), bytes })
    }
}
