//! The bytes of one record: a self-delimiting header, then the fields, each 64-byte aligned.

use half::bf16;

use crate::{DType, Encoding, Error, Field, Result, Spec, fp8, lossless};

/// Records, and fields within them, start at multiples of this.
pub(crate) const ALIGN: u64 = 64;
pub(crate) const MAGIC: &[u8; 8] = b"SFRECORD";

const FIXED: usize = 40;
const PER_FIELD: usize = 16;

/// The values of one field of a record, `[len, width]`, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// For fields of dtype u8.
    U8(&'a [u8]),
    /// For fields of dtype u32.
    U32(&'a [u32]),
    /// For fields of dtype f32.
    F32(&'a [f32]),
    /// For fields of dtype bf16.
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::U8(_) => DType::U8,
            Self::U32(_) => DType::U32,
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::U8(values) => values,
            Self::U32(values) => bytemuck::cast_slice(values),
            Self::F32(values) => bytemuck::cast_slice(values),
            Self::Bf16(values) => bytemuck::cast_slice(values),
        }
    }
}

/// How the values of one field of one record lie there. The numbers are those on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Plain = 0,
    Fp8 = 1,
    Lossless = 2,
}

/// Where one field lies, counted from the start of the record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FieldSpan {
    pub(crate) stored: Stored,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A header that has been checked against the schema and the bytes that follow it.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) row: u64,
    pub(crate) len: u32,
    /// Bytes of the whole record, this header included; a multiple of [`ALIGN`].
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
    payload_crc: u32,
    pub(crate) fields: Vec<FieldSpan>,
}

/// Bytes of the header of a record of `fields` fields.
pub(crate) fn header_bytes(fields: usize) -> usize {
    (FIXED + PER_FIELD * fields + 4).next_multiple_of(ALIGN as usize)
}

