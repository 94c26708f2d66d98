//! Chat templates as Hugging Face renders them: the environment, its functions, and the bounds on a render.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use crate::date::Date;
use crate::python_json;

/// A compiled chat template.
pub(crate) struct Jinja {
    environment: Environment<'static>,
    /// The file that it comes from.
    file: String,
    generation_blocks: bool,
}

/// Marks the text between `{% generation %}` and `{% endgeneration %}` in the output. Noncharacters: Unicode
/// reserves them for such internal use, so no conversation contains them.
pub(crate) const GENERATION_START: char = '\u{FDD0}';
/// End of the text that [`GENERATION_START`] begins.
pub(crate) const GENERATION_END: char = '\u{FDD1}';

/// Instructions (and 64-byte units of data) one render may use: real templates need below a thousand per message.
const FUEL: u64 = 4_000_000;
/// Longest text one render may give, in bytes: far above the longest context of any model.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat_template";

impl Jinja {
    /// Compiles `source`, which stands in `file`; the message of an error names both file and line.
    pub(crate) fn compile(source: &str, file: &str, today: Date) -> Result<Self, String> {
        let describe = |error: &Error| describe(error, file, "");
        let (source, generation_blocks) = mark_generation_blocks(source);
        let mut environment = environment(today).map_err(|error| describe(&error))?;
        environment.add_template_owned(NAME, source).map_err(|error| describe(&error))?;
        Ok(Self { environment, file: file.to_owned(), generation_blocks })
    }

    /// Whether the template itself says which text the assistant generates.
    pub(crate) fn has_generation_blocks(&self) -> bool {
        self.generation_blocks
    }

    /// Renders with the given variables. The text holds the generation marks if the template has such blocks.
    pub(crate) fn render(&self, variables: Value) -> Result<String, String> {
        let found = self.environment.get_template(NAME);
        let template = found.map_err(|error| describe(&error, &self.file, ""))?;
        let mut output = Bounded(Vec::new());
        match template.render_captured_to(variables, &mut output) {
            Ok(_) => String::from_utf8(output.0).map_err(|error| error.to_string()),
            Err(error) => Err(describe(&error, &self.file, template.source())),
        }
    }
}

impl fmt::Debug for Jinja {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jinja").field("generation_blocks", &self.generation_blocks).finish_non_exhaustive()
    }
}

fn environment(today: Date) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::filter);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: &str| today.strftime(format));
    Ok(environment)
}

/// Replaces the generation tags, which only Hugging Face's engine knows, by tags that print a mark and leave the
/// white space around exactly as a block tag does.
fn mark_generation_blocks(source: &str) -> (String, bool) {
    let mut marked = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        let inner = tag.trim_matches(['-', '+']).trim();
        let mark = match inner {
            "generation" => Some(GENERATION_START),
            "endgeneration" => Some(GENERATION_END),
            _ => None,
        };
        marked.push_str(&rest[..start]);
        if let Some(mark) = mark {
            let control = |symbol: Option<char>| {
                symbol.filter(|c| "-+".contains(*c)).map_or("", |c| if c == '-' { "-" } else { "+" })
            };
            let (left, right) = (control(tag.chars().next()), control(tag.chars().next_back()));
            let mark = mark.to_string();
            marked.extend(["{%", left, " if true %}{{ '", &mark, "' }}{% endif ", right, "%}"]);
            found = true;
        } else {
            marked.push_str(&rest[start..start + length + 2]);
        }
        rest = &rest[start + length + 2..];
    }
    marked.push_str(rest);
    (marked, found)
}

/// The message a user needs: what was raised, and at which line of which template.
fn describe(error: &Error, file: &str, source: &str) -> String {
    let message = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let message = match error.kind() {
        ErrorKind::OutOfFuel => "the template does not come to an end (out of fuel)".to_owned(),
        ErrorKind::WriteFailure => format!("the template gives more than {MAX_OUTPUT} bytes for one row"),
        ErrorKind::UndefinedError => match error.range().and_then(|range| source.get(range)) {
            Some(expression) => format!("{message}: `{expression}`"),
            None => message,
        },
        _ => message,
    };
    match error.line() {
        Some(line) => format!("{message} (line {line} of the template in {file})"),
        None => format!("{message} (the template in {file})"),
    }
}

/// Refuses to grow beyond [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(std::io::Error::other("output too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
