//! Published datasets as they are: questions and answers in columns, and their ways to write messages.

use serde_json::{Value, json};
use specforge_data::{Columns, Error, PrepareConfig, Prepared, RowFormat, prepare, runs};

use crate::fixture::Fixture;

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

/// The text of a row, and what is supervised of it.
fn texts(fixture: &Fixture, set: &Prepared, row: usize) -> (String, String) {
    let runs = runs(&fixture.tokenizer(), set.row(row)).unwrap();
    let text = |all: bool| {
        runs.iter().filter(|run| all || run.supervised).map(|run| run.text.as_str()).collect::<String>()
    };
    (text(true), text(false))
}

fn check(row: &Value, question: &str, answer: &str) {
    let fixture = Fixture::new();
    let set = quiet(&fixture.config("in.jsonl", row.to_string())).unwrap();
    let text = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n");
    assert_eq!(texts(&fixture, &set, 0), (text, format!("{answer}<|im_end|>\n")), "{row}");
}

#[test]
fn questions_and_answers_in_columns() {
    check(&json!({ "instruction": "q", "output": "a", "tag": "opc" }), "q", "a");
    let alpaca =
        json!({ "instruction": "q", "input": "of this", "output": "a", "text": "### Instruction: q" });
    check(&alpaca, "q\n\nof this", "a");
    check(&json!({ "instruction": "q", "input": " ", "output": "a" }), "q", "a");
    check(&json!({ "instruction": "q", "response": "a" }), "q", "a");
    check(&json!({ "id": "1", "input": "q", "output": "a", "average_test_score": "1" }), "q", "a");
    check(&json!({ "question": "q", "answer": "a #### 3" }), "q", "a #### 3");
    check(&json!({ "problem": "q", "solution": "a", "level": "Level 5", "type": "Algebra" }), "q", "a");
    check(
        &json!({ "Problem": "q", "Rationale": "a", "options": "a ) 1 , b ) 2", "correct": "a" }),
        "q\n\na ) 1 , b ) 2",
        "a",
    );
    check(&json!({ "role_1": "x", "message_1": "q", "message_2": "a" }), "q", "a");
    check(&json!({ "query": "q", "response": "a" }), "q", "a");
    check(&json!({ "prompt": "q", "completion": "a" }), "q", "a");
}

#[test]
fn messages_of_published_datasets() {
    let share = json!({ "id": "x_0", "conversations": [{ "from": "human", "value": "q", "markdown": null }, { "from": "bing", "value": "a" }] });
    check(&share, "q", "a");
    let ultra = json!({ "prompt": "q", "prompt_id": "1", "messages": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }] });
    check(&ultra, "q", "a");
    let magpie = json!({ "uuid": "1", "instruction": "no", "response": "no", "conversations": [{ "from": "human", "value": "q" }, { "from": "gpt", "value": "a" }] });
    check(&magpie, "q", "a");
    check(&json!({ "id": "0", "data": ["q", "a"] }), "q", "a");
    let beside = json!({ "conversation": [{ "role": "user", "content": "q" }], "finish_reason": "stop",
        "generated_message": { "role": "assistant", "content": "a" } });
    check(&beside, "q", "a");
    check(
        &json!({ "conversation": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }], "model": "m" }),
        "q",
        "a",
    );
}

#[test]
fn a_system_prompt_in_a_column_of_its_own() {
    let fixture = Fixture::new();
    let row = json!({ "system_prompt": "s", "question": "q", "response": "a" });
    let set = quiet(&fixture.config("in.jsonl", row.to_string())).unwrap();
    assert!(texts(&fixture, &set, 0).0.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<"));
}

/// The right answer of a multiple choice is not always the same letter, and does not depend on anything but the text.
#[test]
fn choices_are_listed_in_an_order_of_their_own() {
    let fixture = Fixture::new();
    let row = |n: usize| json!({ "question": format!("q{n}"), "distractor1": "one", "distractor2": "two", "distractor3": "three", "correct_answer": "right", "support": if n == 0 { "" } else { "because" } });
    let rows: Vec<String> = (0..20).map(|n| row(n).to_string()).collect();
    let content = rows.join("\n");
    let set = quiet(&fixture.config("in.jsonl", content)).unwrap();
    let mut letters = std::collections::BTreeSet::new();
    for n in 0..20 {
        let (text, answer) = texts(&fixture, &set, n);
        let support = if n == 0 { "" } else { "because\n" };
        let letter =
            answer.strip_prefix(support).unwrap().strip_prefix("answer: ").unwrap().chars().next().unwrap();
        assert_eq!(answer, format!("{support}answer: {letter}) right<|im_end|>\n"));
        assert!(
            text.contains(&format!("\n{letter}) right")) && text.contains(&format!("user\nq{n}\na) ")),
            "{text}"
        );
        letters.insert(letter);
    }
    assert_eq!(letters.len(), 4);
}

#[test]
fn columns_can_be_named() {
    let fixture = Fixture::new();
    let row = json!({ "frage": "q", "antwort": "a", "rolle": "s", "messages": [] });
    let columns = Columns {
        question: "frage".to_owned(),
        input: None,
        answer: "antwort".to_owned(),
        system: Some("rolle".to_owned()),
    };
    let config =
        PrepareConfig { columns: Some(columns.clone()), ..fixture.config("in.jsonl", row.to_string()) };
    let set = quiet(&config).unwrap();
    assert_eq!(texts(&fixture, &set, 0).1, "a<|im_end|>\n");
    let other = json!({ "frage": "q", "antwort": 3 });
    let config = PrepareConfig { columns: Some(columns), ..fixture.config("in.jsonl", other.to_string()) };
    let error = quiet(&config).unwrap_err().to_string();
    assert!(error.contains("in.jsonl:1: malformed row: `antwort` is a number, expected text"), "{error}");
    let config = PrepareConfig {
        format: Some(RowFormat::Instructions),
        ..fixture.config("in.jsonl", json!({ "frage": "q" }).to_string())
    };
    let error = quiet(&config).unwrap_err().to_string();
    assert!(error.contains("but `frage`; name them with data.columns"), "{error}");
}
