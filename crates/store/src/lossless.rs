//! Encoding `lossless`: low bytes and high bytes apart, each compressed with zstd level 1.
//!
//! Sign and exponent of hidden states (the high bytes) are far from uniform, the low bytes nearly so;
//! apart, the first compress well and the second cost nothing to skip.
//! Payload of a field: u64 size of the low plane, u64 size of the high plane, the two planes.
//! A plane whose size is the number of values is plain; any other size is one zstd frame.

use std::io::{self, Read};

use half::bf16;

const SIZES: usize = 16;
const LEVEL: i32 = 1;
/// Values decoded at a time, small enough for both planes to stay in the cache.
const CHUNK: usize = 1 << 15;

/// Appends the payload of `values`, or nothing where it would not be smaller than the plain values.
/// Returns whether it appended.
pub(crate) fn encode(values: &[bf16], out: &mut Vec<u8>) -> io::Result<bool> {
    let low = shrink(values.iter().map(|v| v.to_bits() as u8).collect())?;
    let high = shrink(values.iter().map(|v| (v.to_bits() >> 8) as u8).collect())?;
    if SIZES + low.len() + high.len() >= size_of_val(values) {
        return Ok(false);
    }
    out.extend_from_slice(&(low.len() as u64).to_le_bytes());
    out.extend_from_slice(&(high.len() as u64).to_le_bytes());
    out.extend_from_slice(&low);
    out.extend_from_slice(&high);
    Ok(true)
}

/// Decodes `payload` into `out`; fails when it does not hold exactly as many values.
pub(crate) fn decode(payload: &[u8], out: &mut [bf16]) -> Result<(), String> {
    let (sizes, planes) = payload.split_at_checked(SIZES).ok_or("lossless payload without plane sizes")?;
    let size = |at: usize| u64::from_le_bytes(sizes[at..at + 8].try_into().expect("8 bytes"));
    let (low, high) = (size(0), size(8));
    if low.checked_add(high) != Some(planes.len() as u64) {
        return Err(format!("lossless planes of {low} and {high} bytes in {} bytes", planes.len()));
    }
    let (low, high) = planes.split_at(low as usize);
    let mut low = Plane::open(low, out.len())?;
    let mut high = Plane::open(high, out.len())?;
    let (mut low_bytes, mut high_bytes) = (vec![0; CHUNK], vec![0; CHUNK]);
    for chunk in out.chunks_mut(CHUNK) {
        let (low_bytes, high_bytes) = (&mut low_bytes[..chunk.len()], &mut high_bytes[..chunk.len()]);
        low.fill(low_bytes)?;
        high.fill(high_bytes)?;
        for ((value, low), high) in chunk.iter_mut().zip(low_bytes).zip(high_bytes) {
            *value = bf16::from_le_bytes([*low, *high]);
        }
    }
    low.end()?;
    high.end()
}

fn shrink(plane: Vec<u8>) -> io::Result<Vec<u8>> {
    let compressed = zstd::bulk::compress(&plane, LEVEL)?;
    Ok(if compressed.len() < plane.len() { compressed } else { plane })
}

enum Plane<'a> {
    Plain(&'a [u8]),
    Zstd(Box<zstd::Decoder<'static, &'a [u8]>>),
}

impl<'a> Plane<'a> {
    fn open(bytes: &'a [u8], values: usize) -> Result<Self, String> {
        if bytes.len() == values {
            return Ok(Self::Plain(bytes));
        }
        let decoder = zstd::Decoder::with_buffer(bytes).map_err(describe)?;
        Ok(Self::Zstd(Box::new(decoder.single_frame())))
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Plain(bytes) => bytes.read_exact(into).map_err(describe),
            Self::Zstd(decoder) => decoder.read_exact(into).map_err(describe),
        }
    }

    fn end(self) -> Result<(), String> {
        let left = match self {
            Self::Plain(bytes) => bytes.len(),
            Self::Zstd(mut decoder) => decoder.read(&mut [0]).map_err(describe)? + decoder.finish().len(),
        };
        if left == 0 { Ok(()) } else { Err("lossless plane is longer than its values".into()) }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
fn describe(error: io::Error) -> String {
    format!("lossless plane does not decode: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell(n: usize) -> Vec<bf16> {
        let noise = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 - 0.5;
        (0..n).map(|i| bf16::from_f32(noise(i) + noise(i + n) + noise(i + 2 * n))).collect()
    }

    #[test]
    fn round_trip_is_exact_and_smaller() {
        for n in [1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let values = bell(n);
            let mut payload = Vec::new();
            assert!(encode(&values, &mut payload).unwrap());
            assert!(payload.len() < 2 * n);
            let mut out = vec![bf16::ZERO; n];
            decode(&payload, &mut out).unwrap();
            assert_eq!(out, values);
        }
    }

    #[test]
    fn what_does_not_shrink_is_left_plain() {
        let values: Vec<bf16> = [0x1234, 0xabcd, 0x9876].map(bf16::from_bits).to_vec();
        let mut payload = Vec::new();
        assert!(!encode(&values, &mut payload).unwrap());
        assert!(payload.is_empty());
    }

    #[test]
    fn wrong_payloads_are_errors() {
        let values = bell(1000);
        let mut payload = Vec::new();
        encode(&values, &mut payload).unwrap();
        let check = |payload: &[u8], n: usize| {
            decode(payload, &mut vec![bf16::ZERO; n]).unwrap_err();
        };
        check(&payload, 999);
        check(&payload, 1001);
        check(&payload[..10], 1000);
        for cut in 16..payload.len() {
            check(&payload[..cut], 1000);
        }
        let mut hostile = payload.clone();
        hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        check(&hostile, 1000);
    }
}
