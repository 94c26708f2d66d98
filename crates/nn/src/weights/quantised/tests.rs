//! Widened numbers against the formats' definitions, and what is wrong with them.

use safetensors::Dtype as Format;
use safetensors::tensor::TensorView;
use specforge_testkit::tempdir;

use super::*;

type Stored<'a> = (&'a str, Format, &'a [usize], &'a [u8]);

fn saved(tensors: &[Stored<'_>]) -> (tempfile::TempDir, Weights) {
    let dir = tempdir();
    let path = dir.path().join("model.safetensors");
    let views = tensors.iter().map(|(name, format, shape, bytes)| {
        (*name, TensorView::new(*format, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let weights = Weights::open(&path).unwrap();
    (dir, weights)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn blocks_of_8_bits_have_their_factors() {
    // 1, 1.5, -2, 448 in e4m3; blocks of 2 x 3, so that those at the edges are smaller.
    let codes: Vec<u8> = [0x38, 0x3c, 0xc0, 0x7e].repeat(3);
    let scales = floats(&[1.0, 10.0, 0.5, 0.25]);
    let w = ("w.weight", Format::F8_E4M3, &[3, 4][..], &codes[..]);
    let (_dir, weights) = saved(&[w, ("w.weight_scale_inv", Format::F32, &[2, 2], &scales)]);
    let got = weights.fp8_blocks("w.weight", &[3, 4], [2, 3]).unwrap();
    assert_eq!(got[..4], [1.0, 1.5, -2.0, 4480.0]);
    assert_eq!(got[4..8], got[..4]);
    assert_eq!(got[8..], [0.5, 0.75, -1.0, 112.0]);
    let message = |block| weights.fp8_blocks("w.weight", &[3, 4], block).unwrap_err().to_string();
    assert!(message([4, 4]).contains("w.weight_scale_inv has shape [2, 2], expected [1, 1]"));
    let (_dir, weights) = saved(&[w]);
    let message = weights.fp8_blocks("w.weight", &[3, 4], [2, 3]).unwrap_err().to_string();
    assert!(message.contains("tensor w.weight_scale_inv is missing in "), "{message}");
}

/// Two experts in one tensor: each has its own blocks, under any of the names.
#[test]
fn stacked_matrices_of_8_bits_have_their_factors() {
    let codes: Vec<u8> = [0x38, 0x3c, 0xc0, 0x7e].repeat(6);
    let scales = floats(&[1.0, 10.0, 0.5, 0.25, 2.0, 4.0, 8.0, 16.0]);
    for end in ["_scale_inv", "_weight_scale_inv", "_weight_scale", "_scale"] {
        let name = format!("gate_up_proj{end}");
        let (_dir, weights) = saved(&[
            ("gate_up_proj", Format::F8_E4M3, &[2, 3, 4], &codes),
            (&name, Format::F32, &[2, 2, 2], &scales),
        ]);
        let got = weights.fp8_blocks("gate_up_proj", &[2, 3, 4], [2, 3]).unwrap();
        let row = [1.0, 1.5, -2.0, 448.0];
        let expected = [[1.0, 10.0], [1.0, 10.0], [0.5, 0.25], [2.0, 4.0], [2.0, 4.0], [8.0, 16.0]]
            .map(|[a, b]| [row[0] * a, row[1] * a, row[2] * a, row[3] * b]);
        assert_eq!(got, expected.concat(), "{end}");
        let message = weights.fp8_blocks("gate_up_proj", &[2, 3, 4], [3, 4]).unwrap_err().to_string();
        assert!(message.contains(&format!("{name} has shape [2, 2, 2], expected [2, 1, 1]")), "{message}");
    }
    let (_dir, weights) = saved(&[("v", Format::F8_E4M3, &[4], &codes[..4])]);
    assert!(weights.fp8_blocks("v", &[4], [2, 3]).unwrap_err().to_string().contains("is no matrix"));
}

#[test]
fn every_4_bit_number_is_widened() {
    // All 16 codes, the first of a pair in the lower half of its byte, twice; then zeros with the smallest scale.
    let all: Vec<u8> = (0..8).map(|i| ((2 * i + 1) << 4) | (2 * i)).collect::<Vec<_>>().repeat(2);
    let blocks = [&all[..], &all, &[0x98; 16]].concat();
    let (name, shape) = ("x_blocks", &[3, 1, 16][..]);
    let (_dir, weights) =
        saved(&[(name, Format::U8, shape, &blocks), ("x_scales", Format::U8, &[3, 1], &[127, 129, 0])]);
    assert!(weights.has_mxfp4("x") && !weights.has_mxfp4("y"));
    let got: Vec<f32> = weights.mxfp4("x", &[3, 32]).unwrap().iter().map(|v| v.to_f32()).collect();
    let half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let signed: Vec<f32> = half.iter().copied().chain(half.iter().map(|v| -v)).collect();
    assert_eq!(got[..16], signed[..]);
    assert_eq!(got[16..32], signed[..]);
    assert_eq!(got[32..48], signed.iter().map(|v| 4.0 * v).collect::<Vec<_>>()[..]);
    // Code 8 is -0, code 9 is -0.5.
    assert_eq!(got[64..66], [-0.0, -0.5 * 2f32.powi(-127)]);
    let message = weights.mxfp4("x", &[3, 64]).unwrap_err().to_string();
    assert!(message.contains("x_blocks has shape [3, 1, 16], expected [3, 2, 16]"), "{message}");
    let (_dir, weights) =
        saved(&[(name, Format::I8, shape, &blocks), ("x_scales", Format::U8, &[3, 1], &[0; 3])]);
    let message = weights.mxfp4("x", &[3, 32]).unwrap_err().to_string();
    assert!(message.contains("tensor x_blocks: has the element type I8, expected U8"), "{message}");
}
