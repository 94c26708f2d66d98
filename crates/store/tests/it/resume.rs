//! A capture that was interrupted goes on where it stopped.

use std::path::Path;

use fs_err as fs;
use specforge_store::{Encoding, Error, Reader, Writer, WriterOptions};

use crate::support::{Row, files, put_files, tiny, write};

const PART: &str = "shard-00000-00001.part";
const SMALL: WriterOptions = WriterOptions { writer: 0, shard_bytes: 900 };

/// Rows 0 to 5 as a process leaves them that is killed: a finished shard of three, an unfinished one.
fn interrupted(folder: &Path, encoding: Encoding) -> Vec<Row> {
    let spec = tiny(encoding);
    let rows: Vec<Row> = (0..6).map(|row| Row::new(&spec, row, 1 + row as u32)).collect();
    let mut writer = Writer::open(folder, &spec, &SMALL).unwrap();
    rows.iter().for_each(|row| row.append(&mut writer, &spec).unwrap());
    drop(writer);
    rows
}

#[test]
fn cut_at_any_byte_whole_records_are_kept_and_the_rest_is_captured_again() {
    for encoding in [Encoding::Bf16, Encoding::Fp8] {
        let spec = tiny(encoding);
        let folder = tempfile::tempdir().unwrap();
        let rows = interrupted(folder.path(), encoding);
        let start = files(folder.path());
        let part = start[PART].clone();
        assert_eq!(part.len(), 64 + 3 * 256);

        let complete = tempfile::tempdir().unwrap();
        write(complete.path(), &spec, &SMALL, &[1, 2, 3, 4, 5, 6]);
        let complete = files(complete.path());

        for cut in 0..=part.len() {
            put_files(folder.path(), &start);
            fs::write(folder.path().join(PART), &part[..cut]).unwrap();
            let mut writer = Writer::open(folder.path(), &spec, &SMALL).unwrap();
            let whole = 3 + cut.saturating_sub(64) as u64 / 256;
            assert_eq!(
                writer.rows().iter().copied().collect::<Vec<_>>(),
                (0..whole).collect::<Vec<_>>(),
                "cut {cut}"
            );
            // Before it goes on, readers see the finished shard alone.
            if cut % 100 == 0 {
                assert_eq!(Reader::open(folder.path()).unwrap().rows(), [0, 1, 2]);
            }
            rows[whole as usize..].iter().for_each(|row| row.append(&mut writer, &spec).unwrap());
            if cut % 50 == 0 {
                writer.finish().unwrap();
                assert_eq!(files(folder.path()), complete, "cut {cut}");
                for name in ["bin", "idx"] {
                    fs::remove_file(folder.path().join(format!("shard-00000-00001.{name}"))).unwrap();
                }
            } else {
                drop(writer);
                assert_eq!(fs::read(folder.path().join(PART)).unwrap(), part, "cut {cut}");
            }
        }
    }
}

#[test]
fn damage_in_an_unfinished_shard_is_cut_off_too() {
    let folder = tempfile::tempdir().unwrap();
    interrupted(folder.path(), Encoding::Bf16);
    let start = files(folder.path());
    for at in 0..start[PART].len() {
        put_files(folder.path(), &start);
        let mut part = start[PART].clone();
        part[at] ^= 1 << (at % 8);
        fs::write(folder.path().join(PART), &part).unwrap();
        let writer = Writer::open(folder.path(), &tiny(Encoding::Bf16), &SMALL).unwrap();
        let whole = if at < 64 { 3 } else { 3 + (at - 64) / 256 };
        assert_eq!(writer.rows().len(), whole, "byte {at}");
    }
}

