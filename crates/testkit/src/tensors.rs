//! Tensors of a safetensors file as plain vectors, for tests only: whole file in memory, all converted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

/// All tensors of one file.
#[derive(Debug, Clone)]
pub struct Tensors {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

/// One tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The file's name of the element type: `F32`, `BF16`, `I64`, ...
    pub dtype: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub values: Values,
}

/// Elements, widened to one of three types.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// From F64, F32, F16 and BF16.
    F32(Vec<f32>),
    /// From I64, I32 and U8.
    I64(Vec<i64>),
    /// From BOOL.
    Bool(Vec<bool>),
}

impl Tensors {
    /// Reads the file at `path`; F64, F16 and BF16 become f32, integers become i64.
    pub fn read(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        let bytes = fs_err::read(&path).unwrap_or_else(|error| panic!("{error}"));
        let file =
            SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let values = convert(view.dtype(), view.data()).unwrap_or_else(|| {
                    panic!("{}: {name} is {:?}, which tests do not read", path.display(), view.dtype())
                });
                let tensor = Tensor { dtype: view.dtype().to_string(), shape: view.shape().to_vec(), values };
                (name.to_owned(), tensor)
            })
            .collect();
        Self { path, tensors }
    }

    /// Names in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names and tensors, in byte order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Whether the file has a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`; panics with the names there are when it is missing.
    pub fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            panic!("{} has no tensor {name}, only: {}", self.path.display(), names.join(", "))
        })
    }

    /// Shape and elements of a float tensor.
    pub fn f32(&self, name: &str) -> (&[usize], Vec<f32>) {
        match self.get(name) {
            Tensor { shape, values: Values::F32(values), .. } => (shape, values.clone()),
            other => self.wrong_type(name, other, "a float"),
        }
    }

    /// Shape and elements of an integer tensor.
    pub fn i64(&self, name: &str) -> (&[usize], Vec<i64>) {
        match self.get(name) {
            Tensor { shape, values: Values::I64(values), .. } => (shape, values.clone()),
            other => self.wrong_type(name, other, "an integer"),
        }
    }

    /// Shape and elements of a mask: BOOL, or integers that are 0 or 1.
    pub fn bool(&self, name: &str) -> (&[usize], Vec<bool>) {
        match self.get(name) {
            Tensor { shape, values: Values::Bool(values), .. } => (shape, values.clone()),
            Tensor { shape, values: Values::I64(values), .. }
                if values.iter().all(|v| matches!(v, 0 | 1)) =>
            {
                (shape, values.iter().map(|&v| v == 1).collect())
            }
            other => self.wrong_type(name, other, "a mask"),
        }
    }

    fn wrong_type(&self, name: &str, tensor: &Tensor, wanted: &str) -> ! {
        panic!("{}: {name} is not {wanted} tensor but {}", self.path.display(), tensor.dtype)
    }
}

fn convert(dtype: Dtype, bytes: &[u8]) -> Option<Values> {
    Some(match dtype {
        Dtype::F64 => Values::F32(each(bytes, |b| f64::from_le_bytes(b) as f32)),
        Dtype::F32 => Values::F32(each(bytes, f32::from_le_bytes)),
        Dtype::F16 => Values::F32(each(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Values::F32(each(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        Dtype::I64 => Values::I64(each(bytes, i64::from_le_bytes)),
        Dtype::I32 => Values::I64(each(bytes, |b| i32::from_le_bytes(b).into())),
        Dtype::U8 => Values::I64(bytes.iter().map(|&b| b.into()).collect()),
        Dtype::BOOL => Values::Bool(bytes.iter().map(|&b| b != 0).collect()),
        _ => return None,
    })
}

fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| f(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn file(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> (tempfile::TempDir, Tensors) {
        let dir = crate::tempdir();
        let path = dir.path().join("t.safetensors");
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
        let tensors = Tensors::read(&path);
        (dir, tensors)
    }

    #[test]
    fn every_type_is_widened() {
        let (_dir, t) = file(&[
            ("f32", Dtype::F32, &[1, 2], [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect()),
            ("bf16", Dtype::BF16, &[1], bf16::from_f32(0.5).to_le_bytes().to_vec()),
            ("f16", Dtype::F16, &[1], f16::from_f32(-3.0).to_le_bytes().to_vec()),
            ("i64", Dtype::I64, &[1], (-7i64).to_le_bytes().to_vec()),
            ("i32", Dtype::I32, &[1], (-8i32).to_le_bytes().to_vec()),
            ("u8", Dtype::U8, &[3], vec![0, 1, 1]),
            ("bool", Dtype::BOOL, &[2], vec![1, 0]),
        ]);
        assert_eq!(t.f32("f32"), (&[1, 2][..], vec![1.5, -2.0]));
        assert_eq!(t.f32("bf16").1, [0.5]);
        assert_eq!(t.f32("f16").1, [-3.0]);
        assert_eq!(t.i64("i64").1, [-7]);
        assert_eq!(t.i64("i32").1, [-8]);
        assert_eq!(t.i64("u8").1, [0, 1, 1]);
        assert_eq!(t.bool("u8").1, [false, true, true]);
        assert_eq!(t.bool("bool").1, [true, false]);
        assert_eq!(t.get("bf16").dtype, "BF16");
        assert_eq!(t.names().count(), 7);
        assert!(t.contains("u8") && !t.contains("u9"));
    }

    #[test]
    fn asking_for_the_wrong_type_or_name_says_so() {
        let (_dir, t) = file(&[("mask", Dtype::BOOL, &[1], vec![1])]);
        let message = |f: &dyn Fn()| {
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_err();
            panic.downcast_ref::<String>().unwrap().clone()
        };
        assert!(message(&|| drop(t.f32("mask"))).ends_with("mask is not a float tensor but BOOL"));
        assert!(message(&|| drop(t.f32("task"))).ends_with("has no tensor task, only: mask"));
    }
}
