//! Which tensors of a file are the ids, the mask and the states.

use std::borrow::Cow;
use std::path::Path;

use specforge_nn::weights::torch::{TorchTensor, Value};
use specforge_nn::weights::{Dtype, View, Weights};

use crate::states::{Matrix, States};
use crate::{Error, Result};

/// The features of one sequence of L tokens, possibly with padding behind them.
#[derive(Debug)]
pub struct Features<'a> {
    /// `[L]`.
    pub input_ids: Vec<u32>,
    /// `[L]`, 1 where supervised; speculators' files have none.
    pub loss_mask: Option<Vec<u8>>,
    /// Captured layers side by side, `[L, n * H]`.
    pub hidden_states: States<'a>,
    /// `[L, H]`, if it was captured.
    pub last_hidden: Option<States<'a>>,
    /// Whether the last hidden state is after the final norm, as the format has it.
    pub is_normed: bool,
}

/// A dictionary of SpecForge or of speculators.
pub(crate) fn of_torch<'a>(path: &Path, root: Value<'a>) -> Result<Features<'a>> {
    let wrong = |why: String| Error::features(path, why);
    if !root.is_dict() {
        return Err(wrong(format!("it holds {}, expected tensors by name", root.kind())));
    }
    let tensor = |key: &str| root.get(key).and_then(Value::tensor);
    let ids = tensor("input_ids").ok_or_else(|| wrong(format!("no tensor input_ids{}", keys(root))))?;
    let input_ids = integers(path, "input_ids", &ids)?;
    let length = input_ids.len();
    let mask = tensor("loss_mask").map(|mask| mask_of(path, &mask, length)).transpose()?;
    if let Some(list) = root.get("hidden_states").and_then(Value::items) {
        let layers = list.map(|layer| layer.tensor().map(|t| matrix(path, "hidden_states", &t, length)));
        let layers = layers.collect::<Option<Vec<_>>>();
        let layers = layers.ok_or_else(|| wrong("hidden_states: expected a list of tensors".to_owned()))?;
        let mut layers = layers.into_iter().collect::<Result<Vec<_>>>()?;
        let last = layers.pop().ok_or_else(|| wrong("hidden_states: an empty list".to_owned()))?;
        return Ok(Features {
            input_ids,
            loss_mask: mask,
            hidden_states: States::of(layers),
            last_hidden: Some(States::of(vec![last])),
            is_normed: false,
        });
    }
    // Offline files of SpecForge; its samples in memory; its offline files for methods without a teacher.
    let pairs = [
        ("aux_hidden_state", "hidden_state"),
        ("hidden_state", "target"),
        ("hidden_states", "target_last_hidden_states"),
    ];
    let pair = pairs.into_iter().find(|(states, _)| tensor(states).is_some());
    let Some((states, last)) = pair else {
        return Err(wrong(format!("no tensor aux_hidden_state{}", keys(root))));
    };
    let part = |name| -> Result<Option<States<'a>>> {
        let Some(found) = tensor(name) else { return Ok(None) };
        Ok(Some(States::of(vec![matrix(path, name, &found, length)?])))
    };
    let hidden_states = part(states)?.expect("it was found above");
    Ok(Features { input_ids, loss_mask: mask, hidden_states, last_hidden: part(last)?, is_normed: true })
}

/// `hidden_states [L, n + 1, H]` and `token_ids [L]`; in 8 bits with `hidden_states_scales [L, 1, 1]` too.
pub(crate) fn of_safetensors<'a>(path: &Path, weights: &'a Weights) -> Result<Features<'a>> {
    let need = |name: &str| {
        let view = weights.get(name);
        view.ok_or_else(|| {
            Error::features(path, format!("no tensor {name}; expected token_ids and hidden_states"))
        })
    };
    let (ids, states) = (need("token_ids")?, need("hidden_states")?);
    let input_ids = integers_of(path, "token_ids", ids)?;
    let [length, layers, width] = states.shape[..] else {
        let why = format!("hidden_states has shape {:?}, expected [tokens, layers + 1, width]", states.shape);
        return Err(Error::features(path, why));
    };
    if length != input_ids.len() || layers == 0 {
        let why = format!("hidden_states has shape {:?} for {} tokens", states.shape, input_ids.len());
        return Err(Error::features(path, why));
    }
    let scales = scales_of(path, weights, states.dtype, length)?;
    let all = Matrix {
        bytes: Cow::Borrowed(states.bytes),
        dtype: states.dtype,
        columns: layers * width,
        from: 0,
        width,
        scales,
    };
    let hidden = Matrix { width: (layers - 1) * width, ..all.clone() };
    let last = Matrix { from: (layers - 1) * width, ..all };
    let loss_mask = weights.get("loss_mask").map(|mask| {
        let bits = integers_of(path, "loss_mask", mask)?;
        bits_of(path, &bits, length)
    });
    Ok(Features {
        input_ids,
        loss_mask: loss_mask.transpose()?,
        hidden_states: States::of(vec![hidden]),
        last_hidden: Some(States::of(vec![last])),
        is_normed: false,
    })
}

