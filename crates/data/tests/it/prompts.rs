//! Prompt files in all their forms.

use specforge_data::{Error, read_prompts};

use crate::fixture::Fixture;

const ASKED: &str = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";

fn check(name: &str, content: &str, expected: &[&str]) {
    let fixture = Fixture::new();
    let (path, tokenizer, template) = (fixture.write(name, content), fixture.tokenizer(), fixture.template());
    let prompts = read_prompts(&path, &tokenizer, Some(&template)).unwrap();
    let texts: Vec<_> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    assert_eq!(texts, expected, "{name}: {content}");
    for prompt in &prompts {
        assert_eq!(tokenizer.decode(&prompt.ids).unwrap(), prompt.text);
    }
}

#[test]
fn every_form_of_prompt_is_read() {
    check("p.jsonl", "{\"prompt\": \"hello\"}\n{\"input_ids\": [71, 72]}\n", &[ASKED, "hi"]);
    check("p.json", "[{\"prompt\": \"hello\"}]", &[ASKED]);
    check("p.txt", "hello\n\n[hello]\n", &[ASKED, &ASKED.replace("hello", "[hello]")]);
    check("p", "hello\n", &[ASKED]);
    check("p", "{\"prompt\": \"hello\"}\n", &[ASKED]);
    let conversation = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}, {\"role\": \"assistant\", \"content\": \"x\"}]}";
    check("p.jsonl", conversation, &[ASKED]);
}

#[test]
fn without_a_template_text_stays_as_it_is() {
    let fixture = Fixture::new();
    let path = fixture.write("p.txt", "hello\n");
    assert_eq!(read_prompts(&path, &fixture.tokenizer(), None).unwrap()[0].text, "hello");
}

fn check_error(content: &str, expected: &str) {
    let fixture = Fixture::new();
    let path = fixture.write("p.jsonl", content);
    let error = read_prompts(&path, &fixture.tokenizer(), Some(&fixture.template())).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn bad_prompts_name_the_line() {
    check_error("{\"prompt\": \"a\"}\n{\"prompt\": 3}\n", "p.jsonl:2: malformed row: `prompt` is a number");
    check_error("{\"input_ids\": [9999]}\n", "token id 9999");
    check_error("{\"input_ids\": []}\n", "empty");
    let fixture = Fixture::new();
    let path = fixture.write("p.jsonl", "");
    assert!(matches!(read_prompts(&path, &fixture.tokenizer(), None), Err(Error::EmptyInput { .. })));
}
