//! Well-formed folders are read exactly; every kind of damage is named.

use std::path::Path;

use specforge_testkit::{Lcg, Tensors, golden_cases, tempdir};

use super::*;

/// The bytes of a file with this header text and data.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A well-formed file: `a` F32 [2], `b` BF16 [1, 2].
fn sample() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;
    raw(header, &[0, 0, 128, 63, 0, 0, 0, 192, 128, 63, 0, 64])
}

/// What opening a file of these bytes says, without the folder's name.
fn complaint(bytes: &[u8]) -> String {
    let dir = tempdir();
    let path = dir.path().join("model.safetensors");
    fs_err::write(&path, bytes).unwrap();
    message(dir.path(), &Weights::open(dir.path()).unwrap_err())
}

fn message(dir: &Path, error: &Error) -> String {
    error.to_string().replace(&format!("{}/", dir.display()), "").replace(&dir.display().to_string(), "DIR")
}

fn saved(name: &str, bytes: &[u8]) -> (tempfile::TempDir, Weights) {
    let dir = tempdir();
    fs_err::write(dir.path().join(name), bytes).unwrap();
    let weights = Weights::open(dir.path().join(name)).unwrap();
    (dir, weights)
}

#[test]
fn a_file_is_read() {
    let (_dir, weights) = saved("other-name.safetensors", &sample());
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    let b = weights.get("b").unwrap();
    assert_eq!((b.dtype, b.shape, b.to_f32()), (Dtype::BF16, &[1, 2][..], vec![1.0, 2.0]));
    assert_eq!(weights.require("a", &[2]).unwrap().to_f32(), [1.0, -2.0]);
    assert_eq!(weights.get("c"), None);
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let whole = sample();
    for length in 0..whole.len() {
        let text = complaint(&whole[..length]);
        assert!(
            text.starts_with("model.safetensors: ") && text.ends_with("download it again"),
            "{length}: {text}"
        );
    }
    assert_eq!(
        complaint(&whole[..0]),
        "model.safetensors: not a safetensors file: it is empty; download it again"
    );
    assert_eq!(
        complaint(&whole[..7]),
        "model.safetensors: not a safetensors file: it has only 7 bytes; download it again"
    );
    let (full, cut) = (whole.len(), whole.len() - 1);
    assert_eq!(
        complaint(&whole[..cut]),
        format!(
            "model.safetensors: {cut} bytes, but its header describes {full}; the file is cut off, download it again"
        )
    );
    assert!(complaint(&[&whole[..], &[0]].concat()).ends_with("the file is damaged, download it again"));
}

#[test]
fn hostile_headers_are_named() {
    let max = u64::MAX;
    let entry = |dtype: &str, shape: &str, from: u64, to: u64| {
        raw(
            &format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#),
            &[0; 8],
        )
    };
    let prefix = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let table: &[(&str, Vec<u8>, &str)] = &[
        (
            "header of u64::MAX bytes",
            prefix(max),
            "its header would have 18446744073709551615 bytes, and 100000000 is",
        ),
        ("header just too large", prefix(100_000_001), "100000001 bytes, and 100000000 is the limit"),
        (
            "header longer than the file",
            prefix(1000),
            "10 bytes, but its header describes 1008; the file is cut off",
        ),
        (
            "shape overflows",
            entry("F32", &format!("[{max},2]"), 0, 8),
            "tensor w: F32 [18446744073709551615, 2] is more than",
        ),
        ("size overflows", entry("F32", &format!("[{max}]"), 0, 8), "more than memory can hold"),
        ("end beyond any file", entry("U8", &format!("[{max}]"), 0, max), "which no file has"),
        ("end beyond the file", entry("U8", "[4096]", 0, 4096), "the file is cut off"),
        (
            "end before begin",
            entry("F32", "[2]", 8, 0),
            "tensor w: F32 [2] is 8 bytes, but the header gives it bytes 8..0",
        ),
        (
            "wrong size",
            entry("F32", "[3]", 0, 8),
            "tensor w: F32 [3] is 12 bytes, but the header gives it bytes 0..8",
        ),
        (
            "gap at the start",
            entry("F32", "[1]", 4, 8),
            "tensor w: leaves a gap before it: it begins at byte 4, expected 0",
        ),
        ("negative extent", entry("F32", "[-2]", 0, 8), "tensor w: invalid value: integer `-2`"),
        ("fraction", entry("F32", "[2.5]", 0, 8), "tensor w: invalid type: floating point"),
        ("unknown type", entry("F7", "[2]", 0, 8), "tensor w: unknown variant `F7`"),
        (
            "unsupported type",
            entry("C64", "[1]", 0, 8),
            "tensor w: has the element type C64, which is not supported (F64, F32",
        ),
        ("missing fields", raw(r#"{"w":{"dtype":"F32"}}"#, b""), "tensor w: missing field `shape`"),
        ("not an object", raw("[1]", b""), "no header follows the length"),
        ("text after the object", raw("{}x", b""), "its header is wrong: trailing characters"),
        ("cut JSON", raw(r#"{"w":"#, b""), "its header is wrong: "),
        ("nonsense", b"just some text, long enough".to_vec(), "no header follows the length"),
        ("invalid UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff\""].concat(), "its header is not UTF-8"),
        (
            "pointer",
            b"version https://git-lfs.github.com/spec/v1\noid".to_vec(),
            "fetch the content with: git lfs pull",
        ),
    ];
    for (what, bytes, expected) in table {
        let text = complaint(bytes);
        assert!(text.starts_with("model.safetensors: ") && text.contains(expected), "{what}: {text}");
    }
}

#[test]
fn overlapping_and_repeated_tensors_are_named() {
    let two = |second: &str, from, to| {
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},"{second}":{{"dtype":"U8","shape":[4],"data_offsets":[{from},{to}]}}}}"#
        );
        complaint(&raw(&header, &[0; 8]))
    };
    assert!(
        two("b", 2, 6).contains("tensor b: overlaps the tensor before it: it begins at byte 2, expected 4")
    );
    assert!(two("b", 5, 9).contains("tensor b: leaves a gap before it: it begins at byte 5, expected 4"));
    assert!(two("a", 4, 8).contains("its header is wrong: a is given twice"));
    assert!(two("a", 0, 4).contains("its header is wrong: a is given twice"));
}

