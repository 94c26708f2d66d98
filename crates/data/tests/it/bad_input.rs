//! What users and disks do to files. Every message names the place.

use std::path::{Path, PathBuf};

use specforge_data::{DropReason, Error, OnError, PrepareConfig, Prepared, prepare};

use crate::fixture::{CHATML, Fixture, row};

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

/// The second of three rows is bad: an error with its line, or dropped for that reason.
fn check_row(fixture: &Fixture, bad: impl AsRef<[u8]>, reason: DropReason, message: &str) {
    let good = row("hello", "well");
    let content = [good.as_bytes(), bad.as_ref(), b"\n", good.as_bytes()].concat();
    let error = quiet(&fixture.config("in.jsonl", &content)).unwrap_err();
    let Error::Row { line, reason: found, .. } = &error else { panic!("{error}") };
    assert_eq!((*line, *found), (2, reason), "{error}");
    let text = error.to_string();
    assert!(text.contains("in.jsonl:2:") && text.contains(message), "{text}");

    let set = quiet(&fixture.skipping("in.jsonl", &content)).unwrap();
    assert_eq!((set.len(), set.report().rows_read), (2, 3));
    assert_eq!(set.report().dropped[&reason], 1);
    assert_eq!(set.report().examples[0].line, 2);
}

#[test]
fn malformed_rows_name_file_line_and_reason() {
    let fixture = Fixture::new();
    let check = |bad: &[u8], message: &str| check_row(&fixture, bad, DropReason::Malformed, message);
    check(b"{\"messages\": [", "not valid JSON: EOF while parsing a list (column 14)");
    check(b"", "empty line");
    check(b"[1]", "a list, expected an object");
    check(b"{\"other\": 1}", "no `conversations` or `messages`");
    check(b"{\"messages\": \"hi\"}", "the messages are text, expected a list");
    check(b"{\"messages\": [3]}", "message 1: a number, expected an object");
    check(b"{\"messages\": [{\"content\": \"x\"}]}", "message 1: no `role`");
    check(b"{\"messages\": [{\"role\": \"wizard\"}]}", "unknown role `wizard`");
    check(b"{\"messages\": [{\"role\": \"user\", \"content\": 4}]}", "the content is a number");
    check(
        b"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]}",
        "type `image` has no text",
    );
    check(
        b"{\"messages\": [{\"role\": \"user\", \"tool_calls\": \"[\"}]}",
        "`tool_calls` is text, but not JSON",
    );
    check(b"{\"messages\": [], \"tools\": 3}", "`tools` is a number");
    check(b"{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}", "hex escape");
    check(b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\0b\"}]}", "control character");
    check(b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\xffb\"}]}", "not valid JSON");
    let deep = format!("{{\"messages\": {}", "[".repeat(100_000));
    check(deep.as_bytes(), "recursion limit");
}

#[test]
fn an_escaped_nul_is_a_character_like_any_other() {
    let fixture = Fixture::new();
    let set = quiet(&fixture.config("in.jsonl", row("a\0b", "c\0d"))).unwrap();
    assert!(fixture.tokenizer().decode(set.row(0).ids).unwrap().contains("c\0d"));
}

#[test]
fn a_template_that_raises_names_the_row() {
    let raising = format!(
        "{{%- if messages[0].content == 'bad' %}}{{{{ raise_exception('not this') }}}}{{%- endif %}}{CHATML}"
    );
    let fixture = Fixture::with_template(&raising);
    check_row(
        &fixture,
        row("bad", "x").trim_end(),
        DropReason::Template,
        "not this (line 1 of the template in tokenizer_config.json)",
    );
}

