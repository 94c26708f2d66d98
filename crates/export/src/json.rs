//! `config.json` the way Python writes it: `json.dumps(config, indent=2, sort_keys=True)` and a newline.
//!
//! Every tool around Hugging Face writes its files like this, so that two of them can be compared as text.
//! Beyond indentation that means: keys sorted, non-ASCII characters escaped, and floats in Python's
//! notation (`1e-06`, `1000000.0`), which differs from that of `serde_json`.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// The text of a JSON file with this value, newline included.
pub fn to_json_text(value: &Value) -> String {
    let mut sorted = value.clone();
    sorted.sort_all_objects();
    let mut text = Vec::new();
    let python = Python(PrettyFormatter::with_indent(b"  "));
    sorted
        .serialize(&mut Serializer::with_formatter(&mut text, python))
        .expect("a JSON value can be written to memory");
    text.push(b'\n');
    String::from_utf8(text).expect("only ASCII is written")
}

/// Indentation of the pretty printer, numbers and strings of Python.
struct Python(PrettyFormatter<'static>);

impl Formatter for Python {
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(python_float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        for c in fragment.chars() {
            if (' '..='~').contains(&c) {
                out.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_array(out)
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array(out)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array_value(out)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object(out)
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object_value(out)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object_value(out)
    }
}

/// `repr` of a float: the shortest digits that read back the same, with an exponent outside 1e-4 .. 1e16.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("this format has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is a number");
    if !(-4..16).contains(&exponent) {
        return format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        let table = [
            (1e-6, "1e-06"),
            (1.5e-7, "1.5e-07"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (0.02, "0.02"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e6, "1000000.0"),
            (123_456.75, "123456.75"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e300, "1.25e+300"),
            (-2.5e-9, "-2.5e-09"),
            (0.1 + 0.2, "0.30000000000000004"),
        ];
        for (value, expected) in table {
            assert_eq!(python_float(value), expected);
        }
    }

    #[test]
    fn text_has_sorted_keys_and_only_ascii() {
        let value = json!({"b": [1, {"d": null, "c": true}], "a": "é\n\"\\\u{7f}😀", "Z": {}, "e": []});
        let expected = r#"{
  "Z": {},
  "a": "\u00e9\n\"\\\u007f\ud83d\ude00",
  "b": [
    1,
    {
      "c": true,
      "d": null
    }
  ],
  "e": []
}
"#;
        assert_eq!(to_json_text(&value), expected);
    }
}
