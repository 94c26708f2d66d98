//! Rows of a text: JSONL, or one JSON array.

use std::io::{BufRead, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::decode::{PARQUET, Source};
use super::{Layout, MAX_ROW, Record, too_long};
use crate::error::{Error, Result};

/// Iterates over the rows of a text.
#[derive(Debug)]
pub(crate) struct TextRecords {
    path: PathBuf,
    source: Source,
    layout: Layout,
    /// The line that is read next.
    line: u64,
    /// Blank lines not handed out yet; they come before `ready`. A range, since there may be any number of them.
    blank: Range<u64>,
    ready: Option<Record>,
    done: bool,
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl TextRecords {
    pub(super) fn open(path: &Path, source: Source, layout: Option<Layout>) -> Result<Self> {
        let mut records = Self {
            path: path.to_path_buf(),
            source,
            layout: layout.unwrap_or(Layout::Lines),
            line: 1,
            blank: 1..1,
            ready: None,
            done: false,
        };
        records.start(layout).map_err(|error| records.explain(error))?;
        Ok(records)
    }

    fn start(&mut self, layout: Option<Layout>) -> Result<()> {
        let head = self.source.reader.fill_buf()?;
        if head.starts_with(PARQUET) {
            let message = "a compressed Parquet file; unpack it".to_owned();
            return Err(Error::Unreadable { path: self.path.clone(), message });
        }
        if head.starts_with(BYTE_ORDER_MARK) {
            self.source.reader.consume(BYTE_ORDER_MARK.len());
        }
        if layout == Some(Layout::Lines) {
            return Ok(());
        }
        self.skip_blank(|_| false)?;
        if self.source.reader.fill_buf()?.first() == Some(&b'[') {
            self.layout = Layout::Array;
            self.source.reader.consume(1);
        }
        Ok(())
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.source.consumed()
    }

    /// Skips white space and whatever `also` names.
    fn skip_blank(&mut self, also: fn(u8) -> bool) -> Result<()> {
        loop {
            let buffer = self.source.reader.fill_buf()?;
            let blank = buffer.iter().take_while(|&&byte| byte.is_ascii_whitespace() || also(byte)).count();
            self.line += newlines(&buffer[..blank]);
            let stop = blank < buffer.len() || buffer.is_empty();
            self.source.reader.consume(blank);
            if stop {
                return Ok(());
            }
        }
    }

    /// Reads lines until one is not blank. Blank lines count only if another row follows: a file may well end in
    /// some.
    fn read_line(&mut self) -> Result<()> {
        self.blank = self.line..self.line;
        while self.ready.is_none() {
            let line = self.line;
            let mut bytes = Vec::new();
            let count = (&mut self.source.reader).take(MAX_ROW as u64 + 1).read_until(b'\n', &mut bytes)?;
            if count == 0 {
                (self.blank, self.done) = (line..line, true);
                return Ok(());
            }
            let long = count > MAX_ROW;
            if long {
                self.skip_line()?;
            }
            self.line += 1;
            bytes.truncate(bytes.trim_ascii_end().len());
            if long {
                self.ready = Some(Record { line, row: Err(too_long()) });
            } else if bytes.is_empty() {
                self.blank.end = self.line;
            } else {
                self.ready = Some(Record { line, row: Ok(bytes) });
            }
        }
        Ok(())
    }

    /// Reads to the end of the line without keeping it.
    fn skip_line(&mut self) -> Result<()> {
        loop {
            let buffer = self.source.reader.fill_buf()?;
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let count = end.map_or(buffer.len(), |end| end + 1);
            self.source.reader.consume(count);
            if end.is_some() || count == 0 {
                return Ok(());
            }
        }
    }

    /// Reads one element of the array, or its end.
    fn read_element(&mut self) -> Result<()> {
        self.skip_blank(|byte| byte == b',')?;
        let line = self.line;
        let mut bytes = Vec::new();
        let mut long = false;
        let mut scanner = Scanner::default();
        loop {
            let buffer = self.source.reader.fill_buf()?;
            if buffer.is_empty() {
                return Err(self.syntax("the list is not closed; is the file cut off?"));
            }
            let length = buffer.iter().position(|&byte| scanner.ends_at(byte)).unwrap_or(buffer.len());
            let ended_by = buffer.get(length).copied();
            long |= bytes.len() + length > MAX_ROW;
            if !long {
                bytes.extend_from_slice(&buffer[..length]);
            }
            self.line += newlines(&buffer[..length]);
            self.source.reader.consume(length + usize::from(ended_by.is_some()));
            if let Some(end) = ended_by {
                if long {
                    self.ready = Some(Record { line, row: Err(too_long()) });
                } else if !bytes.trim_ascii().is_empty() {
                    self.ready = Some(Record { line, row: Ok(bytes) });
                }
                return if end == b']' { self.finish_array() } else { Ok(()) };
            }
        }
    }

    fn finish_array(&mut self) -> Result<()> {
        self.done = true;
        self.skip_blank(|_| false)?;
        if self.source.reader.fill_buf()?.is_empty() {
            return Ok(());
        }
        Err(self.syntax("something follows after the end of the list"))
    }

    fn syntax(&self, message: &str) -> Error {
        Error::Syntax { path: self.path.clone(), line: self.line, message: message.to_owned() }
    }

    /// What the unpacking says, with the place and what to do.
    fn explain(&self, error: Error) -> Error {
        match (error, self.source.compression) {
            (Error::Io(error), Some(compression)) => self.syntax(&format!(
                "the {compression} data cannot be unpacked from here on ({error}): the file is cut off or damaged; get \
                 it again"
            )),
            (error, _) => error,
        }
    }
}

impl Iterator for TextRecords {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_none() && !self.done {
            let read = match self.layout {
                Layout::Lines => self.read_line(),
                Layout::Array => self.read_element(),
            };
            if let Err(error) = read {
                self.done = true;
                self.ready = None;
                return Some(Err(self.explain(error)));
            }
        }
        if let Some(line) = self.blank.next() {
            return Some(Ok(Record { line, row: Ok(Vec::new()) }));
        }
        self.ready.take().map(Ok)
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().map(|&byte| u64::from(byte == b'\n')).sum()
}

/// Follows strings and brackets of JSON far enough to see where an element ends.
#[derive(Debug, Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scanner {
    fn ends_at(&mut self, byte: u8) -> bool {
        if self.in_string {
            let closes = byte == b'"' && !self.escaped;
            self.escaped = byte == b'\\' && !self.escaped;
            self.in_string = !closes;
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b',' | b']' if self.depth == 0 => return true,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        false
    }
}
