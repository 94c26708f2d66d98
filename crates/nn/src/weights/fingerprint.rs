//! Telling checkpoints apart without reading hundreds of gigabytes.

use super::Weights;

/// Up to this many bytes in all, everything is hashed.
const WHOLE: usize = 64 << 20;
/// Windows hashed of each file beyond that, and the bytes of one.
const WINDOWS: usize = 64;
const WINDOW: usize = 16 << 10;

/// The digest that [`Weights::fingerprint`] documents.
pub(super) fn of(weights: &Weights) -> String {
    let mut hash = blake3::Hasher::new();
    for (name, location) in &weights.tensors {
        hash.update(format!("{name}\0{}\0{:?}\0", location.dtype, location.shape).as_bytes());
    }
    let total: usize = weights.files.iter().map(|file| file.bytes().len()).sum();
    for file in &weights.files {
        let bytes = file.bytes();
        hash.update(&(bytes.len() as u64).to_le_bytes());
        for window in windows(bytes, total <= WHOLE) {
            hash.update(window);
        }
    }
    hash.finalize().to_hex().to_string()
}

/// All of `bytes`, or windows spread evenly over it, the first and last byte included.
fn windows(bytes: &[u8], whole: bool) -> Vec<&[u8]> {
    if whole || bytes.len() <= WINDOWS * WINDOW {
        return vec![bytes];
    }
    let last = bytes.len() - WINDOW;
    (0..WINDOWS)
        .map(|i| last / (WINDOWS - 1) * i)
        .map(|at| &bytes[at..at + WINDOW])
        .chain([&bytes[last..]])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_reach_both_ends_and_stay_small() {
        let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
        let sampled = windows(&bytes, false);
        assert_eq!(sampled.len(), WINDOWS + 1);
        assert!(sampled.iter().all(|window| window.len() == WINDOW));
        assert_eq!(sampled[0], &bytes[..WINDOW]);
        assert_eq!(sampled[WINDOWS], &bytes[bytes.len() - WINDOW..]);
        assert_eq!(windows(&bytes, true), [&bytes[..]]);
        assert_eq!(windows(&bytes[..100], false), [&bytes[..100]]);
    }
}
