//! Several files, folders, patterns, weights and duplicates.

use std::path::Path;

use specforge_data::{DropReason, Error, PrepareConfig, Prepared, Source, prepare};

use crate::fixture::{Fixture, row};
use crate::formats::{gzip, parquet};

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

fn many(rows: usize) -> String {
    (0..rows).map(|index| row(&format!("hello {index}"), "well")).collect()
}

fn weighted(fixture: &Fixture, rows: usize, weight: f64, seed: u64) -> Prepared {
    let mut config = PrepareConfig { seed, ..fixture.config("in.jsonl", many(rows)) };
    config.inputs[0].weight = weight;
    quiet(&config).unwrap()
}

#[test]
fn a_weight_below_one_draws_and_one_above_repeats() {
    let fixture = Fixture::new();
    let half = weighted(&fixture, 1000, 0.5, 7);
    let report = half.report();
    assert!((400..600).contains(&half.len()), "{}", half.len());
    assert_eq!((report.rows_read, report.not_drawn), (1000, 1000 - half.len() as u64));
    assert_eq!(weighted(&fixture, 1000, 0.5, 7).hash(), half.hash());
    assert_ne!(weighted(&fixture, 1000, 0.5, 8).hash(), half.hash());

    let more = weighted(&fixture, 1000, 2.5, 7);
    assert_eq!(more.len(), 2000 + half.len());
    assert_eq!((more.report().repeated, more.report().not_drawn), (1000 + half.len() as u64, 0));
    assert_eq!(
        (more.row(0), more.row(2000 + half.len() - 1)),
        (more.row(1), more.row(2000 + half.len() - 2))
    );
    // Where nothing is drawn, the seed does not make another set.
    assert_eq!(weighted(&fixture, 20, 2.0, 1).key(), weighted(&fixture, 20, 2.0, 2).key());
    assert_ne!(weighted(&fixture, 20, 2.0, 1).key(), weighted(&fixture, 20, 1.0, 1).key());
}

#[test]
fn a_weight_out_of_range_is_named() {
    let fixture = Fixture::new();
    let mut config = fixture.config("in.jsonl", many(1));
    for (weight, got) in [(-1.0, "-1"), (f64::NAN, "NaN"), (1e9, "1000000000")] {
        config.inputs[0].weight = weight;
        assert_eq!(
            quiet(&config).unwrap_err().to_string(),
            format!("weight is {got}, expected from 0 to 1000")
        );
    }
}

/// Neither the order of the rows nor the division into files decides what is drawn.
#[test]
fn the_draw_is_by_content() {
    let fixture = Fixture::new();
    let texts = |set: &Prepared| {
        let mut rows: Vec<_> = set.rows().map(|row| row.ids.to_vec()).collect();
        rows.sort();
        rows
    };
    let content = many(100);
    let (first, second) = content.split_at(content.find(&row("hello 50", "well")).unwrap());
    let mut config = fixture.config("second.jsonl", second);
    config.inputs.push(fixture.write("first.jsonl", first).into());
    config.inputs.iter_mut().for_each(|input| input.weight = 0.3);
    assert_eq!(texts(&quiet(&config).unwrap()), texts(&weighted(&fixture, 100, 0.3, 0)));
}

#[test]
fn folders_and_patterns_are_searched() {
    let fixture = Fixture::new();
    for folder in ["set", "set/data", "set/.hidden", "arrow"] {
        fs_err::create_dir(fixture.folder.path().join(folder)).unwrap();
    }
    let rows = vec![vec![("user", "a"), ("assistant", "b")]; 2];
    fixture
        .write("set/data/train-00000-of-00002.parquet", parquet(&rows, parquet::basic::Compression::SNAPPY));
    fixture.write("set/data/train-00001-of-00002.jsonl.gz", gzip(many(3).as_bytes()));
    for other in ["set/README.md", "set/dataset_infos.json", "set/.hidden/x.jsonl"] {
        fixture.write(other, "{}");
    }
    let find = |path: &str| Source::from(fixture.folder.path().join(path)).files();
    let names = |path: &str| -> Vec<String> {
        let name = |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        find(path).unwrap().iter().map(name).collect()
    };
    let train = ["train-00000-of-00002.parquet", "train-00001-of-00002.jsonl.gz"];
    assert_eq!(names("set"), train);
    fixture.write("set/data/test-00000-of-00001.jsonl", many(1));
    assert_eq!(names("set"), train);
    assert_eq!(names("set/data/*.jsonl"), ["test-00000-of-00001.jsonl"]);
    assert_eq!(names("set/**/*.gz"), train[1..]);
    // A name that is there is no pattern.
    fixture.write("odd[1].jsonl", many(1));
    assert_eq!(names("odd[1].jsonl"), ["odd[1].jsonl"]);

    fixture.write("arrow/cache-1a2b.arrow", "");
    fixture.write("arrow/state.json", "{}");
    for (path, expected) in [
        ("arrow", "has no .jsonl, .json, .parquet or .arrow file"),
        ("set/*.csv", "no file matches"),
        ("[", "not a pattern"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ] {
        let error = find(path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(path), "{error}");
    }

    let mut config = fixture.config("in.jsonl", many(1));
    config.inputs = vec![fixture.folder.path().join("set").into()];
    let set = quiet(&config).unwrap();
    assert_eq!((set.len(), set.report().rows_read), (5, 5));
}

#[test]
fn duplicates_are_left_out_on_request_and_counted() {
    let fixture = Fixture::new();
    let mut config = fixture.config("a.jsonl", many(5) + &many(7));
    config.inputs.push(fixture.write("b.jsonl", many(8)).into());
    assert_eq!(quiet(&config).unwrap().len(), 20);
    config.deduplicate = true;
    let set = quiet(&config).unwrap();
    assert_eq!((set.len(), set.report().dropped[&DropReason::Duplicate]), (8, 12));
    assert_eq!(set.hash(), quiet(&fixture.config("c.jsonl", many(8))).unwrap().hash());
    // What a weight repeats is meant to be there twice.
    config.inputs[0].weight = 2.0;
    assert_eq!(quiet(&config).unwrap().len(), 15);
}

#[test]
fn an_error_names_the_file_of_a_folder() {
    let fixture = Fixture::new();
    let mut config = fixture.config("a.jsonl", many(2));
    config.inputs.push(fixture.write("b.jsonl", many(2) + "{\n").into());
    config.inputs = vec![fixture.folder.path().join("*.jsonl").into()];
    let error = quiet(&config).unwrap_err().to_string();
    assert!(error.contains("b.jsonl:3: malformed row"), "{error}");
    assert!(!Path::new(&config.cache).exists() || fs_err::read_dir(&config.cache).unwrap().next().is_none());
}
