//! What is written is what is read.

use std::borrow::Cow;

use half::bf16;
use specforge_store::{
    DType, Encoding, Error, Field, Reader, Schema, Spec, Values, Verify, Writer, WriterOptions,
};

use crate::support::{Row, bits, eagle3, files, identity, noise, tiny, write};

fn lens() -> Vec<u32> {
    [1, 2, 63, 64, 65, 300].into_iter().chain((0..40).map(|i| 1 + (noise(i, 9) * 90.0) as u32)).collect()
}

fn check(encoding: Encoding, shard_bytes: u64, same: impl Fn(&Row, &specforge_store::Record<'_>)) {
    let folder = tempfile::tempdir().unwrap();
    let spec = eagle3(encoding);
    let rows = write(folder.path(), &spec, &WriterOptions { writer: 3, shard_bytes }, &lens());
    let reader = Reader::open(folder.path()).unwrap();
    assert_eq!(reader.rows(), (0..lens().len() as u64).collect::<Vec<_>>());
    assert_eq!(reader.spec(), &spec);
    for row in rows.iter().rev().chain(&rows) {
        same(row, &reader.record(row.number).unwrap());
        assert_eq!(reader.row_len(row.number).unwrap(), row.len as usize);
        reader.prefetch(row.number);
    }
    let report = reader.verify(&|done, total| assert!(done <= total)).unwrap();
    assert_eq!((report.records, report.damaged.len()), (rows.len() as u64, 0));
}

#[test]
fn bf16_and_lossless_are_exact_in_one_shard_or_many() {
    for encoding in [Encoding::Bf16, Encoding::Lossless] {
        for shard_bytes in [0, 20_000, 1 << 30] {
            check(encoding, shard_bytes, Row::assert_same);
        }
    }
}

#[test]
fn fp8_is_within_a_sixteenth_of_the_largest_value_of_a_token() {
    check(Encoding::Fp8, 20_000, |row, record| {
        row.assert_same_but_bf16(record);
        for (name, values) in &row.bf16s {
            let width = values.len() / row.len as usize;
            let stored = record.field_bf16(name).unwrap();
            for (values, stored) in values.chunks(width).zip(stored.chunks(width)) {
                let largest = values.iter().map(|v| v.to_f32().abs()).fold(0.0, f32::max);
                for (a, b) in values.iter().zip(stored) {
                    let (a, b) = (a.to_f32(), b.to_f32());
                    // Half a unit of e4m3 (2^-4 of the value), and of its subnormals; and of bf16.
                    let bound = a.abs() * (2f32.powi(-4) + 2f32.powi(-8)) + largest / 448.0 * 2f32.powi(-10);
                    assert!((a - b).abs() <= bound, "{a} came back as {b}, largest {largest}");
                }
            }
        }
    });
}

#[test]
fn every_bf16_bit_pattern_survives_bf16_and_lossless() {
    for encoding in [Encoding::Bf16, Encoding::Lossless] {
        let folder = tempfile::tempdir().unwrap();
        let schema = Schema::new(vec![Field::new("x", DType::Bf16, 256)]).unwrap();
        let spec = Spec { schema, encoding, identity: identity() };
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut writer = Writer::open(folder.path(), &spec, &WriterOptions::default()).unwrap();
        writer.append(0, 256, &[("x", Values::Bf16(&all))]).unwrap();
        writer.finish().unwrap();
        let reader = Reader::open(folder.path()).unwrap();
        let mut out = vec![bf16::ZERO; all.len()];
        reader.record(0).unwrap().decode_bf16_into("x", &mut out).unwrap();
        assert_eq!(bits(&out), bits(&all));
    }
}

#[test]
fn plain_fields_are_borrowed_and_aligned_and_others_decoded() {
    for (encoding, borrowed) in [(Encoding::Bf16, true), (Encoding::Fp8, false)] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &eagle3(encoding), &WriterOptions::default(), &[5, 9]);
        let reader = Reader::open(folder.path()).unwrap();
        let record = reader.record(1).unwrap();
        let hidden = record.field_bf16("hidden_states").unwrap();
        assert_eq!(matches!(hidden, Cow::Borrowed(_)), borrowed);
        assert_eq!(record.field_u32("teacher_argmax").unwrap().as_ptr().addr() % 64, 0);
        if borrowed {
            assert_eq!(hidden.as_ptr().addr() % 64, 0);
        }
        let mut out = vec![bf16::ZERO; hidden.len()];
        record.decode_bf16_into("hidden_states", &mut out).unwrap();
        assert_eq!(bits(&out), bits(&hidden));
    }
}