#[test]
fn a_crash_between_the_steps_of_finishing_loses_nothing() {
    let spec = tiny(Encoding::Bf16);
    let complete = tempfile::tempdir().unwrap();
    write(complete.path(), &spec, &SMALL, &[1, 2, 3, 4, 5, 6]);
    let complete = files(complete.path());
    let check = |prepare: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        put_files(folder.path(), &complete);
        prepare(folder.path());
        let writer = Writer::open(folder.path(), &spec, &SMALL).unwrap();
        assert_eq!(writer.rows().len(), 6);
        writer.finish().unwrap();
        assert_eq!(files(folder.path()), complete);
    };
    let remove = |folder: &Path, name: &str| fs::remove_file(folder.join(name)).unwrap();
    let (bin, idx) = ("shard-00000-00001.bin", "shard-00000-00001.idx");
    let before = tempfile::tempdir().unwrap();
    interrupted(before.path(), Encoding::Bf16);
    let manifest_before = || fs::read(before.path().join("manifest-00000.json")).unwrap();
    // Index written, shard not renamed yet.
    check(&|f| {
        fs::rename(f.join(bin), f.join(PART)).unwrap();
        fs::write(f.join("manifest-00000.json"), manifest_before()).unwrap();
    });
    // Renamed, not in the manifest yet.
    check(&|f| fs::write(f.join("manifest-00000.json"), manifest_before()).unwrap());
    // And things that people do.
    check(&|f| remove(f, "manifest-00000.json"));
    check(&|f| remove(f, idx));
    check(&|f| fs::write(f.join(idx), [0; 96]).unwrap());
    check(&|f| {
        remove(f, idx);
        remove(f, "manifest-00000.json");
    });
}

#[test]
fn a_lost_or_cut_shard_is_an_error_that_says_what_to_do() {
    let spec = tiny(Encoding::Bf16);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &spec, &SMALL, &[1, 2, 3, 4, 5, 6]);
    let start = files(folder.path());
    let last = "shard-00000-00001.bin";
    let check = |what: &str| {
        let opened = Reader::open(folder.path()).map(|_| ());
        let resumed = Writer::open(folder.path(), &spec, &SMALL).map(|_| ());
        for error in [opened.unwrap_err(), resumed.unwrap_err()] {
            let message = error.to_string();
            assert!(message.contains(last) && message.contains(what), "{message}");
            assert!(message.contains("manifest-00000.json and run the same capture again"), "{message}");
        }
    };
    for cut in 0..start[last].len() {
        fs::write(folder.path().join(last), &start[last][..cut]).unwrap();
        check(&format!("got {cut}"));
    }
    fs::remove_file(folder.path().join(last)).unwrap();
    check("missing");

    // What the message says works.
    fs::remove_file(folder.path().join("manifest-00000.json")).unwrap();
    let mut writer = Writer::open(folder.path(), &spec, &SMALL).unwrap();
    assert_eq!(writer.rows().len(), 3);
    for row in 3..6 {
        Row::new(&spec, row, 1 + row as u32).append(&mut writer, &spec).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), start);
}

#[test]
fn a_finished_store_is_extended() {
    let spec = tiny(Encoding::Lossless);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &spec, &WriterOptions::default(), &[3, 4]);
    let mut writer = Writer::open(folder.path(), &spec, &WriterOptions::default()).unwrap();
    assert!(writer.contains(0) && writer.contains(1) && !writer.contains(2));
    Row::new(&spec, 2, 9).append(&mut writer, &spec).unwrap();
    writer.finish().unwrap();
    let reader = Reader::open(folder.path()).unwrap();
    assert_eq!(reader.rows(), [0, 1, 2]);
    assert_eq!(reader.summary().shards, 2);
}

#[test]
fn an_empty_capture_is_a_store_without_rows() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("made/on/the/way");
    assert!(matches!(Reader::open(&folder), Err(Error::NotAStore { .. })));
    Writer::open(&folder, &tiny(Encoding::Bf16), &WriterOptions::default()).unwrap().finish().unwrap();
    let reader = Reader::open(&folder).unwrap();
    assert!(reader.rows().is_empty());
    assert_eq!(reader.summary().bytes_per_token, 0.0);
}
