//! A row per assistant turn, and reasoning that templates drop.

use serde_json::{Value, json};
use specforge_data::{DropReason, PrepareConfig, Prepared, TemplateOptions, Warning, prepare, runs};

use crate::fixture::Fixture;

/// Qwen 3's way: the reasoning of an answer is dropped as soon as another question follows.
const REASONING: &str = "{%- set ns = namespace(last=0) %}\
    {%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
    {%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}\
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}{%- endif %}\
    {{- m.content + '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

fn conversation() -> Value {
    json!({ "messages": [
        { "role": "user", "content": "one" },
        { "role": "assistant", "content": "first", "reasoning_content": "why" },
        { "role": "user", "content": "two" },
        { "role": "assistant", "content": "", "reasoning_content": "look" },
        { "role": "tool", "content": "three" },
        { "role": "assistant", "content": "second", "reasoning_content": "because" },
        { "role": "user", "content": "unanswered" },
    ] })
}

/// Text before the answer and the answer, of every row.
fn split(fixture: &Fixture, set: &Prepared) -> Vec<(String, String)> {
    let tokenizer = fixture.tokenizer();
    let row = |row| {
        let runs = runs(&tokenizer, row).unwrap();
        assert!(runs.len() == 2 && !runs[0].supervised && runs[1].supervised, "{runs:?}");
        (runs[0].text.clone(), runs[1].text.clone())
    };
    set.rows().map(row).collect()
}

fn quiet(config: &PrepareConfig) -> Prepared {
    prepare(config, &|_, _| {}).unwrap()
}

#[test]
fn each_turn_has_a_row_with_its_reasoning() {
    let fixture = Fixture::with_template(REASONING);
    let config = fixture.config("in.jsonl", conversation().to_string());
    let set = quiet(&PrepareConfig { row_per_turn: true, ..config.clone() });
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let open = "<|im_start|>assistant\n";
    let one = turn("user", "one");
    let two = one.clone() + &turn("assistant", "first") + &turn("user", "two");
    let three = two.clone() + open + "<think>look</think><|im_end|>\n" + &turn("tool", "three");
    let expected = [
        (one + open, "<think>why</think>first<|im_end|>\n".to_owned()),
        (two + open, "<think>look</think><|im_end|>\n".to_owned()),
        (three + open, "<think>because</think>second<|im_end|>\n".to_owned()),
    ];
    assert_eq!(split(&fixture, &set), expected);
    let report = set.report();
    assert_eq!((report.rows_read, report.rows_kept, report.turns_apart), (1, 3, 2));
    assert_eq!((report.reasoning_left_out, report.empty_answers), (0, 0));

    // All in one row, and the reader is told what is missing.
    let set = quiet(&config);
    assert_eq!((set.len(), set.report().reasoning_left_out), (1, 1));
    assert!(set.report().warnings.contains(&Warning::ReasoningLeftOut { rows: 1 }));
}

#[test]
fn a_turn_that_cannot_be_used_does_not_take_the_others_with_it() {
    let fixture = Fixture::with_template(REASONING);
    let config = fixture.config("in.jsonl", conversation().to_string());
    let set = quiet(&PrepareConfig { row_per_turn: true, max_length: 60, ..config });
    assert_eq!((set.len(), set.report().dropped[&DropReason::NothingSupervised]), (2, 1));
    let question = json!({ "messages": [{ "role": "user", "content": "q" }] });
    let content = format!("{}\n{question}\n", conversation());
    let config = fixture.config("in.jsonl", content);
    let set = quiet(&PrepareConfig { row_per_turn: true, ..config });
    assert_eq!((set.len(), set.report().rows_dropped()), (3, 1));
}

/// The channels of one answer are one turn.
#[test]
fn harmony_has_a_row_per_answer() {
    let fixture = Fixture::new();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let row = json!({ "messages": [
        turn("user", "one"), turn("assistant_analysis", "why"), turn("assistant_final", "first"),
        turn("user", "two"), turn("assistant_final", "second"),
    ] });
    let mut config = fixture.config("in.jsonl", row.to_string());
    config.template = TemplateOptions { name: Some("gpt-oss".to_owned()), ..TemplateOptions::default() };
    let set = quiet(&PrepareConfig { row_per_turn: true, ..config });
    let rows = split(&fixture, &set);
    let answer =
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>first<|end|>";
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].1, answer);
    assert!(rows[1].0.ends_with("first<|end|><|start|>user<|message|>two<|end|><|start|>assistant"));
    assert_eq!(rows[1].1, "<|channel|>final<|message|>second<|end|>");
}

/// A template of one's own, without code: a table in the recipe, or a Jinja file.
#[test]
fn a_template_of_ones_own() {
    let fixture =
        Fixture::with_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}");
    let inline = "assistant-header = \"[assistant] \"\nend-of-turn = [\"\\n\"]\n";
    let mut config = fixture.config("in.jsonl", conversation().to_string());
    config.template.inline = Some(toml::from_str(inline).unwrap());
    let supervised = |set: &Prepared| {
        let runs = runs(&fixture.tokenizer(), set.row(0)).unwrap();
        runs.into_iter().filter(|run| run.supervised).map(|run| run.text).collect::<Vec<_>>()
    };
    assert_eq!(supervised(&quiet(&config)), ["first\n", "\n", "second\n"]);
    config.template.name = Some("qwen".to_owned());
    let error = prepare(&config, &|_, _| {}).unwrap_err().to_string();
    assert!(error.contains("[data.template.inline]") && error.contains("one alone"), "{error}");

    let file = fixture.write("mine.jinja", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}({{ m.content }}){% endif %}{% endfor %}");
    let mut config = fixture.config("in.jsonl", conversation().to_string());
    config.template.file = Some(file.clone());
    assert_eq!(supervised(&quiet(&config)), ["first", "second"]);
    fs_err::write(&file, "{% if %}").unwrap();
    let error = prepare(&config, &|_, _| {}).unwrap_err().to_string();
    assert!(error.contains("mine.jinja"), "{error}");
}

#[test]
fn masks_of_specforge_need_a_name() {
    let fixture = Fixture::new();
    let mut config = fixture.config("in.jsonl", conversation().to_string());
    config.mask_compat = specforge_data::MaskCompat::Specforge;
    let error = prepare(&config, &|_, _| {}).unwrap_err().to_string();
    assert!(error.contains("mask-compat") && error.contains("data.template.name"), "{error}");
    config.template.name = Some("qwen".to_owned());
    let theirs = quiet(&config);
    config.mask_compat = specforge_data::MaskCompat::Off;
    assert_ne!(quiet(&config).key(), theirs.key());
}
