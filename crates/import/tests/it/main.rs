//! Files of features, real ones and hostile ones.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use half::bf16;
use specforge_import::{Error, FeatureFile};
use specforge_testkit::{own_case, tempdir, torch_file};

const MOST: u64 = 1 << 20;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 - 3.0) * 0.5).collect()
}

fn f32s(values: Vec<bf16>) -> Vec<f32> {
    values.into_iter().map(bf16::to_f32).collect()
}

/// Written by torch; see tools/golden/torch_files.py.
#[test]
fn golden_files_of_specforge_are_read() {
    let file = FeatureFile::open(&own_case("torch/data_0.ckpt"), MOST).unwrap();
    let features = file.features().unwrap();
    assert_eq!(features.input_ids, [5, 6, 7, 8, 9, 0, 0, 0]);
    assert_eq!(features.loss_mask.unwrap(), [0, 0, 1, 1, 1, 0, 0, 0]);
    let last = features.last_hidden.unwrap();
    assert_eq!((features.hidden_states.width(), last.width(), features.is_normed), (6, 2, true));
    assert_eq!(f32s(features.hidden_states.first(5).unwrap()), numbers(30));
    assert_eq!(f32s(last.first(8).unwrap()), numbers(16));
    let packed = FeatureFile::open(&own_case("torch/data_1.ckpt.gz"), MOST).unwrap();
    assert_eq!(packed.features().unwrap().input_ids, [5, 6, 7]);
    let error = FeatureFile::open(&own_case("torch/data_1.ckpt.gz"), 100).unwrap_err();
    assert!(error.to_string().contains("more than 100 bytes"), "{error}");
}

