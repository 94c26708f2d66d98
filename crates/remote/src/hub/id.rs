//! The name of a repository: `owner/name` of a model, `datasets/owner/name` of a dataset, or of a part of one,
//! `datasets/owner/name/folder/or/pattern-*.parquet`; `@revision` may follow.

use std::fmt;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A target or a draft.
    Model,
    /// Rows of text.
    Dataset,
}

/// A repository on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    kind: Kind,
    name: String,
    part: Option<String>,
    revision: Option<String>,
}

impl RepoId {
    /// Reads `owner/name`, `datasets/owner/name`, a part of it and any with `@revision`; `None` if the text cannot be such
    /// a name.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, text) = match text.strip_prefix("datasets/") {
            Some(rest) if rest.contains('/') => (Kind::Dataset, rest),
            _ => (Kind::Model, text),
        };
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let (owner, model) = name.split_once('/')?;
        let (model, part) = match model.split_once('/') {
            Some((model, part)) if kind == Kind::Dataset => (model, Some(part)),
            _ => (model, None),
        };
        let legal = |part: &str| {
            let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let edge = |c: char| c.is_ascii_alphanumeric() || c == '_';
            part.len() <= 96
                && part.starts_with(edge)
                && part.ends_with(edge)
                && part.chars().all(inside)
                && !part.contains("..")
                && !part.contains("--")
        };
        let legal_revision = |revision: &str| {
            let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
            !revision.is_empty()
                && revision.len() <= 128
                && revision.chars().all(inside)
                && !revision.contains("..")
                && !revision.starts_with(['/', '-', '.'])
                && !revision.ends_with('/')
        };
        let is_name = legal(owner) && legal(model) && !model.to_ascii_lowercase().ends_with(".git");
        let legal_part = |part: &str| {
            let inside = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\\');
            part.len() <= 256 && part.split('/').all(inside)
        };
        let ok = is_name && revision.is_none_or(legal_revision) && part.is_none_or(legal_part);
        ok.then(|| Self {
            kind,
            name: format!("{owner}/{model}"),
            part: part.map(str::to_owned),
            revision: revision.map(str::to_owned),
        })
    }

    /// What it holds.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `owner/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part of a dataset that is meant, if not all of it: a file, a folder or a pattern.
    pub fn part(&self) -> Option<&str> {
        self.part.as_deref()
    }

    /// The revision, a branch, tag or commit; `main` unless another was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Whether the revision is a commit, which never changes.
    pub fn is_pinned(&self) -> bool {
        is_commit(self.revision())
    }

    /// A repository at a commit.
    pub(crate) fn at(kind: Kind, name: String, commit: String) -> Self {
        Self { kind, name, part: None, revision: Some(commit) }
    }

    /// Its part of an address of the interface: `models/owner/name`.
    pub(crate) fn api_path(&self) -> String {
        let kind = if self.kind == Kind::Dataset { "datasets" } else { "models" };
        format!("{kind}/{}", self.name)
    }

    /// Its part of the address of its page and files: `owner/name`, `datasets/owner/name`.
    pub(crate) fn page_path(&self) -> String {
        if self.kind == Kind::Dataset { format!("datasets/{}", self.name) } else { self.name.clone() }
    }
}

/// Forty hexadecimal digits.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.page_path())?;
        self.part.as_ref().map_or(Ok(()), |part| write!(f, "/{part}"))?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for text in ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "a/b@refs/pr/1", "a/b@v1.0"] {
            assert_eq!(RepoId::parse(text).unwrap().to_string(), text);
        }
        let id = RepoId::parse("Qwen/Qwen3-8B@main").unwrap();
        assert_eq!((id.name(), id.revision(), id.is_pinned()), ("Qwen/Qwen3-8B", "main", false));
        assert_eq!(RepoId::parse("a/b").unwrap().revision(), "main");
        let dataset = RepoId::parse("datasets/a/b@v1").unwrap();
        assert_eq!((dataset.kind(), dataset.name()), (Kind::Dataset, "a/b"));
        assert_eq!(
            (dataset.to_string().as_str(), dataset.api_path().as_str()),
            ("datasets/a/b@v1", "datasets/a/b")
        );
        let part = RepoId::parse("datasets/a/b/main/train-*.parquet@refs/convert/parquet").unwrap();
        assert_eq!(
            (part.name(), part.part(), part.revision()),
            ("a/b", Some("main/train-*.parquet"), "refs/convert/parquet")
        );
        assert_eq!(part.page_path(), "datasets/a/b");
        assert_eq!(part.to_string(), "datasets/a/b/main/train-*.parquet@refs/convert/parquet");
        for text in ["datasets/a/b/../c", "datasets/a/b/", "datasets/a/b//c", "datasets/a/b/./c"] {
            assert_eq!(RepoId::parse(text), None, "{text}");
        }
        assert_eq!(RepoId::parse("datasets/a").unwrap().kind(), Kind::Model);
        assert!(RepoId::parse(&format!("a/b@{}", "0f".repeat(20))).unwrap().is_pinned());
        for text in [
            "",
            "Qwen",
            "./a/b",
            "/a/b",
            "../a",
            "a/b/c",
            "a/",
            "/b",
            "a/..",
            "a/b@",
            "a/b@../c",
            "a/b@-x",
            "a b/c",
            "~/x",
            "a/.hidden",
            "a/b.git",
            "a--b/c",
            "a/b@/x",
            "runs/a..b",
            "C:\\x",
        ] {
            assert_eq!(RepoId::parse(text), None, "{text}");
        }
    }
}
