//! Chat templates: Hugging Face's conventions, finding the turns, and bounds.

use serde_json::{Value, json};
use specforge_data::{ChatTemplate, Error, SpanSource, TemplateOptions, loss_mask, named_templates};

use crate::fixture::{CHATML, Fixture, object};

/// Renders one user message with variables.
fn render(template: &str, content: &str, more: &Value) -> Result<String, Error> {
    let template = Fixture::with_template(template).template();
    let mut row = object(&json!({ "messages": [{ "role": "user", "content": content }] }));
    row.extend(object(more));
    Ok(template.render(&template.conversation(&row)?)?.text)
}

fn check(template: &str, more: &Value, expected: &str) {
    assert_eq!(render(template, "Hi", more).unwrap(), expected, "{template}");
}

#[test]
fn hugging_face_conventions() {
    let none = json!({});
    // Block lines leave no trace; the final newline is dropped.
    check("  {% if true %}\nA\n  {% endif %}\nB\n", &none, "A\nB");
    check("{{ messages[0].content.strip().upper() }}{{ 'a,b'.split(',')[1] }}", &none, "HIb");
    check(
        "{{ messages[0].get('nothing', 'x') }}{% for k, v in messages[0].items() %}{{ k }}{% endfor %}",
        &none,
        "xrolecontent",
    );
    check("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", &none, "01");
    check("{{ strftime_now('%d %b %Y, %A, %-m') }}", &none, "26 Jul 2024, Friday, 7");
    check(
        "{{ enable_thinking }}{{ depth }}",
        &json!({ "enable_thinking": false, "chat_template_kwargs": { "depth": 3 } }),
        "False3",
    );
    check("{{ tools is none }}{{ eos_token }}{{ bos_token is defined }}", &none, "True<|im_end|>False");
}

#[test]
fn tojson_is_python_json() {
    let value =
        json!({ "value": { "a<b": ["é", 1.0, 1e20, 1e-7, 2, null, true, "\u{7}\"/"], "e": {}, "l": [] } });
    let plain = r#"{"a<b": ["é", 1.0, 1e+20, 1e-07, 2, null, true, "\u0007\"/"], "e": {}, "l": []}"#;
    check("{{ value | tojson }}", &value, plain);
    check(
        "{{ value.l | tojson(indent=2) }}|{{ [1, {'a': 2}] | tojson(indent=2) }}",
        &value,
        "[]|[\n  1,\n  {\n    \"a\": 2\n  }\n]",
    );
    check(
        "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
        &value,
        r#"{"a":1,"b":"\u00e9"}"#,
    );
}

/// Spans of a conversation with two answers, as texts.
fn turns(template: &str, first: &Value) -> (Vec<String>, SpanSource) {
    let template = Fixture::with_template(template).template();
    let row = json!({ "messages": [
        { "role": "user", "content": "one" }, first,
        { "role": "user", "content": "two" }, { "role": "assistant", "content": "second" },
    ] });
    let rendered = template.render(&template.conversation(&object(&row)).unwrap()).unwrap();
    (
        rendered.spans.turns.iter().map(|turn| rendered.text[turn.clone()].to_owned()).collect(),
        rendered.source,
    )
}

fn check_turns(template: &str, expected: [&str; 2], source: SpanSource) {
    let first = json!({ "role": "assistant", "content": "first", "reasoning_content": "why" });
    assert_eq!(turns(template, &first), (expected.map(str::to_owned).to_vec(), source), "{template}");
}

#[test]
fn turns_are_found_in_any_template() {
    use SpanSource::{GenerationBlocks, Incremental, LearnedHeader};
    let both = ["first<|im_end|>\n", "second<|im_end|>\n"];
    check_turns(CHATML, both, Incremental);
    let no_prompt = CHATML.split("{%- if add").next().unwrap();
    check_turns(no_prompt, both, Incremental);
    // A template that writes something after the last turn: the renderings of the first turn are no prefix.
    check_turns(
        &format!("{CHATML}{{%- if not add_generation_prompt %}}{{{{- '<end>' }}}}{{%- endif %}}"),
        ["first<|im_end|>\n", "second<|im_end|>\n<end>"],
        Incremental,
    );
    // Qwen 3: the thought of an answer is dropped as soon as another question follows.
    let thinking = "{%- set ns = namespace(last=0) %}\
        {%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
        {%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}\
        {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}{%- endif %}\
        {{- m.content + '<|im_end|>\\n' }}{%- endfor %}\
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
    check_turns(thinking, ["first<|im_end|>\n", "<think></think>second<|im_end|>\n"], Incremental);
    // The prompt opens a thought that the history does not have.
    let opened = thinking.replace("assistant\\n' }}{%- endif %}", "assistant\\n<think>' }}{%- endif %}");
    check_turns(&opened, ["first<|im_end|>\n", "</think>second<|im_end|>\n"], Incremental);
    // The number of messages is written first, so no rendering is a prefix of another one.
    let counted = format!("{{{{- messages | length }}}}{CHATML}");
    check_turns(&counted, both, LearnedHeader);
    let marked = "{%- for message in messages %}\n{{- message.role + ':' }}\n\
        {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}.{% endgeneration %}{% else %}\
        {{- message.content }}{% endif %}\n{%- endfor %}";
    check_turns(marked, ["first.", "second."], GenerationBlocks);
}

