//! What this machine has.

/// Memory that programs can still take, in bytes; `None` where the system does not say.
pub(crate) fn available_memory() -> Option<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

/// The most memory that this process had at once, in bytes; `None` where the system does not say.
pub(crate) fn peak_memory() -> Option<u64> {
    kib_of("/proc/self/status", "VmHWM:")
}

/// The number of KiB behind a key of one of the system's files, in bytes.
fn kib_of(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Threads that work at once.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