/// The factors of states in 8 bits, one for each token; none for other types.
fn scales_of<'a>(
    path: &Path,
    weights: &'a Weights,
    dtype: Dtype,
    length: usize,
) -> Result<Option<Cow<'a, [u8]>>> {
    if dtype != Dtype::F8E4M3 {
        return expect_float(path, "hidden_states", dtype).map(|()| None);
    }
    let scales = weights.get(SCALES);
    let fits =
        |scales: &View<'_>| scales.dtype == Dtype::F32 && scales.bytes.len() == length * size_of::<f32>();
    scales.filter(fits).map(|scales| Some(Cow::Borrowed(scales.bytes))).ok_or_else(|| {
        let why = format!("hidden_states is {dtype}, and there is no {SCALES} of {length} F32 numbers");
        Error::features(path, why)
    })
}

/// The tensor that makes numbers of speculators' states in 8 bits.
const SCALES: &str = "hidden_states_scales";

/// `; it has a, b, c`.
fn keys(root: Value<'_>) -> String {
    let names = root.entries().into_iter().flatten().filter_map(|(key, _)| key.text());
    let names: Vec<_> = names.take(12).collect();
    format!("; it has {}", if names.is_empty() { "nothing".to_owned() } else { names.join(", ") })
}

/// `[1, L, W]` or `[L, W]`.
fn matrix<'a>(path: &Path, name: &str, tensor: &TorchTensor<'a>, length: usize) -> Result<Matrix<'a>> {
    let (rows, width) = match tensor.shape()[..] {
        [1, rows, width] | [rows, width] => (rows, width),
        _ => (usize::MAX, 0),
    };
    if rows != length || width == 0 {
        let why = format!("{name} has shape {:?}, expected [1, {length}, width]", tensor.shape());
        return Err(Error::features(path, why));
    }
    expect_float(path, name, tensor.dtype())?;
    Ok(Matrix { bytes: tensor.bytes(), dtype: tensor.dtype(), columns: width, from: 0, width, scales: None })
}

fn expect_float(path: &Path, name: &str, dtype: Dtype) -> Result<()> {
    if matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
        return Ok(());
    }
    Err(Error::features(path, format!("{name} is {dtype}, expected BF16, F16 or F32")))
}

fn mask_of(path: &Path, mask: &TorchTensor<'_>, length: usize) -> Result<Vec<u8>> {
    bits_of(path, &integers(path, "loss_mask", mask)?, length)
}

fn bits_of(path: &Path, mask: &[u32], length: usize) -> Result<Vec<u8>> {
    if mask.len() != length || mask.iter().any(|&bit| bit > 1) {
        let why = format!("loss_mask: expected {length} entries of 0 or 1, got {}", mask.len());
        return Err(Error::features(path, why));
    }
    Ok(mask.iter().map(|&bit| bit as u8).collect())
}

fn integers(path: &Path, name: &str, tensor: &TorchTensor<'_>) -> Result<Vec<u32>> {
    integers_of(path, name, View { dtype: tensor.dtype(), shape: tensor.shape(), bytes: &tensor.bytes() })
}

/// Whole numbers from 0, `[L]` or `[1, L]`.
fn integers_of(path: &Path, name: &str, view: View<'_>) -> Result<Vec<u32>> {
    let bytes = view.bytes;
    let numbers: Vec<i64> = match view.dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect(),
        Dtype::U8 | Dtype::Bool => bytes.iter().map(|&b| b.into()).collect(),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => view.to_f32().into_iter().map(|v| v as i64).collect(),
        _ => Vec::new(),
    };
    let flat = matches!(view.shape, [_] | [1, _]);
    let numbers: Option<Vec<u32>> = numbers.into_iter().map(|n| u32::try_from(n).ok()).collect();
    numbers.filter(|numbers| flat && !numbers.is_empty()).ok_or_else(|| {
        let why = format!(
            "{name} is {} {:?}, expected whole numbers from 0, one per token",
            view.dtype, view.shape
        );
        Error::features(path, why)
    })
}