#[test]
fn the_crate_accepts_what_is_accepted_here() {
    let mut lcg = Lcg::new(3);
    let whole = sample();
    let mut accepted = 0;
    let dir = tempdir();
    for i in 0..2000 {
        // A new file each time: rewriting one in place makes some file systems write it out.
        let path = dir.path().join(i.to_string());
        let mut bytes = whole.clone();
        for _ in 0..=lcg.below(2) {
            let at = lcg.below(bytes.len());
            bytes[at] = lcg.bits() as u8;
        }
        fs_err::write(&path, &bytes).unwrap();
        if Weights::open(&path).is_ok() {
            accepted += 1;
            assert!(
                safetensors::SafeTensors::deserialize(&bytes).is_ok(),
                "{}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }
    assert!(accepted > 0, "some damage is to a tensor's bytes or name, which cannot be seen");
}

#[test]
fn missing_and_misshapen_tensors_are_explained() {
    let header = r#"{"layers.0.self_attn.q_proj.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
    let dir = tempdir();
    fs_err::write(dir.path().join("model.safetensors"), raw(header, &[0; 8])).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    let complain =
        |name: &str, shape: &[usize]| message(dir.path(), &weights.require(name, shape).unwrap_err());
    assert_eq!(
        complain("model.layers.0.self_attn.q_proj.weight", &[2, 1]),
        "tensor model.layers.0.self_attn.q_proj.weight is missing in model.safetensors; \
         the nearest name there is layers.0.self_attn.q_proj.weight"
    );
    assert_eq!(
        complain("norm", &[2]),
        "tensor norm is missing in model.safetensors; no name there is similar: is it the right model?"
    );
    assert_eq!(
        complain("layers.0.self_attn.q_proj.weight", &[4, 1]),
        "model.safetensors: tensor layers.0.self_attn.q_proj.weight has shape [2, 1], expected [4, 1]; \
         config.json and weights do not belong together"
    );
}

#[test]
fn a_folder_without_weights_says_what_it_has() {
    let dir = tempdir();
    let complain = || message(dir.path(), &Weights::open(dir.path()).unwrap_err());
    assert!(complain().contains("(is it the right folder, and is the download complete?)"), "{}", complain());
    fs_err::write(dir.path().join("model.gguf"), "").unwrap();
    assert!(complain().contains("it has model.gguf: convert the weights to safetensors first"));
    fs_err::remove_file(dir.path().join("model.gguf")).unwrap();
    fs_err::write(dir.path().join("lora.safetensors"), "").unwrap();
    assert!(complain().contains("it has lora.safetensors: give that file's path"));
    let absent = Weights::open(dir.path().join("nowhere")).unwrap_err();
    assert!(message(dir.path(), &absent).contains("nowhere"), "{absent}");
}

/// A folder of two shards: `a` and `b` of [`sample`], and `c`.
fn sharded(index: &str) -> tempfile::TempDir {
    let dir = tempdir();
    fs_err::write(dir.path().join("s1.safetensors"), sample()).unwrap();
    let second = raw(r#"{"c":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#, &[7]);
    fs_err::write(dir.path().join("s2.safetensors"), second).unwrap();
    fs_err::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

#[test]
fn shards_are_read_as_one() {
    let dir =
        sharded(r#"{"metadata":{"total_size":13},"weight_map":{"a":"s1.safetensors","c":"s2.safetensors"}}"#);
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "c"], "only what the index names");
    assert_eq!(weights.get("c").unwrap().to_f32(), [7.0]);
    assert_eq!(weights.require("a", &[2]).unwrap().to_f32(), [1.0, -2.0]);
    assert_eq!(weights.files().count(), 2);
}

#[test]
fn wrong_indexes_are_explained() {
    let check = |index: &str, expected: &str| {
        let dir = sharded(index);
        let text = message(dir.path(), &Weights::open(dir.path()).unwrap_err());
        assert!(
            text.starts_with("model.safetensors.index.json: ") && text.contains(expected),
            "{index}: {text}"
        );
    };
    check(
        r#"{"weight_map":{"a":"s1.safetensors","d":"s3.safetensors","e":"s4.safetensors"}}"#,
        "2 of the 3 files it names are missing, s3.safetensors first; download the folder again",
    );
    check(r#"{"weight_map":{"z":"s1.safetensors"}}"#, "z is not in s1.safetensors");
    check(r#"{"weight_map":{"a":"../s1.safetensors"}}"#, r#"a is said to be in "../s1.safetensors""#);
    check(r#"{"weight_map":{"a":"/etc/passwd"}}"#, "not a plain file name");
    check(r#"{"weight_map":{"a":".."}}"#, "not a plain file name");
    check(r#"{"weight_map":{}}"#, "it names no tensor");
    check(r#"{"metadata":{}}"#, "not a weight index: missing field `weight_map`");
    check("", "not a weight index");
}

#[test]
fn fingerprints_tell_checkpoints_apart() {
    let of = |bytes: &[u8]| saved("model.safetensors", bytes).1.fingerprint();
    let whole = sample();
    let changed = |from: &str, to: &str| {
        let header = String::from_utf8_lossy(&whole[8..whole.len() - 12]).replace(from, to);
        raw(&header, &whole[whole.len() - 12..])
    };
    let mut other_byte = whole.clone();
    *other_byte.last_mut().unwrap() ^= 1;
    let original = of(&whole);
    assert_eq!(original, of(&whole));
    assert_eq!(original.len(), 64);
    for other in [other_byte, changed("BF16", "F16"), changed("[1,2]", "[2,1]"), changed("\"a\"", "\"c\"")] {
        assert_ne!(original, of(&other));
    }
}

#[test]
fn every_type_widens_to_f32() {
    let check = |dtype, bytes: &[u8], expected: &[f32]| {
        let view = View { dtype, shape: &[expected.len()], bytes };
        assert_eq!(view.to_f32(), expected, "{dtype}");
        assert_eq!(bytes.len(), dtype.size() * expected.len());
    };
    check(Dtype::F64, &(-0.5f64).to_le_bytes(), &[-0.5]);
    check(Dtype::F16, &[0, 60, 0, 196], &[1.0, -4.0]);
    check(Dtype::I64, &(-3i64).to_le_bytes(), &[-3.0]);
    check(Dtype::I32, &5i32.to_le_bytes(), &[5.0]);
    check(Dtype::I16, &(-2i16).to_le_bytes(), &[-2.0]);
    check(Dtype::I8, &[255, 3], &[-1.0, 3.0]);
    check(Dtype::U8, &[255], &[255.0]);
    check(Dtype::Bool, &[0, 1], &[0.0, 1.0]);
    // Zero, least and largest subnormal, least normal, one, largest, and a negative.
    let e4m3 = [0x00, 0x01, 0x07, 0x08, 0x38, 0x7e, 0xb8];
    check(Dtype::F8E4M3, &e4m3, &[0.0, 0.001_953_125, 0.013_671_875, 0.015_625, 1.0, 448.0, -1.0]);
    assert!(View { dtype: Dtype::F8E4M3, shape: &[1], bytes: &[0xff] }.to_f32()[0].is_nan());
    check(Dtype::F8E5M2, &[0x3c, 0x7b, 0xc0, 0x7c], &[1.0, 57344.0, -2.0, f32::INFINITY]);
    check(Dtype::F8E8M0, &[127, 128, 0, 254], &[1.0, 2.0, 2f32.powi(-127), 2f32.powi(127)]);
    assert!(View { dtype: Dtype::F8E8M0, shape: &[1], bytes: &[0xff] }.to_f32()[0].is_nan());
}

#[test]
fn golden_targets_are_read_as_the_crate_reads_them() {
    for (name, folder) in golden_cases("targets/") {
        let weights = Weights::open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(weights.names().count() > 0, "{name}");
        assert_eq!(weights.fingerprint(), Weights::open(&folder).unwrap().fingerprint());
        let single = folder.join("model.safetensors");
        if !single.exists() || name.ends_with("fp8") {
            continue;
        }
        for (tensor, expected) in Tensors::read(&single).iter() {
            let view = weights.require(tensor, &expected.shape).unwrap();
            assert_eq!(view.dtype.name(), expected.dtype, "{name} {tensor}");
            if let specforge_testkit::Values::F32(values) = &expected.values {
                assert_eq!(&view.to_f32(), values, "{name} {tensor}");
            }
        }
    }
}
