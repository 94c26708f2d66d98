//! Several writers, several readers, at the same time.

use std::thread;

use specforge_store::{Encoding, Error, Reader, Writer, WriterOptions};

use crate::support::{Row, eagle3, noise, tiny};

fn options(writer: u32) -> WriterOptions {
    WriterOptions { writer, shard_bytes: 5000 }
}

#[test]
fn writers_share_a_folder_and_readers_see_all() {
    let folder = tempfile::tempdir().unwrap();
    let spec = eagle3(Encoding::Lossless);
    let row = |row: u64| Row::new(&spec, row, 1 + (noise(row, 1) * 40.0) as u32);
    thread::scope(|scope| {
        for writer in 0..4 {
            let (folder, spec, row) = (folder.path(), &spec, &row);
            scope.spawn(move || {
                let mut store = Writer::open(folder, spec, &options(writer)).unwrap();
                for i in 0..10 {
                    row(i * 4 + u64::from(writer)).append(&mut store, spec).unwrap();
                    Reader::open(folder).unwrap();
                }
                store.finish().unwrap();
            });
        }
    });
    let reader = Reader::open(folder.path()).unwrap();
    assert_eq!(reader.rows(), (0..40).collect::<Vec<_>>());
    thread::scope(|scope| {
        for thread in 0..4 {
            let (reader, row) = (&reader, &row);
            scope.spawn(move || {
                for i in 0..100 {
                    let row = row((noise(i, thread) * 40.0) as u64);
                    row.assert_same(&reader.record(row.number).unwrap());
                }
            });
        }
    });
}

#[test]
fn a_writer_number_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny(Encoding::Bf16);
    let first = Writer::open(folder.path(), &spec, &options(5)).unwrap();
    let error = Writer::open(folder.path(), &spec, &options(5)).unwrap_err();
    assert!(matches!(error, Error::InUse { writer: 5, .. }));
    assert!(error.to_string().contains("in use: another process writes as writer 5"), "{error}");
    Writer::open(folder.path(), &spec, &options(6)).unwrap();
    drop(first);
    Writer::open(folder.path(), &spec, &options(5)).unwrap();
}

#[test]
fn fewer_writers_than_before_know_what_the_others_finished() {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny(Encoding::Bf16);
    for writer in 0..3 {
        let mut store = Writer::open(folder.path(), &spec, &options(writer)).unwrap();
        Row::new(&spec, u64::from(writer), 4).append(&mut store, &spec).unwrap();
        store.finish().unwrap();
    }
    let writer = Writer::open(folder.path(), &spec, &options(0)).unwrap();
    assert_eq!(writer.rows().iter().copied().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_row_that_two_writers_captured_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny(Encoding::Bf16);
    let mut writers = [1, 0].map(|w| Writer::open(folder.path(), &spec, &options(w)).unwrap());
    for (i, writer) in writers.iter_mut().enumerate() {
        Row::new(&spec, 9, 4 + i as u32).append(writer, &spec).unwrap();
    }
    writers.into_iter().for_each(|w| w.finish().unwrap());
    let reader = Reader::open(folder.path()).unwrap();
    assert_eq!(reader.rows(), [9]);
    assert_eq!(reader.record(9).unwrap().len(), 5, "of the writer with the lowest number");
    assert_eq!((reader.summary().duplicates, reader.summary().tokens), (1, 5));
    assert_eq!(reader.verify(&|_, _| ()).unwrap().records, 2);
}
