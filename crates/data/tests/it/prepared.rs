//! Prepared sets: content, order, cache, split.

use std::cell::RefCell;

use serde_json::json;
use specforge_data::{
    Error, PrepareConfig, Prepared, RowFormat, SpanSource, TemplateOptions, Warning, prepare, runs,
};

use crate::fixture::{Fixture, files, row};

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

fn many(rows: usize) -> String {
    (0..rows).map(|index| row(&format!("hello {index}"), &"well ".repeat(index % 7 + 1))).collect()
}

#[test]
fn rows_keep_their_order_and_mask() {
    let fixture = Fixture::new();
    let set = quiet(&fixture.config("in.jsonl", many(50))).unwrap();
    let tokenizer = fixture.tokenizer();
    assert_eq!(set.len(), 50);
    for (index, row) in set.rows().enumerate() {
        let runs = runs(&tokenizer, row).unwrap();
        let texts: Vec<_> = runs.iter().map(|run| (run.text.clone(), run.supervised)).collect();
        let prompt = format!("<|im_start|>user\nhello {index}<|im_end|>\n<|im_start|>assistant\n");
        let answer = format!("{}<|im_end|>\n", "well ".repeat(index % 7 + 1));
        assert_eq!(texts, [(prompt, false), (answer, true)]);
        assert_eq!(
            set.lengths(index),
            (row.ids.len(), row.loss_mask.iter().map(|&bit| usize::from(bit)).sum())
        );
    }
    let report = set.report();
    assert_eq!((report.rows_read, report.rows_kept, report.rows_dropped()), (50, 50, 0));
    assert_eq!(report.tokens, set.rows().map(|row| row.ids.len() as u64).sum::<u64>());
    assert_eq!(report.supervised_end_tokens, 50);
    assert_eq!(report.spans[&SpanSource::Incremental], 50);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
}

