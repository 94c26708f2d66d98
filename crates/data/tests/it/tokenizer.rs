//! Offsets, decoding one id at a time, and special tokens from all their files.

use serde_json::json;
use specforge_data::{RowRef, Tokenizer, runs};

use crate::fixture::Fixture;

const TEXT: &str = "<|im_start|>hello  hé 👩‍🚀\n\n天";

#[test]
fn offsets_cover_the_text() {
    let encoded = Fixture::new().tokenizer().encode(TEXT).unwrap();
    let mut end = 0;
    for offsets in &encoded.offsets {
        assert!(offsets.start <= end && offsets.end >= end, "gap before {offsets:?}");
        end = offsets.end;
    }
    assert_eq!(end, TEXT.len());
    // The post-processor of this tokenizer would take the space out of this token.
    let hello = Fixture::new().tokenizer().encode("a hello").unwrap();
    assert_eq!(hello.offsets[1], 1..4);
}

#[test]
fn a_stream_gives_whole_characters_and_loses_nothing() {
    let fixture = Fixture::new();
    let tokenizer = fixture.tokenizer();
    let ids = tokenizer.encode(TEXT).unwrap().ids;
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for id in &ids {
        let piece = stream.push(*id).unwrap();
        assert!(!piece.contains('\u{FFFD}'), "{piece:?}");
        text.push_str(&piece);
    }
    text.push_str(&stream.finish().unwrap());
    assert_eq!(text, TEXT);
}

#[test]
fn a_stream_of_broken_bytes_ends() {
    let tokenizer = Fixture::new().tokenizer();
    let broken = tokenizer.encode("天").unwrap().ids[0];
    let mut stream = tokenizer.stream();
    let text: String = (0..20).map(|_| stream.push(broken).unwrap()).collect();
    let text = text + &stream.finish().unwrap();
    assert!(!text.is_empty() && text.chars().all(|character| character == '\u{FFFD}'), "{text:?}");
}

#[test]
fn runs_show_the_mask() {
    let tokenizer = Fixture::new().tokenizer();
    let encoded = tokenizer.encode("ab天cd").unwrap();
    // Supervised from the second of the three bytes of the character on.
    let loss_mask: Vec<u8> = (0..encoded.ids.len()).map(|index| u8::from((3..6).contains(&index))).collect();
    let runs = runs(&tokenizer, RowRef { ids: &encoded.ids, loss_mask: &loss_mask }).unwrap();
    let runs: Vec<_> = runs.iter().map(|run| (run.text.as_str(), run.supervised)).collect();
    assert_eq!(runs, [("ab", false), ("天c", true), ("d", false)]);
}

#[test]
fn special_tokens_come_from_all_files() {
    let fixture = Fixture::new();
    let tokenizer = fixture.tokenizer();
    let end = tokenizer.id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.special().eos_ids, [end]);
    assert_eq!(tokenizer.vocab_size(), end as usize + 2);
    let hash = tokenizer.hash().to_owned();

    fixture.write(
        "target/special_tokens_map.json",
        json!({ "bos_token": { "content": "<|pad|>" } }).to_string(),
    );
    fixture.write("target/generation_config.json", json!({ "eos_token_id": [3, 9] }).to_string());
    fixture.write("target/config.json", json!({ "eos_token_id": 7, "vocab_size": 400 }).to_string());
    let tokenizer = fixture.tokenizer();
    assert_eq!(tokenizer.special().bos.as_deref(), Some("<|pad|>"));
    assert_eq!(tokenizer.special().eos_ids, [3, 9, end]);
    assert_eq!(tokenizer.vocab_size(), 400);
    assert_ne!(tokenizer.hash(), hash);
}

#[test]
fn a_target_without_a_fast_tokenizer_says_how_to_make_one() {
    let fixture = Fixture::new();
    fs_err::remove_file(fixture.target().join("tokenizer.json")).unwrap();
    let open = || Tokenizer::open(&fixture.target()).unwrap_err().to_string();
    assert!(open().contains("tokenizer.json") && !open().contains("save_pretrained"), "{}", open());
    fixture.write("target/tokenizer.model", "");
    assert!(open().contains("only tokenizer.model") && open().contains("save_pretrained"), "{}", open());
}

/// A normalizer that replaces the text leaves nothing that offsets could point to.
#[test]
fn a_tokenizer_without_offsets_is_an_error_not_an_empty_mask() {
    let fixture = Fixture::new();
    let path = fixture.target().join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    tokenizer["normalizer"] =
        json!({ "type": "Replace", "pattern": { "Regex": "^[\\s\\S]+$" }, "content": "hello" });
    fs_err::write(&path, tokenizer.to_string()).unwrap();
    let error = fixture.tokenizer().encode("something else").unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: it does not say which bytes"), "{error}");
}