#[test]
fn same_rows_same_bytes() {
    for encoding in [Encoding::Bf16, Encoding::Fp8, Encoding::Lossless] {
        let options = WriterOptions { writer: 0, shard_bytes: 10_000 };
        let stores = [(), ()].map(|()| {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &eagle3(encoding), &options, &lens());
            files(folder.path())
        });
        assert!(stores[0].len() > 10);
        assert_eq!(stores[0], stores[1]);
    }
}

#[test]
fn summary_and_estimate_agree_with_the_files() {
    for encoding in [Encoding::Bf16, Encoding::Fp8] {
        let folder = tempfile::tempdir().unwrap();
        let spec = eagle3(encoding);
        write(folder.path(), &spec, &WriterOptions::default(), &lens());
        let summary = Reader::open(folder.path()).unwrap().summary();
        let on_disk = |ext: &str| {
            let all = files(folder.path()).into_iter().filter(|(name, _)| name.ends_with(ext));
            all.map(|(_, bytes)| bytes.len() as u64).sum::<u64>()
        };
        let tokens = lens().iter().sum::<u32>() as u64;
        assert_eq!((summary.rows, summary.tokens, summary.shards), (lens().len() as u64, tokens, 1));
        assert_eq!(summary.bytes, on_disk(".bin") + on_disk(".idx"));
        assert_eq!(summary.rows_expected, 100);
        assert_eq!(summary.bytes_per_token, summary.bytes as f64 / tokens as f64);
        let plain = (5 + 2 * 32 + 4 + 4) * tokens;
        assert_eq!(summary.compression, on_disk(".bin") as f64 / plain as f64);
        let estimate = spec.schema.estimated_bytes(encoding, summary.rows, tokens) as f64;
        assert!((estimate / summary.bytes as f64 - 1.0).abs() < 0.05, "{estimate} against {}", summary.bytes);
    }
}

#[test]
fn lossless_shrinks_what_has_structure() {
    let folder = tempfile::tempdir().unwrap();
    let spec = eagle3(Encoding::Lossless);
    write(folder.path(), &spec, &WriterOptions::default(), &[2000; 3]);
    let compression = Reader::open(folder.path()).unwrap().summary().compression;
    assert!(compression < 0.85, "{compression}");
}

#[test]
fn wrong_fields_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny(Encoding::Fp8);
    let mut writer = Writer::open(folder.path(), &spec, &WriterOptions::default()).unwrap();
    let two = [bf16::ONE; 4];
    let mut check = |len: u32, fields: &[(&str, Values<'_>)], expected: &str| {
        let message = writer.append(7, len, fields).unwrap_err().to_string();
        assert!(message.contains("row 7") && message.contains(expected), "{message}");
    };
    let ids = ("input_ids", Values::U32(&[1, 2]));
    check(
        2,
        &[ids],
        "field hidden_states: expected hidden_states bf16 x 2 of 2 tokens (4 values), got nothing",
    );
    check(2, &[("ids", ids.1), ("hidden_states", Values::Bf16(&two))], "got ids u32 (2 values)");
    check(2, &[ids, ("hidden_states", Values::Bf16(&two[1..]))], "got hidden_states bf16 (3 values)");
    check(2, &[ids, ("hidden_states", Values::F32(&[0.0; 4]))], "got hidden_states f32");
    check(
        2,
        &[ids, ("hidden_states", Values::Bf16(&two)), ("x", ids.1)],
        "field number 3: expected nothing, got x",
    );
    check(0, &[("input_ids", Values::U32(&[])), ("hidden_states", Values::Bf16(&[]))], "at least one token");
    let bad = [bf16::ONE, bf16::ONE, bf16::ONE, bf16::NAN];
    check(2, &[ids, ("hidden_states", Values::Bf16(&bad))], "field hidden_states, token 1: value is NaN");

    writer.append(7, 2, &[ids, ("hidden_states", Values::Bf16(&two))]).unwrap();
    let again = writer.append(7, 2, &[ids, ("hidden_states", Values::Bf16(&two))]);
    assert!(matches!(again, Err(Error::DuplicateRow { row: 7 })));
    writer.finish().unwrap();

    let reader = Reader::open_with(folder.path(), Verify::Always).unwrap();
    let record = reader.record(7).unwrap();
    let message = record.field_bf16("hidden").unwrap_err().to_string();
    assert!(message.contains("field hidden: expected one of input_ids, hidden_states"), "{message}");
    let message = record.field_f32("input_ids").unwrap_err().to_string();
    assert!(message.contains("expected u32, got f32"), "{message}");
    let message = record.decode_bf16_into("hidden_states", &mut [bf16::ZERO; 5]).unwrap_err().to_string();
    assert!(message.contains("expected room for 2 x 2 values, got 5"), "{message}");
    assert!(matches!(reader.record(8), Err(Error::NoSuchRow { row: 8, .. })));
}