#[test]
fn mistral_answers_keep_their_space() {
    let mistral = "{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}\
        {%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}";
    let fixture = Fixture::with_template(mistral);
    let template = fixture.template();
    let row = object(
        &json!({ "conversations": [{ "from": "human", "value": "x" }, { "from": "gpt", "value": "hello" }] }),
    );
    let rendered = template.render(&template.conversation(&row).unwrap()).unwrap();
    let encoded = fixture.tokenizer().encode(&rendered.text).unwrap();
    let mask = loss_mask(&rendered.text, &encoded.offsets, &rendered.spans, false);
    let first = mask.iter().position(|bit| *bit == 1).unwrap();
    // The token ` he` begins in what the template writes before every answer.
    assert_eq!(&rendered.text[encoded.offsets[first].clone()], " he");
}

#[test]
fn prompts_end_where_the_answer_begins() {
    for template in [CHATML, CHATML.split("{%- if add").next().unwrap()] {
        let template = Fixture::with_template(template).template();
        let row = object(&json!({ "messages": [{ "role": "user", "content": "x" }] }));
        let prompt = template.render_prompt(&template.conversation(&row).unwrap()).unwrap();
        assert_eq!(prompt, "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n");
    }
}

fn check_error(template: &str, expected: &str) {
    let error = render(template, "Hi", &json!({})).unwrap_err().to_string();
    assert!(error.contains(expected), "{template}: {error}");
}

#[test]
fn hostile_templates_are_stopped() {
    check_error(
        "a\n{{ raise_exception('roles must alternate') }}",
        "roles must alternate (line 2 of the template in tokenizer_config.json)",
    );
    check_error(
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "out of fuel",
    );
    check_error("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "the chat template failed");
    check_error("{% for i in range(90000) %}{{ 'x' * 100000 }}{% endfor %}", "the chat template failed");
    check_error("{{ messages[0].content + 1 }}", "the chat template failed");
    // Doubling: forty steps would be a terabyte.
    let double = "{% set ns = namespace(x='0123456789') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    check_error(double, "the template does not come to an end");
    check_error("{{ 'x' * 10000000000 }}", "the chat template failed");
    check_error("{{ range(10000000000) | list }}", "the chat template failed");
    // Cycles of every kind that Jinja has.
    check_error("{% include 'chat_template' %}", "the chat template failed");
    check_error("{% extends 'chat_template' %}", "the chat template failed");
    check_error(
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "the chat template failed",
    );
    check_error("{{ nothing.at_all }}", "nothing");
    check_error("a\n{{ messages[0].thing.part }}", "thing");
}

#[test]
fn a_template_that_does_not_compile_is_named() {
    let fixture = Fixture::with_template("{% if %}");
    let error =
        ChatTemplate::open(&fixture.target(), fixture.tokenizer().special(), &TemplateOptions::default());
    assert!(matches!(error, Err(Error::Template { .. })), "{error:?}");
}

#[test]
fn a_generation_mark_in_a_message_is_refused() {
    let marked = "{% generation %}{{ messages[0].content }}{% endgeneration %}";
    assert!(render(marked, "a\u{FDD0}b", &json!({})).is_err());
    assert_eq!(render(CHATML, "a\u{FDD0}b", &json!({})).unwrap(), "<|im_start|>user\na\u{FDD0}b<|im_end|>\n");
}

#[test]
fn the_table_of_templates_can_be_extended() {
    let fixture = Fixture::new();
    let table = fixture.write("more.toml", "[mine]\nassistant-header = \"A:\"\nend-of-turn = [\"\\n\"]\n");
    let templates = named_templates(Some(&table)).unwrap();
    assert!(templates.contains_key("mine") && templates.contains_key("llama3"));
    let spans = templates["mine"].find("Q: x\nA: y\nQ: z\nA: w");
    assert_eq!(spans.turns, [7..10, 17..19]);

    let options = TemplateOptions { name: Some("lama3".to_owned()), ..TemplateOptions::default() };
    let error = ChatTemplate::open(&fixture.target(), fixture.tokenizer().special(), &options).unwrap_err();
    assert!(error.to_string().contains("known: deepseek-r1-distill"), "{error}");
    let table = fixture.write("more.toml", "[mine]\nassistant-header = \"\"\nend-of-turn = [\"x\"]\n");
    assert!(named_templates(Some(&table)).unwrap_err().to_string().contains("[mine] needs"));
}

#[test]
fn a_named_template_without_a_jinja_one_writes_the_plain_form() {
    let fixture = Fixture::new();
    fixture.write("target/tokenizer_config.json", json!({ "bos_token": "<s>" }).to_string());
    let options = TemplateOptions { name: Some("phi3".to_owned()), ..TemplateOptions::default() };
    let template = ChatTemplate::open(&fixture.target(), fixture.tokenizer().special(), &options).unwrap();
    let row = object(
        &json!({ "messages": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }] }),
    );
    let rendered = template.render(&template.conversation(&row).unwrap()).unwrap();
    assert_eq!(rendered.text, "<s>You are a helpful assistant.<|user|>\nq<|assistant|>\na<|end|>\n");
    assert_eq!(&rendered.text[rendered.spans.turns[0].clone()], "a<|end|>\n");
    assert!(
        ChatTemplate::open(&fixture.target(), fixture.tokenizer().special(), &TemplateOptions::default())
            .is_err()
    );
}
