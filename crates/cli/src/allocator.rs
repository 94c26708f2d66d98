//! The program's allocator.

#![expect(unsafe_code, reason = "an allocator is an unsafe trait, and the C library is told what to map")]

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Small pieces are mimalloc's: tokenizing takes a little for every token, and needs two fifths more time with the
/// system's allocator. All others are the system's: of what tensors gave back mimalloc keeps as much as they take, and
/// if told not to, it takes more time to give it to the system than this one does.
pub(crate) struct BySize;

/// Bytes of the smallest piece that is the system's.
const LARGE: usize = 1 << 10;

fn owner(bytes: usize) -> &'static dyn GlobalAlloc {
    if bytes < LARGE { &MiMalloc } else { &System }
}

// SAFETY: a piece goes back to where it came from, because its size says which that was.
unsafe impl GlobalAlloc for BySize {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { owner(layout.size()).alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { owner(layout.size()).alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { owner(layout.size()).dealloc(address, layout) }
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() < LARGE) == (size < LARGE) {
            // SAFETY: the caller's promise.
            return unsafe { owner(size).realloc(address, layout, size) };
        }
        // SAFETY: the caller's promise holds for the new size too; both pieces are as long as what is copied.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                address.copy_to_nonoverlapping(new, layout.size().min(size));
                self.dealloc(address, layout);
            }
            new
        }
    }
}

/// Has the C library map large pieces, which are then gone when they are free. Left alone it raises the size from which on
/// it does so to the largest piece that it saw be freed, and keeps what is smaller.
pub(crate) fn configure() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number; memory that is there already stays as it is.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
    }
}
