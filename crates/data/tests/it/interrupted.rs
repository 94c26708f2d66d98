//! A preparation that is stopped goes on where it was, and ends in the same bits.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use specforge_data::{Error, OnError, PrepareConfig, Prepared, prepare};

use crate::fixture::{Fixture, files, row};

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

/// Rows of which some are bad, some equal to earlier ones and some weighted, in two files of several pieces each.
fn config(fixture: &Fixture, cache: &str) -> PrepareConfig {
    let rows = |from: usize, distinct: usize| -> String {
        let bad = |index: usize| if index.is_multiple_of(97) { "{\n".to_owned() } else { String::new() };
        let row = |index: usize| row(&format!("hello {}", index % distinct), "well") + &bad(index);
        (from..from + 4500).map(row).collect()
    };
    let mut config = fixture.config("a.jsonl", rows(0, 3000));
    config.inputs.push(fixture.write("b.jsonl", rows(2000, 9000)).into());
    config.inputs[1].weight = 1.5;
    PrepareConfig {
        deduplicate: true,
        on_error: OnError::Skip,
        cache: fixture.folder.path().join(cache),
        ..config
    }
}

fn names(cache: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs_err::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Stops a preparation when it reports progress for the `at`-th time, as a kill does: nothing is tidied up.
fn stop(config: &PrepareConfig, at: usize) {
    let calls = Cell::new(0);
    let progress = |_, _| {
        calls.set(calls.get() + 1);
        // Not a panic of a test: no message.
        if calls.get() == at {
            std::panic::resume_unwind(Box::new(()));
        }
    };
    assert!(catch_unwind(AssertUnwindSafe(|| prepare(config, &progress))).is_err(), "ended before {at}");
}

fn work(config: &PrepareConfig) -> PathBuf {
    let names = names(&config.cache);
    let [name] = &names[..] else { panic!("{names:?}") };
    let work = config.cache.join(name);
    assert_eq!(work.extension().unwrap(), "work");
    work
}

#[test]
fn the_rest_is_done_and_the_bits_are_the_same() {
    let fixture = Fixture::new();
    let whole = quiet(&config(&fixture, "whole")).unwrap();
    let expected = files(whole.folder());
    assert!(whole.report().rows_dropped() > 1500 && whole.report().repeated > 0, "{:?}", whole.report());
    for at in 1..=6 {
        let config = config(&fixture, &format!("stopped-{at}"));
        stop(&config, at);
        work(&config);
        let set = quiet(&config).unwrap();
        assert!(files(set.folder()) == expected, "stopped at {at}");
        assert_eq!(names(&config.cache), [set.key()]);
    }
}

/// What is committed is not made again: a mark that is put there stays.
#[test]
fn what_is_committed_is_kept() {
    let fixture = Fixture::new();
    let config = PrepareConfig { deduplicate: false, ..config(&fixture, "marked") };
    stop(&config, 2);
    let rows = work(&config).join("set/rows.bin");
    let mut bytes = fs_err::read(&rows).unwrap();
    bytes[16] ^= 1;
    fs_err::write(&rows, bytes).unwrap();
    let whole = PrepareConfig { cache: fixture.folder.path().join("whole"), ..config.clone() };
    let (set, whole) = (quiet(&config).unwrap(), quiet(&whole).unwrap());
    assert_eq!(set.row(0).ids[0], whole.row(0).ids[0] ^ 1);
    assert_eq!(set.len(), whole.len());
}

/// A folder that says nothing, or promises more than is there, is begun again.
#[test]
fn a_damaged_beginning_is_made_again() {
    let fixture = Fixture::new();
    let expected = files(quiet(&config(&fixture, "whole")).unwrap().folder());
    let damage: [fn(&Path); 5] = [
        |work| fs_err::write(work.join("progress.json"), "{").unwrap(),
        |work| fs_err::remove_file(work.join("progress.json")).unwrap(),
        |work| fs_err::write(work.join("set/rows.bin"), "SF").unwrap(),
        |work| fs_err::write(work.join("set/index.bin"), "").unwrap(),
        |work| fs_err::remove_dir_all(work.join("set")).unwrap(),
    ];
    for (index, damage) in damage.iter().enumerate() {
        let config = config(&fixture, &format!("damaged-{index}"));
        stop(&config, 3);
        damage(&work(&config));
        assert!(files(quiet(&config).unwrap().folder()) == expected, "{index}");
    }
}

/// Several processes that want the same set make it once; here they are threads.
#[test]
fn who_comes_second_waits_and_opens_the_same_set() {
    let fixture = Fixture::new();
    let config = config(&fixture, "shared");
    let sets: Vec<Prepared> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| quiet(&config).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(sets.iter().all(|set| set.hash() == sets[0].hash()));
    assert_eq!(names(&config.cache), [sets[0].key()]);
}

/// What was left by a stop and is asked for no more goes after a day, unless somebody holds it.
#[test]
fn what_nobody_goes_on_with_is_removed() {
    let fixture = Fixture::new();
    let config = config(&fixture, "left");
    stop(&config, 3);
    let (old, other) = (work(&config), PrepareConfig { min_supervised: 2, ..config.clone() });
    let ask = |min_supervised: usize| {
        quiet(&PrepareConfig { min_supervised, ..config.clone() }).unwrap();
        old.exists()
    };
    assert!(ask(2), "it is of today");
    let days_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(72);
    for path in [old.clone(), old.join("set")] {
        for entry in fs_err::read_dir(path).unwrap() {
            let file = std::fs::File::open(entry.unwrap().path()).unwrap();
            file.set_modified(days_ago).unwrap();
        }
    }
    let lock = std::fs::File::open(old.join("lock")).unwrap();
    lock.lock().unwrap();
    assert!(ask(3), "it is held");
    drop(lock);
    quiet(&other).unwrap();
    assert!(old.exists(), "nothing was prepared");
    assert!(!ask(4));
    assert_eq!(names(&config.cache).len(), 3);
}

/// An error is not a stop: nothing is left.
#[test]
fn an_error_leaves_nothing() {
    let fixture = Fixture::new();
    let config = PrepareConfig { on_error: OnError::Stop, ..config(&fixture, "failed") };
    assert!(quiet(&config).is_err());
    assert_eq!(names(&config.cache), [""; 0]);
}
