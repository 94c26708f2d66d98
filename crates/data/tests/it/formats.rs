//! Files in other clothes: compressed, as Parquet, and what is neither.

use std::io::Write;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use specforge_data::{Error, OnError, PrepareConfig, Prepared, prepare};

use crate::fixture::{Fixture, row};

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 1).unwrap()
}

/// Conversations as the datasets library writes them: a list of structs, every level optional.
pub(crate) fn parquet(rows: &[Vec<(&str, &str)>], compression: Compression) -> Vec<u8> {
    let schema = "message schema {
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); optional binary name (UTF8);
        } } }
        optional binary image;
    }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut file = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut file, schema, properties).unwrap();
    // Two groups of rows.
    for rows in rows.chunks(rows.len().div_ceil(2)) {
        let repeated = |row: &Vec<_>| (0..row.len()).map(|index| i16::from(index > 0)).collect::<Vec<_>>();
        let repetition: Vec<i16> = rows.iter().flat_map(repeated).collect();
        let texts =
            |which: fn(&(&str, &str)) -> ByteArray| rows.iter().flatten().map(which).collect::<Vec<_>>();
        let mut group = writer.next_row_group().unwrap();
        let mut write = |values: &[ByteArray], level: i16, repetition: Option<&[i16]>, count: usize| {
            let mut column = group.next_column().unwrap().unwrap();
            let levels = vec![level; count];
            column.typed::<ByteArrayType>().write_batch(values, Some(&levels), repetition).unwrap();
            column.close().unwrap();
        };
        let count = repetition.len();
        write(&texts(|(role, _)| ByteArray::from(*role)), 4, Some(&repetition), count);
        write(&texts(|(_, content)| ByteArray::from(*content)), 4, Some(&repetition), count);
        write(&[], 3, Some(&repetition), count);
        write(&vec![ByteArray::from(vec![0xff, 0xd8]); rows.len()], 1, None, rows.len());
        group.close().unwrap();
    }
    writer.close().unwrap();
    file
}

fn three_rows() -> Vec<Vec<(&'static str, &'static str)>> {
    vec![
        vec![("user", "hello"), ("assistant", "well")],
        vec![("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        vec![("user", "é\u{0}"), ("assistant", "x \"y\"")],
    ]
}

fn jsonl(rows: &[Vec<(&str, &str)>]) -> String {
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let line =
        |row: &Vec<_>| format!("{}\n", json!({ "messages": row.iter().map(message).collect::<Vec<_>>() }));
    rows.iter().map(line).collect()
}

/// The first bytes say what a file is; its name says nothing.
#[test]
fn every_clothing_gives_the_same_set() {
    let fixture = Fixture::new();
    let text = jsonl(&three_rows());
    let expected = quiet(&fixture.config("plain.jsonl", &text)).unwrap();
    let array = format!("[{}]", text.trim_end().replace('\n', ","));
    let (first, rest) = text.split_at(40);
    let skippable = [b"\x50\x2a\x4d\x18\x02\0\0\0ab".as_slice(), &zstd(text.as_bytes())].concat();
    let clothes = [
        gzip(text.as_bytes()),
        zstd(text.as_bytes()),
        gzip(array.as_bytes()),
        [gzip(first.as_bytes()), gzip(rest.as_bytes())].concat(),
        [zstd(first.as_bytes()), zstd(rest.as_bytes())].concat(),
        skippable,
        parquet(&three_rows(), Compression::UNCOMPRESSED),
        parquet(&three_rows(), Compression::SNAPPY),
        parquet(&three_rows(), Compression::ZSTD(parquet::basic::ZstdLevel::default())),
        parquet(&three_rows(), Compression::GZIP(parquet::basic::GzipLevel::default())),
    ];
    for (index, content) in clothes.iter().enumerate() {
        let set = quiet(&fixture.config("named-wrongly.txt", content)).unwrap();
        assert_eq!((set.len(), set.hash()), (3, expected.hash()), "{index}");
    }
}

