//! A target folder made of nothing: a byte-level tokenizer with a few merges, and a ChatML template.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use specforge_data::{ChatTemplate, OnError, PrepareConfig, TemplateOptions, Tokenizer};
pub(crate) use specforge_testkit::CHATML;
use specforge_testkit::{byte_level_tokenizer, tokenizer_config};
use tempfile::TempDir;

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
        fs_err::create_dir(fixture.target()).unwrap();
        fixture.write("target/tokenizer.json", byte_level_tokenizer().to_string());
        fixture.write("target/tokenizer_config.json", tokenizer_config(template).to_string());
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