#[test]
fn a_second_call_opens_the_same_set() {
    let fixture = Fixture::new();
    let config = fixture.config("in.jsonl", many(20));
    let progress = RefCell::new(Vec::new());
    let first = prepare(&config, &|done, total| progress.borrow_mut().push((done, total))).unwrap();
    let size = fs_err::metadata(&config.inputs[0].path).unwrap().len();
    assert_eq!(progress.borrow().last(), Some(&(size, size)));

    // The name of a file is not its content.
    let moved =
        PrepareConfig { inputs: vec![fixture.write("moved.jsonl", many(20)).into()], ..config.clone() };
    let second = prepare(&moved, &|_, _| panic!("nothing is to be done")).unwrap();
    assert_eq!((first.key(), first.hash()), (second.key(), second.hash()));

    let other = [
        PrepareConfig { max_length: 12, min_supervised: 0, ..config.clone() },
        PrepareConfig { last_turn_only: true, ..config.clone() },
        PrepareConfig { inputs: vec![fixture.write("more.jsonl", many(21)).into()], ..config.clone() },
        PrepareConfig { max_rows: Some(3), ..config.clone() },
    ];
    for other in &other[1..] {
        assert_ne!(quiet(other).unwrap().key(), first.key());
    }
    assert!(matches!(quiet(&other[0]), Err(Error::NothingKept { rows: 20, .. })));
    assert_eq!(quiet(&other[3]).unwrap().len(), 3);
    // A failed preparation leaves nothing behind.
    let folders = fs_err::read_dir(&config.cache).unwrap().count();
    assert_eq!(folders, 4);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let bytes = |threads: usize| {
        let fixture = Fixture::new();
        let config = fixture.config("in.jsonl", many(200));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let folder = pool.install(|| prepare_folder(&config));
        files(&folder)
            .into_iter()
            .filter(|(name, _)| {
                std::path::Path::new(name).extension().is_some_and(|extension| extension == "bin")
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(bytes(1), bytes(3));
}

fn prepare_folder(config: &PrepareConfig) -> std::path::PathBuf {
    quiet(config).unwrap().folder().to_path_buf()
}

#[test]
fn all_layouts_and_formats_give_the_same_row() {
    let fixture = Fixture::new();
    let expected = quiet(&fixture.config("a.jsonl", row("hello", "well"))).unwrap();
    let expected = (expected.row(0).ids.to_vec(), expected.row(0).loss_mask.to_vec());
    let parts = json!([{ "type": "text", "text": "he" }, { "type": "text", "text": "llo" }]);
    let text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nwell<|im_end|>\n";
    let contents = [
        format!("[\n{},\n{}]\n", row("hello", "well"), row("hello", "well")),
        format!("\u{feff}{}\n\n", row("hello", "well")),
        json!({ "conversations": [{ "from": "human", "value": "hello" }, { "from": "gpt", "value": "well" }] }).to_string(),
        json!({ "messages": [{ "role": "user", "content": parts }, { "role": "assistant", "content": "well" }] }).to_string(),
        json!({ "text": text }).to_string(),
        json!({ "input_ids": expected.0, "loss_mask": expected.1 }).to_string(),
    ];
    for content in contents {
        let set = quiet(&fixture.config("b.json", &content)).unwrap();
        assert_eq!((set.row(0).ids.to_vec(), set.row(0).loss_mask.to_vec()), expected, "{content}");
    }
}

#[test]
fn files_of_different_formats_make_one_set() {
    let fixture = Fixture::new();
    let mut config = fixture.config("a.jsonl", row("hello", "well"));
    config
        .inputs
        .push(fixture.write("b.jsonl", "{\"input_ids\": [1, 2, 3], \"loss_mask\": [0, 1, 1]}\n").into());
    let set = quiet(&config).unwrap();
    assert_eq!((set.len(), set.row(1).ids), (2, [1, 2, 3].as_slice()));
    config.format = Some(RowFormat::Text);
    assert!(matches!(quiet(&config), Err(Error::Row { line: 1, .. })));
}

#[test]
fn long_rows_are_cut_and_counted() {
    let fixture = Fixture::new();
    let full = quiet(&fixture.config("in.jsonl", many(7))).unwrap();
    let max_length = full.lengths(0).0 + 1;
    let set = quiet(&PrepareConfig { max_length, ..fixture.config("in.jsonl", many(7)) }).unwrap();
    assert_eq!(set.report().truncated, 6);
    for index in 0..7 {
        let (row, whole) = (set.row(index), full.row(index));
        assert_eq!(row.ids, &whole.ids[..row.ids.len()]);
        assert_eq!(row.loss_mask, &whole.loss_mask[..row.ids.len()]);
        assert_eq!(row.ids.len(), whole.ids.len().min(max_length));
    }
}

#[test]
fn the_last_turn_alone_can_be_supervised() {
    let fixture = Fixture::new();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")];
    let content = json!({ "messages": messages }).to_string();
    let set = quiet(&PrepareConfig { last_turn_only: true, ..fixture.config("in.jsonl", content) }).unwrap();
    let supervised = |set: &Prepared| {
        let runs = runs(&fixture.tokenizer(), set.row(0)).unwrap();
        runs.iter().filter(|run| run.supervised).map(|run| run.text.clone()).collect::<String>()
    };
    assert_eq!(supervised(&set), "d<|im_end|>\n");
    let given = "{\"input_ids\": [64, 65, 66, 67, 68], \"loss_mask\": [1, 1, 0, 1, 1]}";
    let set = quiet(&PrepareConfig { last_turn_only: true, ..fixture.config("in.jsonl", given) }).unwrap();
    assert_eq!(set.row(0).loss_mask, [0, 0, 0, 1, 1]);
}

#[test]
fn out_of_order_turns_are_left_out_and_counted() {
    let fixture = Fixture::new();
    let turn = |role: &str, content: &str| json!({ "from": role, "value": content });
    let messages = [
        turn("gpt", "first"),
        turn("human", "q"),
        turn("gpt", "a"),
        turn("gpt", "again"),
        turn("human", "x"),
    ];
    let set = quiet(&fixture.config("in.jsonl", json!({ "conversations": messages }).to_string())).unwrap();
    let text = fixture.tokenizer().decode(set.row(0).ids).unwrap();
    assert_eq!(text, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n");
    assert_eq!(set.report().conversations_cut, 1);
}

#[test]
fn the_split_is_by_content() {
    let fixture = Fixture::new();
    let content = many(40) + &many(40);
    let set = quiet(&fixture.config("in.jsonl", content)).unwrap();
    let (train, eval) = set.split(0.1, 7);
    assert_eq!((train.len(), eval.len()), (72, 8));
    assert_eq!(set.split(0.1, 7), (train.clone(), eval.clone()));
    assert_ne!(set.split(0.1, 8).1, eval);
    for &held_out in &eval {
        assert!(train.iter().all(|&row| set.row(row).ids != set.row(held_out).ids), "row {held_out} leaks");
    }
    assert_eq!(set.split(0.0, 7).1, Vec::<usize>::new());
    // A tiny fraction still holds out something, and training always keeps something.
    assert_eq!(set.split(1e-6, 7).1.len(), 2);
    assert_eq!(set.split(1.0, 7).0.len(), 2);
}

fn check_warning(config: &PrepareConfig, expected: &Warning) {
    let set = quiet(config).unwrap();
    assert!(set.report().warnings.contains(expected), "{:?}", set.report().warnings);
}

#[test]
fn suspicious_masks_are_reported() {
    let fixture = Fixture::new();
    let tokens = |ids: &[u32], mask: &[u8]| json!({ "input_ids": ids, "loss_mask": mask }).to_string();
    let content = tokens(&[1; 40], &[1; 40]);
    check_warning(&fixture.config("in.jsonl", &content), &Warning::AlmostEverythingSupervised { share: 1.0 });
    check_warning(&fixture.config("in.jsonl", content), &Warning::EndOfTurnNotSupervised);
    let mut mask = [0; 200];
    mask[3] = 1;
    let content = tokens(&[1; 200], &mask);
    check_warning(&fixture.config("in.jsonl", content), &Warning::AlmostNothingSupervised { share: 0.005 });
}

#[test]
fn empty_answers_are_counted() {
    let fixture = Fixture::new();
    let content = many(3) + &row("hello", " \n") + &row("hello", "");
    let set = quiet(&fixture.config("in.jsonl", content)).unwrap();
    assert_eq!((set.len(), set.report().empty_answers), (5, 2));
    assert!(set.report().warnings.contains(&Warning::EmptyAnswers { rows: 2 }));
}

#[test]
fn a_wrong_template_name_is_explained() {
    let fixture = Fixture::new();
    let mut config = fixture.config("in.jsonl", many(3));
    config.template = TemplateOptions { name: Some("llama3".to_owned()), ..TemplateOptions::default() };
    let Err(Error::NothingKept { report, .. }) = quiet(&config) else { panic!("the header does not occur") };
    assert!(
        matches!(&report.warnings[..], [Warning::HeaderNeverFound { header }] if header.contains("start_header_id"))
    );
}