#[test]
fn files_of_speculators_are_read() {
    let dir = tempdir();
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let ids: Vec<u8> = [4i64, 5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let states = bytes(&numbers(16));
    let view = |dtype, shape: &[usize], bytes| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap()
    };
    let views = [
        ("token_ids", view(safetensors::Dtype::I64, &[2], &ids)),
        ("hidden_states", view(safetensors::Dtype::F32, &[2, 4, 2], &states)),
    ];
    let path = dir.path().join("hs_0.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let file = FeatureFile::open(&path, MOST).unwrap();
    let features = file.features().unwrap();
    assert_eq!((features.input_ids, features.loss_mask, features.is_normed), (vec![4, 5], None, false));
    let all = numbers(16);
    assert_eq!(f32s(features.hidden_states.first(2).unwrap()), [&all[..6], &all[8..14]].concat());
    assert_eq!(f32s(features.last_hidden.unwrap().first(2).unwrap()), [&all[6..8], &all[14..]].concat());
}

/// Every file of the other programs' own code has the same numbers; see tools/golden/others.py.
#[test]
fn files_of_other_programs_are_read() {
    let number = |i: usize| if i.is_multiple_of(64) { 28.0 } else { (8 + i % 8) as f32 };
    let all: Vec<f32> = (0..5 * 64).map(number).collect();
    let columns = |from: usize, to: usize| -> Vec<f32> {
        all.chunks_exact(64).flat_map(|row| row[from..to].to_vec()).collect()
    };
    for (file, has_mask, is_normed) in [
        ("speculators-0.9.0/hidden_states/hs_0.safetensors", false, false),
        ("speculators-0.9.0/hidden_states/hs_1.safetensors", false, false),
        ("speculators-0.3.0/data_0.pt", true, false),
        ("speculators-0.3.0/v0/data_0.pt", true, true),
        ("specforge-0.2.0/rows_0-2000/data_0.ckpt", true, true),
        ("specforge-0.2.0/rows_0-2000/data_1.ckpt.gz", true, true),
    ] {
        let opened = FeatureFile::open(&own_case("others").join(file), MOST).unwrap();
        let features = opened.features().unwrap();
        assert_eq!(features.input_ids, [7, 8, 9, 10, 11], "{file}");
        assert_eq!(features.loss_mask, has_mask.then(|| vec![1, 0, 1, 0, 1]), "{file}");
        assert_eq!(features.is_normed, is_normed, "{file}");
        assert_eq!(f32s(features.hidden_states.first(5).unwrap()), columns(0, 48), "{file}");
        assert_eq!(f32s(features.last_hidden.unwrap().first(5).unwrap()), columns(48, 64), "{file}");
    }
}

#[test]
fn states_in_8_bits_need_their_scales() {
    let dir = tempdir();
    let ids: Vec<u8> = [4i64, 5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = |dtype, shape: &[usize], bytes| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap()
    };
    let (codes, scale) = ([0x38u8; 16], 1f32.to_le_bytes());
    let path = dir.path().join("hs_0.safetensors");
    for scales in [None, Some(view(safetensors::Dtype::F32, &[1, 1, 1], &scale))] {
        let mut views = vec![
            ("token_ids", view(safetensors::Dtype::I64, &[2], &ids)),
            ("hidden_states", view(safetensors::Dtype::F8_E4M3, &[2, 4, 2], &codes)),
        ];
        views.extend(scales.map(|scales| ("hidden_states_scales", scales)));
        safetensors::serialize_to_file(views, None, &path).unwrap();
        let message = refused(&path);
        assert!(message.contains("no hidden_states_scales of 2 F32 numbers"), "{message}");
    }
}

fn refused(path: &Path) -> String {
    let file = FeatureFile::open(path, MOST);
    file.and_then(|file| file.features().map(|_| ())).unwrap_err().to_string()
}

#[test]
fn wrong_shapes_and_values_are_named() {
    let dir = tempdir();
    let path = dir.path().join("data_0.ckpt");
    let ids = |ids: &[i64]| ids.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let half = |count: usize| vec![0u8; 2 * count];
    let check = |entries: &[specforge_testkit::TorchEntry<'_>], expected: &str| {
        torch_file(&path, entries);
        let message = refused(&path);
        assert!(message.contains(expected) && message.contains("data_0.ckpt"), "{message}");
    };
    let good = || ("input_ids", "LongStorage", &[2][..], ids(&[1, 2]));
    check(&[("other", "LongStorage", &[1], ids(&[1]))], "no tensor input_ids; it has other");
    check(&[("input_ids", "LongStorage", &[2], ids(&[1, -2]))], "whole numbers from 0");
    check(&[good()], "no tensor aux_hidden_state");
    check(&[good(), ("loss_mask", "LongStorage", &[1], ids(&[1]))], "expected 2 entries of 0 or 1");
    check(&[good(), ("loss_mask", "LongStorage", &[2], ids(&[1, 3]))], "expected 2 entries of 0 or 1");
    let states = ("aux_hidden_state", "BFloat16Storage", &[1, 3, 2][..], half(6));
    check(&[good(), states], "shape [1, 3, 2], expected [1, 2, width]");
    let states = ("aux_hidden_state", "LongStorage", &[1, 2, 1][..], ids(&[1, 2]));
    check(&[good(), states], "expected BF16, F16 or F32");
    assert!(matches!(FeatureFile::open(&own_case("torch/code.pt"), MOST), Err(Error::Weights(_))));
}

#[test]
fn states_that_are_not_finite_are_none() {
    let dir = tempdir();
    let path = dir.path().join("data_0.ckpt");
    let ids = [1i64, 2].iter().flat_map(|v| v.to_le_bytes()).collect();
    let bytes = [0.0f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
    torch_file(
        &path,
        &[
            ("input_ids", "LongStorage", &[1, 2], ids),
            ("aux_hidden_state", "FloatStorage", &[1, 2, 1], bytes),
        ],
    );
    let file = FeatureFile::open(&path, MOST).unwrap();
    let states = file.features().unwrap().hidden_states;
    assert!(states.first(1).is_some() && states.first(2).is_none());
}
