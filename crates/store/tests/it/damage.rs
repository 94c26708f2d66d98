//! Damaged and hostile files: errors, never panics, never wrong values.

use std::{collections::BTreeMap, path::Path};

use fs_err as fs;
use serde_json::{Value, json};
use specforge_store::{Encoding, Error, Reader, Verify, WriterOptions};

use crate::support::{files, put_files, tiny, write};

const SHARD: &str = "shard-00000-00000.bin";
const INDEX: &str = "shard-00000-00000.idx";
const SHARDS: &str = "manifest-00000.json";

fn store(encoding: Encoding) -> (tempfile::TempDir, BTreeMap<String, Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &tiny(encoding), &WriterOptions::default(), &[1, 40, 3]);
    let files = files(folder.path());
    (folder, files)
}

/// Rows that are damaged, or the error on opening.
fn damaged(folder: &Path) -> Result<Vec<u64>, Error> {
    let report = Reader::open(folder)?.verify(&|_, _| ())?;
    Ok(report.damaged.iter().map(|d| d.row).collect())
}

#[test]
fn every_flipped_bit_of_every_file_is_found() {
    for encoding in [Encoding::Bf16, Encoding::Fp8, Encoding::Lossless] {
        let (folder, files) = store(encoding);
        assert!(damaged(folder.path()).unwrap().is_empty());
        for (name, bytes) in files.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            let mut flipped = bytes.clone();
            for at in 0..bytes.len() {
                flipped[at] ^= 1 << (at % 8);
                fs::write(folder.path().join(name), &flipped).unwrap();
                let found = damaged(folder.path());
                assert!(!matches!(&found, Ok(rows) if rows.is_empty()), "byte {at} of {name}");
                if name == SHARD && at >= 64 {
                    check_one_record(folder.path(), &found.unwrap());
                }
                flipped[at] = bytes[at];
            }
            fs::write(folder.path().join(name), bytes).unwrap();
        }
    }
}

/// The damaged record, and no other, is an error when it is read.
fn check_one_record(folder: &Path, damaged: &[u64]) {
    assert_eq!(damaged.len(), 1);
    for verify in [Verify::Once, Verify::Always] {
        let reader = Reader::open_with(folder, verify).unwrap();
        for row in [0, 1, 2, damaged[0]] {
            let record = reader.record(row);
            assert_eq!(record.is_err(), row == damaged[0]);
            if let Err(error) = record {
                let message = error.to_string();
                assert!(
                    message.contains(SHARD) && message.contains(&format!("row {row} at byte ")),
                    "{message}"
                );
            }
        }
    }
}

#[test]
fn without_verification_damaged_payloads_do_not_panic() {
    for encoding in [Encoding::Bf16, Encoding::Fp8, Encoding::Lossless] {
        let (folder, files) = store(encoding);
        let mut flipped = files[SHARD].clone();
        for at in 64..flipped.len() {
            flipped[at] ^= 0xff;
            fs::write(folder.path().join(SHARD), &flipped).unwrap();
            let reader = Reader::open_with(folder.path(), Verify::Never).unwrap();
            for row in 0..3 {
                // Values or an error; which is not said, the checksum was not asked for.
                let _ = reader.record(row).and_then(|r| r.field_bf16("hidden_states").map(|v| v.len()));
            }
            flipped[at] = files[SHARD][at];
        }
    }
}

