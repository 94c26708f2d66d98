//! One tensor of a file: its element type, its shape, its bytes, and the way to f32.

use std::fmt;

use half::{bf16, f16};

/// The element types that are read, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
    /// 8-bit float with 4 exponent and 3 mantissa bits, no infinities (`float8_e4m3fn`).
    F8E4M3,
    /// 8-bit float with 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// 8-bit power of two, a scale (`float8_e8m0fnu`).
    F8E8M0,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed byte.
    I8,
    /// Byte.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    const ALL: [Self; 13] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F8E8M0,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U8,
        Self::Bool,
    ];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0
        )
    }

    /// The type's name in a safetensors file.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    pub(super) fn from_format(dtype: safetensors::Dtype) -> Option<Self> {
        let name = dtype.to_string();
        Self::ALL.into_iter().find(|candidate| candidate.name() == name)
    }

    pub(super) fn list() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor, still in its file; cheap to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View<'a> {
    /// The element type.
    pub dtype: Dtype,
    /// Extents, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// The elements, row-major, little-endian, at no particular alignment.
    pub bytes: &'a [u8],
}

impl View<'_> {
    /// The elements widened to f32 (exact but for F64, and I64 and I32 beyond 2^24; BOOL becomes 0 or 1).
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes;
        match self.dtype {
            Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F32 => each(bytes, f32::from_le_bytes),
            Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F8E4M3 => each(bytes, |[b]| f8e4m3_to_f32(b)),
            // The upper byte of a half-precision float.
            Dtype::F8E5M2 => each(bytes, |[b]| f16::from_bits(u16::from(b) << 8).to_f32()),
            Dtype::F8E8M0 => each(bytes, |[b]| f8e8m0_to_f32(b)),
            Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => each(bytes, |b| i32::from_le_bytes(b) as f32),
            Dtype::I16 => each(bytes, |b| i16::from_le_bytes(b).into()),
            Dtype::I8 => each(bytes, |b| i8::from_le_bytes(b).into()),
            Dtype::U8 => each(bytes, |[b]| b.into()),
            Dtype::Bool => each(bytes, |[b]| f32::from(b != 0)),
        }
    }
}

fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&element| f(element)).collect()
}

/// OCP 8-bit floating point, E4M3: bias 7, subnormals, NaN is all ones, no infinity.
pub(super) fn f8e4m3_to_f32(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 0x7));
    match (exponent, byte & 0x7) {
        (0xf, 0x7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (8.0 + mantissa) * 2f32.powi(exponent - 10),
    }
}

/// OCP microscaling scale, E8M0: a power of two with bias 127, NaN is all ones.
pub(super) fn f8e8m0_to_f32(byte: u8) -> f32 {
    if byte == 0xff { f32::NAN } else { 2f64.powi(i32::from(byte) - 127) as f32 }
}
