//! Experts that are one tensor of 8-bit floats, against the same numbers in float32.

use std::path::Path;

use safetensors::Dtype as Format;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use specforge_models::Target;
use specforge_nn::weights::{Dtype, View, Weights};
use specforge_tensor::{DType, Device};
use specforge_testkit::{Lcg, tempdir};

use crate::folder;

const BLOCK: [usize; 2] = [16, 8];

/// A tensor's name, type, shape and bytes.
type Stored = (String, Format, Vec<usize>, Vec<u8>);

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Random codes of a stack of matrices and the factors of their blocks; and the numbers that they stand for.
fn stack(name: &str, end: &str, shape: &[usize], lcg: &mut Lcg) -> ([Stored; 2], Stored) {
    let [n, rows, columns] = *shape else { panic!("{name}: {shape:?}") };
    let grid = [rows.div_ceil(BLOCK[0]), columns.div_ceil(BLOCK[1])];
    let codes: Vec<u8> =
        (0..n * rows * columns).map(|_| lcg.below(0x58) as u8 | (lcg.below(2) as u8) << 7).collect();
    let scales: Vec<f32> = lcg.normals(n * grid[0] * grid[1], 0.02).iter().map(|v| v.abs() + 0.005).collect();
    let wide = View { dtype: Dtype::F8E4M3, shape, bytes: &codes }.to_f32();
    let scale = |i: usize| {
        let (matrix, row, column) = (i / (rows * columns), i / columns % rows, i % columns);
        scales[(matrix * grid[0] + row / BLOCK[0]) * grid[1] + column / BLOCK[1]]
    };
    let wide: Vec<f32> = wide.iter().enumerate().map(|(i, v)| v * scale(i)).collect();
    let factors = (format!("{name}{end}"), Format::F32, [&[n][..], &grid].concat(), f32s(&scales));
    let small = (name.to_owned(), Format::F8_E4M3, shape.to_vec(), codes);
    ([small, factors], (name.to_owned(), Format::F32, shape.to_vec(), f32s(&wide)))
}

fn write(folder: &Path, config: &Value, tensors: &[Stored]) {
    fs_err::create_dir_all(folder).unwrap();
    fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, format, shape, bytes)| {
        (name.as_str(), TensorView::new(*format, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// The tensors with all experts of a layer in one.
fn stacked(tensors: Vec<(String, Vec<usize>)>) -> Vec<(String, Vec<usize>)> {
    let mut all: Vec<(String, Vec<usize>)> = Vec::new();
    for (name, shape) in tensors {
        let numbered = |(_, expert): &(&str, &str)| expert.starts_with(|c: char| c.is_ascii_digit());
        let Some((layer, expert)) = name.split_once(".experts.").filter(numbered) else {
            all.push((name, shape));
            continue;
        };
        // Gate and up are one below the other.
        let (part, rows) = match expert.split('.').nth(1) {
            Some("gate_proj") => ("gate_up_proj", 2 * shape[0]),
            Some("down_proj") => ("down_proj", shape[0]),
            _ => continue,
        };
        let name = format!("{layer}.experts.{part}");
        match all.iter_mut().find(|(other, _)| *other == name) {
            Some((_, shape)) => shape[0] += 1,
            None => all.push((name, vec![1, rows, shape[1]])),
        }
    }
    all
}

/// The folder in 8 bits and in 32.
fn twins(dir: &Path, mut config: Value, end: &str) -> [Target; 2] {
    folder::write(dir, &config, &stacked(folder::tensors(&config)));
    let weights = Weights::open(dir).unwrap();
    let (mut small, mut wide, mut lcg) = (Vec::new(), Vec::new(), Lcg::new(3));
    for name in weights.names() {
        let view = weights.get(name).unwrap();
        if name.contains(".experts.") && view.shape.len() == 3 {
            let (codes, values) = stack(name, end, view.shape, &mut lcg);
            small.extend(codes);
            wide.push(values);
        } else {
            let same = (name.to_owned(), Format::F32, view.shape.to_vec(), view.bytes.to_vec());
            small.push(same.clone());
            wide.push(same);
        }
    }
    assert!(small.len() > wide.len(), "no experts in one tensor");
    write(&dir.join("wide"), &config, &wide);
    config["quantization_config"] = json!({ "quant_method": "fp8", "weight_block_size": BLOCK });
    write(&dir.join("small"), &config, &small);
    ["small", "wide"].map(|name| Target::load(dir.join(name), Device::Cpu, Some(DType::F32)).unwrap())
}

#[test]
fn stacked_experts_of_8_bits_are_those_of_32() {
    // Used as they are; transposed in the file; the same with gate and up in turn.
    let kinds = ["Qwen3MoeForCausalLM", "Qwen3_5MoeForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM"];
    for (architecture, extra) in folder::kinds().into_iter().filter(|(name, _)| kinds.contains(name)) {
        let config = folder::config(architecture, &extra);
        for end in ["_scale_inv", "_weight_scale"] {
            let dir = tempdir();
            let twins = twins(dir.path(), config.clone(), end);
            let tokens = folder::tokens(5, 12);
            let states =
                twins.map(|t| t.forward(&[&tokens], &folder::all(&t)).unwrap().hidden_states.to_f32());
            assert_eq!(states[0], states[1], "{architecture} {end}");
            assert!(states[0].iter().all(|v| v.is_finite()), "{architecture}");
        }
    }
}
