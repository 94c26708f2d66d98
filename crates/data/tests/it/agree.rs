//! The three ways to find an answer agree: `{% generation %}` blocks, rendering turn by turn, and named strings.

use std::ops::Range;
use std::path::{Path, PathBuf};

use specforge_data::{ChatTemplate, NamedTemplate, SpanSource, TemplateOptions, Tokenizer, named_templates};
use specforge_testkit::golden_case;

use crate::golden_mask::lines;

fn folders() -> Vec<PathBuf> {
    let Some(root) = golden_case("loss_mask") else { return Vec::new() };
    let mut folders: Vec<_> = fs_err::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.join("chat_template.jinja").is_file());
    folders.sort();
    folders
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

fn open(folder: &Path, options: &TemplateOptions) -> ChatTemplate {
    ChatTemplate::open(folder, Tokenizer::open(folder).unwrap().special(), options).unwrap()
}

/// The named strings as the Jinja template of the case has them. The published templates differ from it in what SpecForge
/// leaves out, and in a generation prompt that opens a thought.
fn strings(name: &str) -> NamedTemplate {
    let mut strings = named_templates(None).unwrap().remove(name).unwrap();
    match name {
        "kimi-k3-thinking" => strings.end_of_turn = std::mem::take(&mut strings.stop),
        "qwen3-next-thinking" | "qwen3.5" => strings.after_header.clear(),
        _ => {}
    }
    strings
}

fn texts<'t>(text: &'t str, turns: &[Range<usize>]) -> Vec<&'t str> {
    turns.iter().map(|turn| &text[turn.clone()]).collect()
}

#[test]
fn golden_turns_without_a_name() {
    let (mut compared, mut searched) = (0, 0);
    for folder in folders() {
        let (name, own) = (name(&folder), open(&folder, &TemplateOptions::default()));
        let strings = strings(&name);
        for row in lines(&folder.join("conversations.jsonl")) {
            let rendered = own.render(&own.conversation(&row).unwrap()).unwrap();
            let named = strings.find(&rendered.text).turns;
            assert_eq!(
                texts(&rendered.text, &rendered.spans.turns),
                texts(&rendered.text, &named),
                "{name}, {}: {:?}",
                row["id"],
                rendered.source
            );
            compared += 1;
            searched += usize::from(rendered.source == SpanSource::LearnedHeader);
        }
    }
    println!("{compared} conversations agree, {searched} of them by a learned header");
}

/// Templates with generation blocks put in: the name, a text of the template, and what takes its place.
const MARKED: [(&str, &str, &str); 9] = [
    ("deepseek-v3", "'<｜Assistant｜>' + CONTENT + '<｜end▁of▁sentence｜>' }}", "'<｜Assistant｜>' }}"),
    ("lfm", "'<|im_start|>assistant\\n' + CONTENT + '<|im_end|>\\n' }}", "'<|im_start|>assistant\\n' }}"),
    ("longcat", "' ASSISTANT:' + CONTENT + '</longcat_s>' }}", "' ASSISTANT:' }}"),
    ("phi3", "'<|assistant|>\\n' + CONTENT + '<|end|>\\n' }}", "'<|assistant|>\\n' }}"),
    ("kimi-k2-thinking", "", "'<|im_assistant|>assistant<|im_middle|>' }}"),
    ("qwen", "", "'<|im_start|>assistant\\n' }}"),
    ("qwen3-instruct", "", "'<|im_start|>assistant\\n' }}"),
    ("qwen3-thinking", "", "'<|im_start|>assistant\\n' }}"),
    ("qwen3.5", "", "'<|im_start|>assistant\\n' }}"),
];

fn marked(template: &str, whole: &str, header: &str) -> String {
    if whole.is_empty() {
        // From the header to the end of the turn, through thoughts and calls.
        let (before, after) = template.split_once(header).unwrap();
        let end = ["{{- '<|im_end|>\\n' }}\n", "{{- '<|im_end|>' }}\n{%- else"];
        let end = end.iter().filter_map(|end| after.find(end).map(|at| at + end.find("}}").unwrap() + 2));
        let end = end.min().unwrap();
        return format!(
            "{before}{header}\n{{%- generation %}}{}{{%- endgeneration %}}{}",
            &after[..end],
            &after[end..]
        );
    }
    let whole = whole.replace("CONTENT", "message['content']");
    assert!(template.contains(&whole), "{whole}");
    let rest = whole.strip_prefix(header.trim_end_matches(" }}")).unwrap().trim_start_matches(" + ");
    let blocks = format!("{header}{{%- generation %}}{{{{- {rest}{{%- endgeneration %}}");
    template.replace(&whole, &blocks)
}

#[test]
fn golden_generation_blocks() {
    for folder in folders() {
        let name = name(&folder);
        let Some((_, whole, header)) = MARKED.iter().find(|(marked, ..)| *marked == name) else { continue };
        let source = fs_err::read_to_string(folder.join("chat_template.jinja")).unwrap();
        let file = tempfile::NamedTempFile::with_suffix(".jinja").unwrap();
        fs_err::write(file.path(), marked(&source, whole, header)).unwrap();
        let options = TemplateOptions { file: Some(file.path().to_owned()), ..TemplateOptions::default() };
        let (own, blocks) = (open(&folder, &TemplateOptions::default()), open(&folder, &options));
        for row in lines(&folder.join("conversations.jsonl")) {
            let conversation = own.conversation(&row).unwrap();
            let (expected, rendered) =
                (own.render(&conversation).unwrap(), blocks.render(&conversation).unwrap());
            assert_eq!(rendered.source, SpanSource::GenerationBlocks);
            assert_eq!(rendered.text, expected.text, "{name}, {}", row["id"]);
            assert_eq!(
                texts(&rendered.text, &rendered.spans.turns),
                texts(&expected.text, &expected.spans.turns),
                "{name}, {}",
                row["id"]
            );
        }
    }
}