#[test]
fn any_file_cut_at_any_byte_is_an_error() {
    let (folder, files) = store(Encoding::Bf16);
    for (name, bytes) in files.iter().filter(|(_, bytes)| !bytes.is_empty()) {
        for cut in 0..bytes.len() {
            fs::write(folder.path().join(name), &bytes[..cut]).unwrap();
            let error = damaged(folder.path()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        fs::remove_file(folder.path().join(name)).unwrap();
        // Without its list of shards a writer has none; any other file is missed.
        assert_eq!(damaged(folder.path()).is_ok(), name == SHARDS, "without {name}");
        fs::write(folder.path().join(name), bytes).unwrap();
    }
}

/// Changes a manifest and gives it the right checksum, as a hostile program would.
fn forge(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap();
    change(&mut value);
    let Some(members) = value.as_object_mut() else {
        return fs::write(folder.join(name), value.to_string()).unwrap();
    };
    members.remove("crc32");
    let text = serde_json::to_string_pretty(&value).unwrap();
    let body = format!("{},\n", text.strip_suffix("\n}").unwrap());
    let crc = crc32fast::hash(body.as_bytes());
    fs::write(folder.join(name), format!("{body}  \"crc32\": \"{crc:08x}\"\n}}\n")).unwrap();
}

#[test]
fn hostile_manifests_are_errors() {
    let (folder, files) = store(Encoding::Bf16);
    let check = |name: &str, expected: &str, change: &dyn Fn(&mut Value)| {
        put_files(folder.path(), &files);
        forge(folder.path(), name, change);
        let message = damaged(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    forge(folder.path(), SHARDS, |_| ());
    forge(folder.path(), "manifest.json", |_| ());
    assert_eq!(crate::support::files(folder.path()), files, "forging changes nothing else");

    let set = |pointer: &'static str, value: Value| {
        move |manifest: &mut Value| *manifest.pointer_mut(pointer).unwrap() = value.clone()
    };
    let file = "expected file shard-00000-00000.bin";
    check(SHARDS, file, &set("/shards/0/file", json!("../../etc/passwd")));
    check(SHARDS, file, &set("/shards/0/file", json!("/etc/passwd")));
    check(SHARDS, file, &set("/shards/0/file", json!("shard-00001-00000.bin")));
    check(SHARDS, "expected file shard-00000-00007.bin", &set("/shards/0/number", json!(7)));
    check(SHARDS, "invalid value", &set("/shards/0/number", json!(-1)));
    check(SHARDS, "bytes, got", &set("/shards/0/bytes", json!(u64::MAX)));
    check(SHARDS, "the manifest has 18446744073709551615", &set("/shards/0/records", json!(u64::MAX)));
    check(SHARDS, "44 tokens, the manifest has 3 and 0", &set("/shards/0/tokens", json!(0)));
    check(SHARDS, "invalid type", &set("/shards/0/bytes", json!("many")));
    check(SHARDS, "invalid type", &set("/shards", json!(3)));
    check(SHARDS, "expected writer 0", &set("/writer", json!(1)));
    check(SHARDS, "expected writer 0 of store", &set("/id", json!("00000000")));
    check(SHARDS, "missing field `writer`", &|m| drop(m.as_object_mut().unwrap().remove("writer")));
    check(SHARDS, "out of order", &|m| {
        let twice = m["shards"][0].clone();
        m["shards"].as_array_mut().unwrap().push(twice);
    });
    check("manifest.json", "format is \"zip\"", &set("/format", json!("zip")));
    check("manifest.json", "format is null", &|m| *m = json!([1, 2]));
    check("manifest.json", "has format version 2, this program reads version 1", &set("/version", json!(2)));
    check("manifest.json", "invalid type", &set("/version", json!("1")));
    check("manifest.json", "unknown variant `int4`", &set("/encoding", json!("int4")));
    check("manifest.json", "got 4294967295", &set("/schema/0/width", json!(u32::MAX)));
    check("manifest.json", "1 to 64 fields, got 0", &set("/schema", json!([])));
    check("manifest.json", "id is", &set("/identity/max_length", json!(1)));
    check("manifest.json", "missing field `identity`", &|m| {
        drop(m.as_object_mut().unwrap().remove("identity"));
    });
    check("manifest.json", "unknown field `more`", &|m| m["more"] = json!(1));
}

/// Writes a number into a file and makes the checksums right again.
fn forge_binary(folder: &Path, at: usize, value: &[u8], in_index: bool) {
    let name = if in_index { INDEX } else { SHARD };
    let mut bytes = fs::read(folder.join(name)).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
    let seal = |bytes: &mut [u8], from: usize, to: usize| {
        let crc = crc32fast::hash(&bytes[from..to]);
        bytes[to..to + 4].copy_from_slice(&crc.to_le_bytes());
        crc
    };
    if in_index {
        let table = crc32fast::hash(&bytes[64..]);
        bytes[48..52].copy_from_slice(&table.to_le_bytes());
        seal(&mut bytes, 0, 60);
        return fs::write(folder.join(name), &bytes).unwrap();
    }
    let crc = seal(&mut bytes, 64, 64 + 124);
    fs::write(folder.join(name), &bytes).unwrap();
    forge_binary(folder, 64 + 28, &crc.to_le_bytes(), true);
}

#[test]
fn hostile_record_headers_are_errors() {
    let (folder, files) = store(Encoding::Lossless);
    let check = |at: usize, value: &[u8], expected: &str| {
        put_files(folder.path(), &files);
        forge_binary(folder.path(), 64 + at, value, false);
        let reader = Reader::open(folder.path()).unwrap();
        let message = reader.record(0).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        let report = reader.verify(&|_, _| ()).unwrap();
        assert_eq!(report.damaged.iter().map(|d| (d.offset, d.row)).collect::<Vec<_>>(), [(64, 0)]);
    };
    let max = u64::MAX.to_le_bytes();
    check(0, b"NOTHING!", "no record starts here");
    check(8, &max, "the index does not fit it");
    check(16, &max, "its fields add up to 256");
    check(24, &max[..4], "field input_ids: 4 bytes of encoding 0 for 4294967295 tokens");
    check(24, &[0; 4], "without tokens");
    check(28, &max[..4], "4294967295 fields, the schema has 2");
    check(32, &max[..4], "checksum of the record does not match");
    check(40, &[1], "field input_ids: 4 bytes of encoding 1");
    check(44, &[1], "field input_ids");
    check(48, &max, "field input_ids: 18446744073709551615 bytes");
    check(56, &[9], "field hidden_states: 4 bytes of encoding 9");
    check(64, &max, "field hidden_states");
}

#[test]
fn hostile_indices_are_errors() {
    let (folder, files) = store(Encoding::Bf16);
    let check = |at: usize, value: &[u8], expected: &str| {
        put_files(folder.path(), &files);
        forge_binary(folder.path(), at, value, true);
        let message = Reader::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains(INDEX), "{message}");
    };
    let max = u64::MAX.to_le_bytes();
    check(8, &[2], "no index of this shard");
    check(24, &max, "says 18446744073709551615 records and has room for 3");
    check(32, &max, "for a shard of 18446744073709551615 bytes");
    check(40, &max, "says 18446744073709551615 tokens");
    check(64 + 8, &max, "does not follow");
    check(64 + 16, &(u64::MAX - 63).to_le_bytes(), "overflow");
    check(64 + 16, &[0; 8], "does not follow");
    check(64 + 64 + 16, &1024u64.to_le_bytes(), "records end at byte");
}