fn check(content: &[u8], expected: &[&str]) {
    let fixture = Fixture::new();
    for on_error in [OnError::Stop, OnError::Skip] {
        let error =
            quiet(&PrepareConfig { on_error, ..fixture.config("in.bin", content) }).unwrap_err().to_string();
        assert!(error.contains("in.bin") && expected.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn cut_off_and_damaged_files_say_where() {
    // Incompressible enough that cutting the end off leaves many whole rows.
    let text: String = (0..9000_u32).map(|i| row(&blake3::hash(&i.to_le_bytes()).to_hex(), "well")).collect();
    for pack in [gzip, zstd] {
        let packed = pack(text.as_bytes());
        check(&packed[..packed.len() - 3], &["in.bin:", "cut off or damaged"]);
        check(&packed[..packed.len() / 2], &["in.bin:", "cut off or damaged"]);
        check(&packed[..7], &["in.bin:1", "cut off or damaged"]);
        let mut flipped = packed.clone();
        let middle = flipped.len() / 2;
        flipped[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x55);
        // Either the unpacking notices at once, or a row is not JSON before the checksum is reached.
        let error = quiet(&Fixture::new().config("in.bin", &flipped)).unwrap_err().to_string();
        assert!(error.contains("in.bin"), "{error}");
    }
    let whole = parquet(&three_rows(), Compression::SNAPPY);
    check(&whole[..whole.len() - 1], &["not a whole Parquet file", "get it again"]);
    check(&whole[..40], &["not a whole Parquet file"]);
    check(b"PAR1", &["not a whole Parquet file"]);
    check(&gzip(&whole), &["a compressed Parquet file; unpack it"]);
}

/// Of a damaged Parquet file the user is told the error alone. In a process of its own, because what a panic prints is
/// one setting for all threads.
#[test]
fn no_damage_to_a_parquet_file_is_a_panic() {
    let ran = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "formats::a_damaged_parquet_file_ends_in_a_set_or_an_error"])
        .output()
        .unwrap();
    let [stdout, stderr] = [ran.stdout, ran.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(ran.status.success() && stdout.contains("1 passed"), "{stdout}{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn a_damaged_parquet_file_ends_in_a_set_or_an_error() {
    let whole = parquet(&three_rows(), Compression::SNAPPY);
    let fixture = Fixture::new();
    for at in (4..whole.len()).step_by(5) {
        let mut damaged = whole.clone();
        damaged[at] ^= [0x01, 0x80, 0xff][at % 3];
        if let Err(error) = quiet(&fixture.skipping("in.parquet", &damaged)) {
            let named = error.to_string().contains("in.parquet");
            assert!(named || matches!(error, Error::NothingKept { .. }), "{error}");
        }
    }
}

#[test]
fn other_kinds_of_files_are_named() {
    check(b"PK\x03\x04....", &["a zip archive; unpack it"]);
    check(b"BZh9....", &["bzip2; unpack it"]);
    check(b"\xfd7zXZ\0", &["xz; unpack it"]);
    check(b"ARROW1\0\0", &["not a whole Arrow file"]);
    check(b"\xff\xff\xff\xff\x10\0", &["not a whole Arrow file"]);
    check(b"\xff\xfe{\0", &["UTF-16 text; save it as UTF-8"]);
    check(b"version https://git-lfs.github.com/spec/v1\n", &["a Git LFS pointer"]);
}

#[test]
fn a_bad_row_of_a_parquet_file_is_named_by_its_number() {
    let fixture = Fixture::new();
    let mut rows = three_rows();
    rows[1][0].0 = "wizard";
    let content = parquet(&rows, Compression::SNAPPY);
    let error = quiet(&fixture.config("in.parquet", &content)).unwrap_err().to_string();
    assert!(error.contains("in.parquet:2: malformed row: message 1: unknown role `wizard`"), "{error}");
    let set = quiet(&fixture.skipping("in.parquet", &content)).unwrap();
    assert_eq!((set.len(), set.report().rows_read), (2, 3));
}

/// A line of 100 MB, which packs to almost nothing, is an error of its row.
#[test]
fn a_row_beyond_all_measure_is_an_error_of_its_row() {
    let fixture = Fixture::new();
    let long = row("hello", &"x".repeat(100 << 20));
    for (head, between, tail) in [("", "\n", ""), ("[\n", ",\n", "]")] {
        let good = row("hello", "well");
        let good = good.trim_end();
        let content =
            gzip(format!("{head}{good}{between}{}{between}{good}{tail}", long.trim_end()).as_bytes());
        let line = if head.is_empty() { 2 } else { 3 };
        let error = quiet(&fixture.config("in.gz", &content)).unwrap_err().to_string();
        assert!(
            error.contains(&format!("in.gz:{line}: malformed row: a row of more than 64 MiB")),
            "{error}"
        );
        let set = quiet(&fixture.skipping("in.gz", &content)).unwrap();
        assert_eq!((set.len(), set.report().rows_read, set.report().rows_dropped()), (2, 3, 1));
    }
}

/// Blank lines are counted, not kept.
#[test]
fn any_number_of_blank_lines_fits_into_memory() {
    let fixture = Fixture::new();
    let content = gzip(format!("{}{}{}", row("a", "b"), "\n".repeat(3_000_000), row("c", "d")).as_bytes());
    let set = quiet(&fixture.skipping("in.gz", &content)).unwrap();
    assert_eq!((set.len(), set.report().rows_read), (2, 3_000_002));
    assert_eq!((set.report().examples[0].line, set.report().examples[0].message.as_str()), (2, "empty line"));
}
