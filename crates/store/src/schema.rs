//! What one record holds: named fields of `[len, width]` values, and how they are encoded.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, record};

/// The fields of every record of a store, in the order in which they are written.
///
/// Names are unique, 1 to 64 of the characters `a-z 0-9 _`; there are 1 to 64 fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Field>", into = "Vec<Field>")]
pub struct Schema {
    fields: Vec<Field>,
}

/// One field: `[len, width]` values of one dtype.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Name, as `hidden_states`.
    pub name: String,
    /// Type of the values as they are given and read.
    pub dtype: DType,
    /// Values per token, 1 to 2^24.
    pub width: u32,
}

/// Type of the values of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 8-bit unsigned.
    U8,
    /// 32-bit unsigned.
    U32,
    /// 32-bit float.
    F32,
    /// bfloat16, the only dtype that [`Encoding`] applies to.
    Bf16,
}

/// How bf16 fields are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As they are: read without a copy.
    #[default]
    Bf16,
    /// e4m3 with one f32 scale per token and field: half the size, not exact.
    Fp8,
    /// Low and high bytes apart, each compressed with zstd level 1: exact, about 0.7 of the size.
    Lossless,
}

const MAX_FIELDS: usize = 64;
const MAX_WIDTH: u32 = 1 << 24;

/// Compressed over plain size of real hidden states under [`Encoding::Lossless`]: 0.68 to 0.70.
const LOSSLESS_RATIO: f64 = 0.70;

impl Schema {
    /// Checks names, widths and the number of fields.
    pub fn new(fields: Vec<Field>) -> Result<Self> {
        if fields.is_empty() || fields.len() > MAX_FIELDS {
            return Err(Error::Schema(format!("expected 1 to {MAX_FIELDS} fields, got {}", fields.len())));
        }
        for (i, field) in fields.iter().enumerate() {
            field.check()?;
            if fields.iter().take(i).any(|other| other.name == field.name) {
                return Err(Error::Schema(format!("field {} appears twice", field.name)));
            }
        }
        Ok(Self { fields })
    }

    /// The fields in order.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// Expected bytes per token in a store of this encoding, for sequences long enough that headers
    /// do not count. Exact for `bf16` and `fp8`; for `lossless` an estimate (0.70 of the bf16 bytes).
    pub fn bytes_per_token(&self, encoding: Encoding) -> f64 {
        self.fields.iter().map(|f| f.bytes_per_token(encoding)).sum()
    }

    /// Expected bytes of a whole store: [`Schema::bytes_per_token`] plus headers, alignment (half a
    /// unit per field on average) and index of `rows` records.
    pub fn estimated_bytes(&self, encoding: Encoding, rows: u64, tokens: u64) -> u64 {
        let padding = self.fields.len() as u64 * record::ALIGN / 2;
        let per_row =
            record::header_bytes(self.fields.len()) as u64 + padding + crate::index::ENTRY_BYTES as u64;
        (self.bytes_per_token(encoding) * tokens as f64).ceil() as u64 + per_row * rows
    }

    /// Bytes per token of the plain values, whatever the encoding.
    pub(crate) fn plain_bytes_per_token(&self) -> u64 {
        self.fields.iter().map(|f| f.width as u64 * f.dtype.size() as u64).sum()
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|f| f.name == name)
    }
}

impl Field {
    /// A field of `width` values per token.
    pub fn new(name: impl Into<String>, dtype: DType, width: u32) -> Self {
        Self { name: name.into(), dtype, width }
    }

    fn check(&self) -> Result<()> {
        let Self { name, width, .. } = self;
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
            return Err(Error::Schema(format!(
                "field name {name:?}: expected 1 to 64 of the characters a-z 0-9 _"
            )));
        }
        if *width == 0 || *width > MAX_WIDTH {
            return Err(Error::Schema(format!("field {name}: expected width 1 to {MAX_WIDTH}, got {width}")));
        }
        Ok(())
    }

    fn bytes_per_token(&self, encoding: Encoding) -> f64 {
        let width = self.width as f64;
        match (self.dtype, encoding) {
            (DType::Bf16, Encoding::Fp8) => width + 4.0,
            (DType::Bf16, Encoding::Lossless) => width * 2.0 * LOSSLESS_RATIO,
            (dtype, _) => width * dtype.size() as f64,
        }
    }
}

impl DType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::U32 | Self::F32 => 4,
        }
    }
}

impl TryFrom<Vec<Field>> for Schema {
    type Error = Error;

    fn try_from(fields: Vec<Field>) -> Result<Self> {
        Self::new(fields)
    }
}

impl From<Schema> for Vec<Field> {
    fn from(schema: Schema) -> Self {
        schema.fields
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.dtype, self.width)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Lossless => "lossless",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eagle3(ht: u32) -> Schema {
        Schema::new(vec![
            Field::new("input_ids", DType::U32, 1),
            Field::new("loss_mask", DType::U8, 1),
            Field::new("hidden_states", DType::Bf16, 3 * ht),
            Field::new("last_hidden", DType::Bf16, ht),
        ])
        .unwrap()
    }

    #[test]
    fn bytes_per_token_of_eagle3_at_hidden_4096() {
        assert_eq!(eagle3(4096).bytes_per_token(Encoding::Bf16), 32768.0 + 5.0);
        assert_eq!(eagle3(4096).bytes_per_token(Encoding::Fp8), 16384.0 + 8.0 + 5.0);
        let lossless = eagle3(4096).bytes_per_token(Encoding::Lossless);
        assert!((lossless - (32768.0 * 0.7 + 5.0)).abs() < 1e-6, "{lossless}");
    }

    #[test]
    fn schemas_that_no_store_can_have() {
        fn check(fields: Vec<Field>, expected: &str) {
            let message = Schema::new(fields).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        check(vec![], "1 to 64 fields, got 0");
        check((0..65).map(|i| Field::new(format!("f{i}"), DType::U8, 1)).collect(), "got 65");
        check(vec![Field::new("a", DType::U8, 1), Field::new("a", DType::U32, 1)], "field a appears twice");
        check(vec![Field::new("../a", DType::U8, 1)], "field name \"../a\"");
        check(vec![Field::new("a", DType::U8, 0)], "got 0");
        check(vec![Field::new("a", DType::U8, u32::MAX)], "got 4294967295");
    }
}