#[test]
fn token_rows_are_checked() {
    let fixture = Fixture::new();
    let check = |bad: &str, reason: DropReason, message: &str| {
        let good = "{\"input_ids\": [1, 2], \"loss_mask\": [0, 1]}";
        let content = format!("{good}\n{bad}\n");
        let error = quiet(&fixture.config("in.jsonl", &content)).unwrap_err().to_string();
        assert!(error.contains("in.jsonl:2:") && error.contains(message), "{error}");
        let set = quiet(&fixture.skipping("in.jsonl", &content)).unwrap();
        assert_eq!((set.len(), set.report().dropped[&reason]), (1, 1));
    };
    check("{\"input_ids\": [9999], \"loss_mask\": [1]}", DropReason::OutsideVocabulary, "token id 9999");
    check("{\"input_ids\": [1, 2], \"loss_mask\": [1]}", DropReason::Malformed, "2 input_ids, but 1 entries");
    check("{\"input_ids\": [-1], \"loss_mask\": [1]}", DropReason::Malformed, "entry 0 of `input_ids` is -1");
    check("{\"input_ids\": [1.5], \"loss_mask\": [1]}", DropReason::Malformed, "is 1.5");
    check("{\"input_ids\": [4294967296], \"loss_mask\": [1]}", DropReason::Malformed, "expected an integer");
    check("{\"input_ids\": [1], \"loss_mask\": [2]}", DropReason::Malformed, "the entry 2");
    check("{\"input_ids\": \"1\", \"loss_mask\": [1]}", DropReason::Malformed, "`input_ids` is text");
}

/// A tokenizer with more tokens than the target has embeddings.
#[test]
fn tokens_that_the_target_does_not_have_are_named() {
    let fixture = Fixture::new();
    let end = fixture.tokenizer().id("<|im_end|>").unwrap();
    fixture.write("target/config.json", format!("{{\"vocab_size\": {end}}}"));
    let content = format!("{}{{\"input_ids\": [1, 2], \"loss_mask\": [0, 1]}}\n", row("a", "b"));
    let mut config = fixture.config("in.jsonl", &content);
    let error = quiet(&config).unwrap_err().to_string();
    let expected =
        format!("in.jsonl:1: token outside the vocabulary: token id {end}, but the target has {end} ids");
    assert!(error.contains(&expected), "{error}");
    config = fixture.skipping("in.jsonl", row("a", "b"));
    let error = quiet(&config).unwrap_err().to_string();
    assert!(error.contains("1 x token outside the vocabulary"), "{error}");
}

/// A row of very many turns ends in good time: it is not rendered once per turn.
#[test]
fn very_many_turns_are_searched_instead_of_rendered_one_by_one() {
    let fixture = Fixture::new();
    let turn = |role: &str| format!("{{\"role\":\"{role}\",\"content\":\"x\"}}");
    let pair = format!("{},{}", turn("user"), turn("assistant"));
    let content = format!("{{\"messages\":[{}]}}", vec![pair; 20_000].join(","));
    let set = quiet(&PrepareConfig { max_length: 100, ..fixture.config("in.jsonl", content) }).unwrap();
    assert_eq!(set.report().spans[&specforge_data::SpanSource::LearnedHeader], 1);
}

#[test]
fn rows_without_supervision_are_dropped_not_errors() {
    let fixture = Fixture::new();
    let unanswered = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}\n";
    let system = "{\"messages\": [{\"role\": \"system\", \"content\": \"q\"}]}\n";
    let content = format!("{}{unanswered}{system}{}", row("hello", "well"), row("hello", ""));
    let config = PrepareConfig { min_supervised: 3, ..fixture.config("in.jsonl", content) };
    let set = quiet(&config).unwrap();
    assert_eq!((set.len(), set.report().rows_dropped()), (1, 3));
    for reason in [DropReason::NothingSupervised, DropReason::NoUsableTurn, DropReason::TooFewSupervised] {
        assert_eq!(set.report().dropped[&reason], 1, "{reason}");
    }
    let error = quiet(&fixture.config("in.jsonl", unanswered)).unwrap_err().to_string();
    assert!(error.contains("no row of 1 is left") && error.contains("1 x no supervised token"), "{error}");
}

fn check_file(content: &str, expected: &str) {
    let fixture = Fixture::new();
    for on_error in [OnError::Stop, OnError::Skip] {
        let config = PrepareConfig { on_error, ..fixture.config("in.json", content) };
        let error = quiet(&config).unwrap_err().to_string();
        assert!(error.contains("in.json") && error.contains(expected), "{error}");
    }
}

#[test]
fn unusable_files_are_explained() {
    check_file("", "holds no row");
    check_file("\n \n", "holds no row");
    check_file("[]", "holds no row");
    check_file("{\"question\": \"x\"}", "line 1 has `question`; expected rows with");
    check_file("[{\"messages\": []},", "in.json:1: the list is not closed");
    check_file(&format!("[{}] x", row("a", "b")), "something follows after the end");
}

