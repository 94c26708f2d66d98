use specforge_testkit::{case_json, own_case, tempdir, torch_archive, torch_file};

use super::super::{View, Weights};
use super::*;

fn golden(name: &str) -> PathBuf {
    own_case("torch").join(name)
}

fn message(path: &Path) -> String {
    TorchFile::open(path).unwrap_err().to_string()
}

/// The elements of every tensor that torch itself said the file holds.
#[test]
fn golden_files_of_torch_hold_what_torch_put_in() {
    for name in ["types.pt", "protocol4.pt"] {
        let file = TorchFile::open(golden(name)).unwrap();
        let expected = case_json(golden("contents.json"))[name].clone();
        for (tensor, expected) in expected.as_object().unwrap() {
            let got = file.root().get(tensor).unwrap().tensor().unwrap();
            assert_eq!(serde_json::json!(got.shape()), expected["shape"], "{name}: {tensor}");
            let view = View { dtype: got.dtype(), shape: got.shape(), bytes: &got.bytes() };
            let values: Vec<f64> = view.to_f32().into_iter().map(f64::from).collect();
            let numbers: Vec<f64> =
                expected["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            assert_eq!(values, numbers, "{name}: {tensor}");
        }
        let other = file.root().get("other").unwrap();
        let get = |key| other.get(key).unwrap();
        assert_eq!((get("int").integer(), get("long").integer()), (Some(-5), Some(1 << 40)));
        assert_eq!(get("negative").integer(), Some(-(1 << 40)));
        assert_eq!((get("float").number(), get("true").truth()), (Some(0.25), Some(true)));
        assert_eq!((get("text").text(), get("none").kind()), (Some("größer"), "None"));
        let nested = get("list").items().unwrap().nth(1).unwrap();
        assert_eq!(
            nested.items().unwrap().map(|item| item.text().is_some()).collect::<Vec<_>>(),
            [false, true]
        );
        assert_eq!(get("size").items().unwrap().filter_map(Value::integer).collect::<Vec<_>>(), [2, 3]);
    }
}

#[test]
fn golden_state_dicts_are_weights() {
    for name in ["state_dict.bin", "training_state.pt"] {
        let weights = Weights::open(golden(name)).unwrap();
        let expected = case_json(golden("contents.json"))[name].clone();
        let expected = expected.as_object().unwrap();
        assert_eq!(weights.names().count(), expected.len());
        for (tensor, expected) in expected {
            let numbers: Vec<f32> =
                expected["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
            assert_eq!(weights.get(tensor).unwrap().to_f32(), numbers, "{name}: {tensor}");
        }
    }
}

#[test]
fn a_folder_of_one_pytorch_model_is_opened() {
    let dir = tempdir();
    fs_err::copy(golden("state_dict.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(weights.require("fc.weight", &[2, 3]).unwrap().shape, [2, 3]);
    assert!(weights.require("fc.weight", &[3, 2]).unwrap_err().to_string().contains("pytorch_model.bin"));
}

#[test]
fn golden_files_that_do_more_are_refused_by_name() {
    for (name, expected) in [
        ("code.pt", "the name posix.system"),
        ("object.pt", "the name __main__.Thing"),
        ("namespace.pt", "the name argparse.Namespace"),
        ("set.pt", "the name __builtin__.set"),
        ("legacy.pt", "before 1.6"),
        ("plain.pt", "a plain pickle"),
    ] {
        let message = message(&golden(name));
        assert!(message.contains(expected) && message.contains("from a source you trust"), "{message}");
        assert!(message.starts_with(&golden(name).display().to_string()), "{message}");
    }
    assert!(message(&golden("data_1.ckpt.gz")).contains("gzip"));
    assert!(message(&golden("contents.json")).contains("not a zip archive"));
}

#[test]
fn a_file_cut_or_damaged_anywhere_is_an_error_or_data() {
    let bytes = fs_err::read(golden("state_dict.bin")).unwrap();
    let read = |bytes: Vec<u8>| {
        let file = TorchFile::from_bytes("x.bin", bytes).ok()?;
        let tensors = file.root().entries()?.filter_map(|(_, value)| value.tensor());
        Some(tensors.map(|tensor| tensor.bytes().len()).sum::<usize>())
    };
    assert_eq!(read(bytes.clone()), Some((6 + 2 + 2 + 2) * 4));
    for length in 0..bytes.len() {
        assert_eq!(read(bytes[..length].to_vec()), None, "cut to {length} bytes");
    }
    for at in 0..bytes.len() {
        for bit in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= bit;
            // Whatever it then says: no panic, and no more elements than the file has bytes.
            assert!(read(damaged).unwrap_or(0) <= bytes.len());
        }
    }
}

/// The message for a pickle of these instructions, or what kind of value it makes.
fn run(pickle: &[u8]) -> String {
    let dir = tempdir();
    let path = dir.path().join("x.pt");
    torch_archive(&path, &[("data.pkl".to_owned(), pickle.to_vec()), ("data/0".to_owned(), vec![0; 16])]);
    TorchFile::open(&path).map_or_else(|error| error.to_string(), |file| file.root().kind().to_owned())
}

#[test]
fn a_pickle_that_lies_is_stopped() {
    let storage = |elements: &str| {
        let id = "((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu";
        let call = "ctorch._utils\n_rebuild_tensor_v2\n";
        format!("{call}{id}{elements}tQK\0").into_bytes()
    };
    let tensor = |sizes: &[u8]| [&storage("K\x04")[..], sizes, b"\x89N}tR."].concat();
    assert_eq!(run(&tensor(b"K\x04\x85K\x01\x85")), "a tensor");
    assert!(run(&tensor(b"K\x05\x85K\x01\x85")).contains("at element 0 of a storage of 4"));
    assert!(run(&tensor(b"K\x02K\x02\x86K\x03K\x01\x86")).contains("of a storage of 4"));
    assert!(run(&tensor(b"J\xff\xff\xff\x7f\x85K\0\x85")).contains("of a storage of 4"));
    assert!(run(&tensor(b"K\x02\x85)")).contains("of a storage of 4"));
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85";
    assert!(run(&tensor(huge)).contains("of a storage of 4"));
    let more = [&storage("J\x7f\x7f\0\0")[..], b"K\x01\x85K\x01\x85\x89N}tR."].concat();
    assert!(run(&more).contains("in 16 bytes"), "{}", run(&more));
}

#[test]
fn a_pickle_that_breaks_the_machine_is_damaged() {
    for (pickle, expected) in [
        (&b""[..], "ends in the middle"),
        (b".", "takes a value"),
        (b"X\xff\xff\xff\xffab", "in the middle of a text"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffab", "in the middle of a text"),
        (b"X\x01\0\0\0\xff.", "not UTF-8"),
        (b"t.", "never opened"),
        (b"N(0.", "instruction POP"),
        (b"K\x01(R", "takes a value"),
        (b"h\x05.", "never kept"),
        (b"K\x01K\x02a.", "no list"),
        (b"K\x01K\x02K\x03s.", "no dictionary"),
        (b"}(K\x01u.", "without a value"),
        (b"cposix\nsystem\n.", "the name posix.system"),
        (b"\x8c\x05posix\x8c\x06system\x93.", "the name posix.system"),
        (b"ctorch\nload\n.", "the name torch.load"),
        (b"c", "a name without an end"),
        (b"K\x01)R.", "no name"),
        (b"K\x01Q.", "no storage"),
        (b"K\x01}b.", "BUILD"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "no pairs"),
        (b")\x81.", "instruction NEWOBJ"),
        (b"\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.", "64 bits"),
    ] {
        let got = run(pickle);
        assert!(got.contains(expected), "{pickle:?}: {got}");
    }
}

/// A list that holds itself twice, again and again: 2^60 elements for whoever walks it.
#[test]
fn shared_and_circular_values_cost_what_they_take() {
    let mut doubling = b"]q\0".to_vec();
    for slot in 0..60u8 {
        doubling.extend([b']', b'q', slot + 1, b'(', b'h', slot, b'h', slot, b'e']);
    }
    doubling.push(b'.');
    assert_eq!(run(&doubling), "a list");
    assert_eq!(run(b"]q\0h\0a."), "a list");
    let deep = [&b"]".repeat(100_000)[..], &b"a".repeat(99_999), b"."].concat();
    assert_eq!(run(&deep), "a list");
}

#[test]
fn archives_that_are_not_torch_s_are_refused() {
    let dir = tempdir();
    let path = dir.path().join("x.pt");
    torch_archive(&path, &[("other".to_owned(), vec![1])]);
    assert!(message(&path).contains("without data.pkl"));
    torch_archive(
        &path,
        &[("data.pkl".to_owned(), b"N.".to_vec()), ("byteorder".to_owned(), b"big".to_vec())],
    );
    assert!(message(&path).contains("big-endian"));
    fs_err::write(&path, b"").unwrap();
    assert!(message(&path).contains("empty"));
}

#[test]
fn files_of_the_tests_are_like_torch_s() {
    let dir = tempdir();
    let path = dir.path().join("x.pt");
    let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    torch_file(&path, &[("a", "FloatStorage", &[2, 1], bytes), ("b", "BoolStorage", &[3], vec![1, 0, 1])]);
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.require("a", &[2, 1]).unwrap().to_f32(), [1.5, -2.0]);
    assert_eq!(weights.require("b", &[3]).unwrap().to_f32(), [1.0, 0.0, 1.0]);
}
