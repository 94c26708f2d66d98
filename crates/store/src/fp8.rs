//! Encoding `fp8`: e4m3fn codes with one f32 scale per token (OCP 8-bit floating point, E4M3).
//!
//! Payload of a field: `len` scales (f32), then `len * width` codes. Value = code * scale, rounded to bf16.

use half::bf16;

/// The largest finite e4m3 value.
const MAX: f32 = 448.0;
/// Below this a value is subnormal: a multiple of 2^-9.
const MIN_NORMAL: f32 = 1.0 / 64.0;

/// The place of the first value that is NaN or infinite.
#[derive(Debug, PartialEq)]
pub(crate) struct NotFinite {
    pub(crate) token: usize,
    pub(crate) value: f32,
}

pub(crate) fn payload_bytes(len: u64, width: u64) -> Option<u64> {
    len.checked_mul(width.checked_add(4)?)
}

/// Appends the payload of `values: [len, width]`. The scale of a token is its largest magnitude / 448,
/// so that the largest value is hit exactly; 0 for a token of zeros.
pub(crate) fn encode(values: &[bf16], width: usize, out: &mut Vec<u8>) -> Result<(), NotFinite> {
    let scales_at = out.len();
    let len = values.len() / width;
    out.reserve(len * (4 + width));
    out.resize(scales_at + 4 * len, 0);
    for (token, row) in values.chunks_exact(width).enumerate() {
        let scale = scale(row).map_err(|value| NotFinite { token, value })?;
        let at = scales_at + 4 * token;
        out[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        // A zero scale means zeros only: they are coded as they are, sign included.
        let divisor = if scale == 0.0 { 1.0 } else { scale };
        out.extend(row.iter().map(|v| to_code(v.to_f32() / divisor)));
    }
    Ok(())
}

/// Decodes `payload` into `out: [len, width]`; their sizes are checked by the caller.
pub(crate) fn decode(payload: &[u8], width: usize, out: &mut [bf16]) {
    let (scales, codes) = payload.split_at(4 * (out.len() / width));
    let rows = codes.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for (scale, (codes, out)) in scales.chunks_exact(4).zip(rows) {
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
        // One product per code instead of one per value: then a value costs a table look-up.
        let table: [bf16; 256] = std::array::from_fn(|code| bf16::from_f32(from_code(code as u8) * scale));
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = table[code as usize];
        }
    }
}

fn scale(row: &[bf16]) -> Result<f32, f32> {
    // The bits of magnitudes order as the magnitudes do, with infinity and NaN above all.
    let largest = row.iter().map(|v| v.to_bits() & 0x7fff).max().unwrap_or(0);
    if largest < bf16::INFINITY.to_bits() {
        return Ok(bf16::from_bits(largest).to_f32() / MAX);
    }
    let culprit = row.iter().find(|v| !v.is_finite()).expect("a bit pattern from infinity up is in the row");
    Err(culprit.to_f32())
}

/// Nearest e4m3 code, ties to even, saturating at 448. The argument is finite.
fn to_code(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs().min(MAX);
    let code = if magnitude < MIN_NORMAL {
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        // Round 23 mantissa bits to 3, then move the exponent from bias 127 to bias 7.
        let bits = magnitude.to_bits();
        ((bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    };
    sign | code as u8
}

/// The value of an e4m3 code: exact; 0x7f and 0xff are NaN.
fn from_code(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3) & 0xf, f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (0xf, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(of: &[f32]) -> Vec<bf16> {
        of.iter().copied().map(bf16::from_f32).collect()
    }

    fn round_trip(input: &[bf16], width: usize) -> Vec<bf16> {
        let mut payload = Vec::new();
        encode(input, width, &mut payload).unwrap();
        assert_eq!(payload.len() as u64, payload_bytes((input.len() / width) as u64, width as u64).unwrap());
        let mut out = vec![bf16::ZERO; input.len()];
        decode(&payload, width, &mut out);
        out
    }

    #[test]
    fn codes_decode_as_the_standard_says() {
        // From the tables of the OCP specification.
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x77, 240.0),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(from_code(code), value, "{code:#x}");
        }
        assert!(from_code(0x7f).is_nan() && from_code(0xff).is_nan());
        assert!(from_code(0x80) == 0.0 && from_code(0x80).is_sign_negative());
    }

    #[test]
    fn every_code_comes_back_and_magnitudes_rise() {
        for code in 0..=0xffu8 {
            if code & 0x7f == 0x7f {
                continue;
            }
            assert_eq!(to_code(from_code(code)), code, "{code:#x}");
            if code & 0x7f != 0 {
                assert!(from_code(code).abs() > from_code(code - 1).abs(), "{code:#x}");
            }
        }
    }

    #[test]
    fn rounds_to_the_nearest_code_and_ties_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (from_code(code), from_code(code + 1));
            let middle = f32::midpoint(low, high);
            assert_eq!(to_code(middle), code + (code & 1), "tie above {code:#x}");
            assert_eq!(to_code(middle.next_down()), code, "below the tie above {code:#x}");
            assert_eq!(to_code(middle.next_up()), code + 1, "above the tie above {code:#x}");
            assert_eq!(to_code(-middle.next_up()), 0x80 | (code + 1));
        }
        assert_eq!(to_code(449.0), 0x7e);
        assert_eq!(to_code(-1e30), 0xfe);
    }

    #[test]
    fn error_is_bounded_for_rows_of_any_magnitude() {
        for exponent in -130..127 {
            let magnitude = 2f32.powi(exponent);
            let row: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 / 31.5 - 1.0) * magnitude).collect();
            let row = values(&row);
            let largest = row.iter().map(|v| v.to_f32().abs()).fold(0.0, f32::max);
            for (a, b) in row.iter().zip(round_trip(&row, 64)) {
                let error = (a.to_f32() as f64 - b.to_f32() as f64).abs();
                assert!(error <= largest as f64 / 16.0, "2^{exponent}: {a} came back as {b}");
            }
        }
    }

    #[test]
    fn rows_of_zeros_stay_zeros() {
        let row = values(&[0.0, -0.0, 0.0]);
        let bits: Vec<u16> = round_trip(&row, 3).iter().map(|v| v.to_bits()).collect();
        assert_eq!(bits, [0, 0x8000, 0]);
    }

    #[test]
    fn largest_value_of_a_row_is_exact() {
        for magnitude in [1.0, 3.0, 1e-30, 1e30, 3.3e38] {
            let row = values(&[magnitude, 0.0, -magnitude / 8.0]);
            assert_eq!(round_trip(&row, 3)[0], row[0]);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = encode(&values(&[1.0, 2.0, 3.0, bad]), 2, &mut Vec::new()).unwrap_err();
            assert_eq!(error.token, 1);
            assert_eq!(error.value.to_bits() << 9, bad.to_bits() << 9);
        }
    }
}
