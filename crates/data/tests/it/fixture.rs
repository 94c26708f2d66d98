//! A target folder made of nothing: a byte-level tokenizer with a few merges, and a ChatML template.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use specforge_data::{ChatTemplate, OnError, PrepareConfig, TemplateOptions, Tokenizer};
use tempfile::TempDir;

pub(crate) const CHATML: &str = "\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// A folder for the files of one test.
pub(crate) struct Fixture {
    pub(crate) folder: TempDir,
}

impl Fixture {
    /// A target with the ChatML template.
    pub(crate) fn new() -> Self {
        Self::with_template(CHATML)
    }

    pub(crate) fn with_template(template: &str) -> Self {
        let fixture = Self { folder: TempDir::new().unwrap() };
        let config = json!({
            "bos_token": null,
            "eos_token": { "content": "<|im_end|>", "special": true },
            "pad_token": "<|pad|>",
            "chat_template": template,
        });
        fs_err::create_dir(fixture.target()).unwrap();
        fixture.write("target/tokenizer.json", tokenizer_json().to_string());
        fixture.write("target/tokenizer_config.json", config.to_string());
        fixture
    }

    pub(crate) fn target(&self) -> PathBuf {
        self.folder.path().join("target")
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs_err::write(&path, content).unwrap();
        path
    }

    pub(crate) fn tokenizer(&self) -> Tokenizer {
        Tokenizer::open(&self.target()).unwrap()
    }

    /// The target's own template.
    pub(crate) fn template(&self) -> ChatTemplate {
        ChatTemplate::open(&self.target(), self.tokenizer().special(), &TemplateOptions::default()).unwrap()
    }

    /// Settings for preparing an input with this content.
    pub(crate) fn config(&self, name: &str, content: impl AsRef<[u8]>) -> PrepareConfig {
        let input = self.write(name, content);
        PrepareConfig::new(vec![input], self.target(), self.folder.path().join("cache"))
    }

    pub(crate) fn skipping(&self, name: &str, content: impl AsRef<[u8]>) -> PrepareConfig {
        PrepareConfig { on_error: OnError::Skip, ..self.config(name, content) }
    }
}

/// One question and its answer as a JSONL line.
pub(crate) fn row(question: &str, answer: &str) -> String {
    let messages =
        json!([{ "role": "user", "content": question }, { "role": "assistant", "content": answer }]);
    format!("{}\n", json!({ "messages": messages }))
}

pub(crate) fn object(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

/// The GPT-2 alphabet of bytes, merges for `he`, `ll`, `Ġh`, two newlines, and the special tokens of ChatML.
fn tokenizer_json() -> Value {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut vocab: Vec<String> =
        (0..=255u8).filter(printable).map(|byte| char::from(byte).to_string()).collect();
    vocab.extend((0..68u32).filter_map(|index| char::from_u32(256 + index)).map(|symbol| symbol.to_string()));
    let merges = [["h", "e"], ["l", "l"], ["\u{120}", "he"], ["\u{10A}", "\u{10A}"]];
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let size = vocab.len();
    let vocab: Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = ["<|im_start|>", "<|im_end|>", "<|pad|>"].iter().enumerate().map(|(index, token)| {
        json!({ "id": size + index, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": special.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// All files below a folder with their bytes, sorted.
pub(crate) fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs_err::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs_err::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}
