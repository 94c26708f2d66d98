//! Reads the doc comments of structs and enums out of Rust source text, formatted by rustfmt.

/// A struct or an enum with its comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Documented {
    pub(super) doc: String,
    pub(super) items: Vec<Field>,
}

/// A field of a struct, or a variant of an enum; names in kebab case, as serde writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) name: String,
    /// The Rust type; empty for a variant.
    pub(super) kind: String,
    pub(super) doc: String,
}

/// The struct of this name.
pub(super) fn structure(source: &str, name: &str) -> Option<Documented> {
    documented(source, &format!("pub struct {name} {{"), |line| {
        let (name, kind) = line.strip_prefix("pub ")?.split_once(": ")?;
        Some((name.replace('_', "-"), kind.trim_end_matches(',').to_owned()))
    })
}

/// The enum of this name, which has unit variants alone.
pub(super) fn enumeration(source: &str, name: &str) -> Option<Documented> {
    documented(source, &format!("pub enum {name} {{"), |line| {
        let name = line.strip_suffix(',')?;
        let word = name.starts_with(char::is_uppercase) && name.chars().all(char::is_alphanumeric);
        word.then(|| (kebab(name), String::new()))
    })
}

fn documented(
    source: &str,
    head: &str,
    item: impl Fn(&str) -> Option<(String, String)>,
) -> Option<Documented> {
    let mut doc = Vec::new();
    let mut lines = source.lines();
    loop {
        let line = lines.next()?;
        if line == head {
            break;
        }
        take_doc(line, &mut doc);
    }
    let about = doc.join(" ");
    doc.clear();
    let mut items = Vec::new();
    for line in lines.take_while(|line| *line != "}") {
        let line = line.trim();
        if let Some((name, kind)) = item(line) {
            items.push(Field { name, kind, doc: doc.join(" ") });
        }
        take_doc(line, &mut doc);
    }
    Some(Documented { doc: about, items })
}

/// Keeps the comment lines since the last line that is neither comment nor attribute.
fn take_doc<'l>(line: &'l str, doc: &mut Vec<&'l str>) {
    if let Some(text) = line.strip_prefix("///") {
        doc.push(text.trim());
    } else if !line.starts_with("#[") {
        doc.clear();
    }
}

fn kebab(name: &str) -> String {
    let mut text = String::new();
    for (at, c) in name.char_indices() {
        if c.is_uppercase() && at > 0 {
            text.push('-');
        }
        text.extend(c.to_lowercase());
    }
    text
}
