//! `docs/reference/feature-store.md` shows the bytes that are really written.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use fs_err as fs;
use half::bf16;
use specforge_store::{Encoding, Spec, Values, Writer, WriterOptions};

use crate::support::tiny;

fn document() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/feature-store.md");
    fs::read_to_string(path).unwrap()
}

/// The code block with this info string.
fn block(info: &str) -> String {
    let (document, fence) = (document(), format!("```{info}\n"));
    let (_, after) =
        document.split_once(&fence).unwrap_or_else(|| panic!("the document has no block {info}"));
    after.split_once("```").unwrap().0.to_owned()
}

/// The store of the document: one row, number 5, of three tokens.
fn store(folder: &Path, encoding: Encoding) -> Spec {
    let spec = tiny(encoding);
    let hidden = [1.0, -2.0, 0.5, 0.0, 3.0, 100.0].map(bf16::from_f32);
    let mut writer = Writer::open(folder, &spec, &WriterOptions::default()).unwrap();
    let fields = [("input_ids", Values::U32(&[1, 258, 3])), ("hidden_states", Values::Bf16(&hidden))];
    writer.append(5, 3, &fields).unwrap();
    writer.finish().unwrap();
    spec
}

fn hexdump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (i, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
        writeln!(out, "{:04x}  {}", i * 16, hex.join(" ")).unwrap();
    }
    out
}

#[track_caller]
fn check(info: &str, actual: &str) {
    assert!(block(info) == actual, "the document is stale; block {info} should be\n{actual}");
}

#[test]
fn hexdumps_of_the_document_are_the_bytes_written() {
    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), Encoding::Bf16);
    check("hexdump shard", &hexdump(&fs::read(folder.path().join("shard-00000-00000.bin")).unwrap()));
    check("hexdump index", &hexdump(&fs::read(folder.path().join("shard-00000-00000.idx")).unwrap()));
    check("json shards", &fs::read_to_string(folder.path().join("manifest-00000.json")).unwrap());

    // The version of the program, and so the checksum, change with every release.
    let lasting = |text: &str| {
        let lines = text.lines().filter(|l| !l.contains("\"created_by\"") && !l.contains("\"crc32\""));
        lines.collect::<Vec<_>>().join("\n")
    };
    let manifest = fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    assert!(lasting(&block("json manifest")) == lasting(&manifest), "the document is stale:\n{manifest}");

    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), Encoding::Fp8);
    let shard = fs::read(folder.path().join("shard-00000-00000.bin")).unwrap();
    check("hexdump fp8", &hexdump(&shard[64 + 128 + 64..]));
}
