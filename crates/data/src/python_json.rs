//! The `tojson` filter of chat templates: `json.dumps` of Python, byte for byte, without HTML escaping.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Layout of the JSON text.
#[derive(Debug, Clone)]
struct Layout {
    item: String,
    key: String,
    /// Spaces per level; `None` is one line.
    indent: Option<usize>,
    sort_keys: bool,
    ensure_ascii: bool,
}

/// Deeper nesting than this is refused instead of exhausting the stack.
const MAX_DEPTH: usize = 128;

/// `tojson(value, indent=None, separators=None, sort_keys=False, ensure_ascii=False)`.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the template engine calls")]
pub(crate) fn filter(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators needs two strings")),
        // An item separator with a trailing space would end every line of an indented text in a space.
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let layout = Layout {
        item,
        key,
        indent,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut text = String::new();
    layout.write(value, 0, &mut text)?;
    Ok(text)
}

impl Layout {
    fn write(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => text.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), text)?,
            ValueKind::Map => return self.map(value, depth, text),
            ValueKind::Seq | ValueKind::Iterable => return self.sequence(value, depth, text),
            kind => {
                let message = format!("tojson: a value of kind {kind} has no JSON form");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn sequence(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        text.push('[');
        let mut count = 0;
        for item in value.try_iter()? {
            self.separate(count, depth, text);
            self.write(&item, depth + 1, text)?;
            count += 1;
        }
        self.close(']', count, depth, text);
        Ok(())
    }

    fn map(&self, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort_by_key(ToString::to_string);
        }
        text.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.separate(index, depth, text);
            self.string(&key.to_string(), text)?;
            text.push_str(&self.key);
            self.write(&value.get_item(key)?, depth + 1, text)?;
        }
        self.close('}', keys.len(), depth, text);
        Ok(())
    }

    fn separate(&self, index: usize, depth: usize, text: &mut String) {
        if index > 0 {
            text.push_str(&self.item);
        }
        self.line(depth + 1, text);
    }

    fn close(&self, bracket: char, count: usize, depth: usize, text: &mut String) {
        if count > 0 {
            self.line(depth, text);
        }
        text.push(bracket);
    }

    fn line(&self, depth: usize, text: &mut String) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, string: &str, text: &mut String) -> Result<(), Error> {
        // Python and serde_json escape the same characters, the same way.
        let escaped = serde_json::to_string(string)
            .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
        if !self.ensure_ascii {
            text.push_str(&escaped);
            return Ok(());
        }
        let mut units = [0; 2];
        for character in escaped.chars() {
            if character.is_ascii() {
                text.push(character);
            } else {
                for unit in character.encode_utf16(&mut units) {
                    text.push_str("\\u");
                    text.extend(hexadecimal(*unit));
                }
            }
        }
        Ok(())
    }
}

/// The four digits of a UTF-16 unit.
fn hexadecimal(unit: u16) -> impl Iterator<Item = char> {
    (0..4).rev().filter_map(move |digit| char::from_digit(u32::from(unit >> (4 * digit)) & 15, 16))
}

/// A number as Python's `repr` writes it.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) if float.is_nan() => "NaN".to_owned(),
        Ok(float) if float.is_infinite() => (if float > 0.0 { "Infinity" } else { "-Infinity" }).to_owned(),
        Ok(float) => python_float(float),
        Err(_) => value.to_string(),
    }
}

/// Shortest digits that read back as the same number; exponent form below 1e-4 and from 1e16 on.
fn python_float(float: f64) -> String {
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = float.to_string();
    if text.contains('.') { text } else { format!("{text}.0") }
}