/// Writes the record of `row` into `out`, which is cleared first, and returns the checksum of its header.
pub(crate) fn encode(
    spec: &Spec,
    row: u64,
    len: u32,
    fields: &[(&str, Values<'_>)],
    out: &mut Vec<u8>,
) -> Result<u32> {
    let header = header_bytes(fields.len());
    out.clear();
    out.resize(header, 0);
    for (i, (field, (_, values))) in spec.schema.fields().iter().zip(fields).enumerate() {
        let start = out.len();
        let stored = encode_field(spec.encoding, row, field, values, out)?;
        let bytes = (out.len() - start) as u64;
        out.resize(out.len().next_multiple_of(ALIGN as usize), 0);
        let entry = FIXED + PER_FIELD * i;
        put(out, entry, &(stored as u32).to_le_bytes());
        put(out, entry + 8, &bytes.to_le_bytes());
    }
    let total = out.len() as u64;
    let payload_crc = crc32fast::hash(&out[header..]);
    put(out, 0, MAGIC);
    put(out, 8, &row.to_le_bytes());
    put(out, 16, &total.to_le_bytes());
    put(out, 24, &len.to_le_bytes());
    put(out, 28, &(fields.len() as u32).to_le_bytes());
    put(out, 32, &payload_crc.to_le_bytes());
    let crc = crc32fast::hash(&out[..header - 4]);
    put(out, header - 4, &crc.to_le_bytes());
    Ok(crc)
}

fn encode_field(
    encoding: Encoding,
    row: u64,
    field: &Field,
    values: &Values<'_>,
    out: &mut Vec<u8>,
) -> Result<Stored> {
    match (values, encoding) {
        (Values::Bf16(values), Encoding::Fp8) => {
            fp8::encode(values, field.width as usize, out).map_err(|e| Error::NotFinite {
                row,
                field: field.name.clone(),
                token: e.token,
                value: e.value,
            })?;
            return Ok(Stored::Fp8);
        }
        (Values::Bf16(values), Encoding::Lossless) if lossless::encode(values, out)? => {
            return Ok(Stored::Lossless);
        }
        _ => out.extend_from_slice(values.bytes()),
    }
    Ok(Stored::Plain)
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Reads the header of the record at the start of `bytes`, which go on to the end of the shard.
/// Every size is checked before it is used; the payload is not read, see [`check_payload`].
pub(crate) fn parse(spec: &Spec, bytes: &[u8]) -> Result<Header, String> {
    let fields = spec.schema.fields();
    let size = header_bytes(fields.len());
    let header = bytes.get(..size).ok_or("the file ends within a record header")?;
    if &header[..8] != MAGIC {
        return Err("no record starts here".into());
    }
    let crc = u32_at(header, size - 4);
    if crc32fast::hash(&header[..size - 4]) != crc {
        return Err("the checksum of the record header does not match".into());
    }
    if u32_at(header, 28) as usize != fields.len() {
        return Err(format!("{} fields, the schema has {}", u32_at(header, 28), fields.len()));
    }
    let (len, total) = (u32_at(header, 24), u64_at(header, 16));
    if len == 0 || header[36..40] != [0; 4] {
        return Err("a record without tokens, or reserved bytes in use".into());
    }
    let mut offset = size as u64;
    let mut spans = Vec::with_capacity(fields.len());
    for (field, entry) in fields.iter().zip(header[FIXED..].chunks_exact(PER_FIELD)) {
        let span = parse_field(spec.encoding, field, len, entry, offset)?;
        offset = (span.bytes as u64)
            .checked_next_multiple_of(ALIGN)
            .and_then(|bytes| offset.checked_add(bytes))
            .ok_or("field sizes overflow")?;
        spans.push(span);
    }
    if offset != total {
        return Err(format!("the header says {total} bytes, its fields add up to {offset}"));
    }
    if total > bytes.len() as u64 {
        return Err(format!("the file ends within the record: {total} bytes, {} left", bytes.len()));
    }
    let payload_crc = u32_at(header, 32);
    Ok(Header { row: u64_at(header, 8), len, bytes: total, crc, payload_crc, fields: spans })
}

fn parse_field(
    encoding: Encoding,
    field: &Field,
    len: u32,
    entry: &[u8],
    offset: u64,
) -> Result<FieldSpan, String> {
    let (code, reserved, bytes) = (u32_at(entry, 0), u32_at(entry, 4), u64_at(entry, 8));
    let (len, width) = (len as u64, field.width as u64);
    let overflow = || format!("field {}: sizes overflow", field.name);
    let plain = len.checked_mul(width * field.dtype.size() as u64).ok_or_else(overflow)?;
    let (stored, fits) = match (code, field.dtype, encoding) {
        (0, DType::Bf16, Encoding::Fp8) => (Stored::Plain, false),
        (0, ..) => (Stored::Plain, bytes == plain),
        (1, DType::Bf16, Encoding::Fp8) => (Stored::Fp8, Some(bytes) == fp8::payload_bytes(len, width)),
        (2, DType::Bf16, Encoding::Lossless) => (Stored::Lossless, bytes < plain),
        _ => (Stored::Plain, false),
    };
    if !fits || reserved != 0 {
        return Err(format!("field {}: {bytes} bytes of encoding {code} for {len} tokens", field.name));
    }
    let to_usize = |n: u64| usize::try_from(n).map_err(|_| overflow());
    Ok(FieldSpan { stored, offset: to_usize(offset)?, bytes: to_usize(bytes)? })
}

/// Compares the payload of a record, alignment bytes included, with its checksum. `record` starts at the header.
pub(crate) fn check_payload(spec: &Spec, header: &Header, record: &[u8]) -> Result<(), String> {
    let payload = record
        .get(header_bytes(spec.schema.fields().len())..header.bytes as usize)
        .ok_or("the file ends within the record")?;
    if crc32fast::hash(payload) != header.payload_crc {
        return Err("the checksum of the record does not match".into());
    }
    Ok(())
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