#[test]
fn an_array_names_the_line_of_the_element() {
    let fixture = Fixture::new();
    let content = format!("[\n{},\n  {{\"messages\": 1}},\n 4]", row("a", "b").trim_end());
    let error = quiet(&fixture.config("in.json", &content)).unwrap_err().to_string();
    assert!(error.contains("in.json:3: malformed row: the messages are a number"), "{error}");
    let set = quiet(&fixture.skipping("in.json", &content)).unwrap();
    assert_eq!((set.len(), set.report().dropped[&DropReason::Malformed]), (1, 2));
}

#[test]
fn missing_files_are_named() {
    let fixture = Fixture::new();
    let mut config = fixture.config("in.jsonl", row("a", "b"));
    config.inputs.push(PathBuf::from("/nowhere/x.jsonl").into());
    assert!(quiet(&config).unwrap_err().to_string().contains("/nowhere/x.jsonl"));
    config.inputs.clear();
    assert!(matches!(quiet(&config), Err(Error::Setting { name: "inputs", .. })));
    let mut config = fixture.config("in.jsonl", row("a", "b"));
    config.max_length = 0;
    assert!(matches!(quiet(&config), Err(Error::Setting { name: "max_length", .. })));
    fixture.write("target/tokenizer.json", "{");
    let error = quiet(&fixture.config("in.jsonl", row("a", "b"))).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

fn check_damage(file: &str, damage: impl Fn(&mut Vec<u8>), expected: &str) {
    let fixture = Fixture::new();
    let config = fixture.config("in.jsonl", row("hello", "well").repeat(3));
    let folder = quiet(&config).unwrap().folder().to_path_buf();
    let path = folder.join(file);
    let mut bytes = fs_err::read(&path).unwrap();
    damage(&mut bytes);
    fs_err::write(&path, bytes).unwrap();
    for result in [quiet(&config), Prepared::open(Path::new(&folder))] {
        let error = result.map(|set| set.len()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(expected), "{error}");
        assert!(error.contains("delete the folder"), "{error}");
    }
}

#[test]
fn damaged_sets_are_refused() {
    check_damage("rows.bin", |bytes| bytes.truncate(bytes.len() - 1), "bytes, expected");
    check_damage("rows.bin", |bytes| bytes.truncate(3), "3 bytes, expected");
    check_damage("rows.bin", |bytes| bytes[40] ^= 1, "blake3 sum");
    check_damage("rows.bin", |bytes| bytes[0] ^= 1, "the header");
    check_damage("index.bin", |bytes| bytes[20] ^= 0x80, "blake3 sum");
    check_damage("index.bin", |bytes| bytes[8] ^= 1, "the header");
    check_damage("manifest.json", |bytes| bytes.truncate(50), "not valid JSON");
    let version = |bytes: &mut Vec<u8>| {
        *bytes = String::from_utf8_lossy(bytes)
            .replace("\"format_version\": 1", "\"format_version\": 9")
            .into_bytes();
    };
    check_damage("manifest.json", version, "format version 9, expected 1");
}

/// Sums that fit do not make an index right.
#[test]
fn an_index_beyond_the_rows_is_refused() {
    check_forged(|bytes| bytes[24] += 1, "row 1 has offset");
    check_forged(|bytes| bytes[28] = 0xff, "supervised 255");
    check_forged(|bytes| bytes[56] += 4, "but the index describes");
}

fn check_forged(damage: impl Fn(&mut Vec<u8>), expected: &str) {
    let fixture = Fixture::new();
    let config = fixture.config("in.jsonl", row("hello", "well").repeat(3));
    let folder = quiet(&config).unwrap().folder().to_path_buf();
    let mut index = fs_err::read(folder.join("index.bin")).unwrap();
    let before = blake3::hash(&index).to_hex();
    damage(&mut index);
    fs_err::write(folder.join("index.bin"), &index).unwrap();
    let manifest = fs_err::read_to_string(folder.join("manifest.json")).unwrap();
    let forged = manifest.replace(before.as_str(), blake3::hash(&index).to_hex().as_str());
    fs_err::write(folder.join("manifest.json"), forged).unwrap();
    let error = Prepared::open(&folder).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}
