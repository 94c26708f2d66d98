//! Writing a safetensors file: the same tensors, in whatever order, always give the same bytes.
//!
//! The bytes are those of the `safetensors` library with `{"format": "pt"}` as metadata (what every
//! Hugging Face tool writes): tensors by type, the widest first, then by name; no gaps. The library's own
//! function to write files is not used because it neither syncs nor leaves the file readable for others.

use std::cmp::Reverse;
use std::io::{self, Write};
use std::path::Path;

use ::safetensors::Dtype as FormatDtype;
use ::safetensors::tensor::{Metadata, TensorInfo};
use specforge_nn::weights::Dtype;

use crate::error::{Error, Result};
use crate::folder;
use crate::tensor::Tensor;

/// Writes `tensors` to a new file at `path`, replacing an old one only when everything is on the disk.
pub fn write_safetensors(path: &Path, tensors: &[Tensor<'_>]) -> Result<()> {
    let mut sorted: Vec<&Tensor<'_>> = tensors.iter().collect();
    sorted.sort_by(|a, b| (Reverse(rank(a.dtype)), &a.name).cmp(&(Reverse(rank(b.dtype)), &b.name)));
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::tensor(&pair[0].name, "is given twice"));
    }
    let header = header(&sorted)?;
    let size = 8 + header.len() + sorted.iter().map(|tensor| tensor.bytes.len()).sum::<usize>();
    folder::write_file(path, size as u64, |out| write_all(out, &header, &sorted))
}

fn write_all(out: &mut dyn Write, header: &[u8], tensors: &[&Tensor<'_>]) -> io::Result<()> {
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header)?;
    tensors.iter().try_for_each(|tensor| out.write_all(&tensor.bytes))
}

/// The JSON header, padded with spaces to a multiple of 8 bytes.
fn header(tensors: &[&Tensor<'_>]) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors
        .iter()
        .map(|tensor| {
            let start = end;
            end += tensor.bytes.len();
            let dtype = rank(tensor.dtype);
            (
                tensor.name.clone(),
                TensorInfo { dtype, shape: tensor.shape.clone(), data_offsets: (start, end) },
            )
        })
        .collect();
    if let Some(wrong) = tensors.iter().find(|tensor| bytes_of(tensor) != Some(tensor.bytes.len())) {
        let why = format!("{} {:?} does not take {} bytes", wrong.dtype, wrong.shape, wrong.bytes.len());
        return Err(Error::tensor(&wrong.name, why));
    }
    let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let metadata = Metadata::new(Some(format), infos).expect("offsets are contiguous and sizes were checked");
    let mut header = serde_json::to_vec(&metadata).expect("a header is plain JSON");
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn bytes_of(tensor: &Tensor<'_>) -> Option<usize> {
    tensor.shape.iter().try_fold(tensor.dtype.size(), |size, &extent| size.checked_mul(extent))
}

/// The format's type, whose order is the order in the file.
fn rank(dtype: Dtype) -> FormatDtype {
    match dtype {
        Dtype::F64 => FormatDtype::F64,
        Dtype::F32 => FormatDtype::F32,
        Dtype::F16 => FormatDtype::F16,
        Dtype::BF16 => FormatDtype::BF16,
        Dtype::F8E4M3 => FormatDtype::F8_E4M3,
        Dtype::F8E5M2 => FormatDtype::F8_E5M2,
        Dtype::F8E8M0 => FormatDtype::F8_E8M0,
        Dtype::I64 => FormatDtype::I64,
        Dtype::I32 => FormatDtype::I32,
        Dtype::I16 => FormatDtype::I16,
        Dtype::I8 => FormatDtype::I8,
        Dtype::U8 => FormatDtype::U8,
        Dtype::Bool => FormatDtype::BOOL,
    }
}
