//! Rows of an input file one after the other, each as its JSON bytes and line: JSONL, or one JSON array.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use fs_err::File;

use crate::error::{Error, Result};

/// One row, not parsed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// Line where it starts, from 1.
    pub(crate) line: u64,
    /// Its bytes; empty for an empty line between others.
    pub(crate) bytes: Vec<u8>,
}

/// How rows stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One per line.
    Lines,
    /// Elements of one JSON array.
    Array,
}

/// Iterates over the rows of a file in bounded memory.
#[derive(Debug)]
pub(crate) struct Records {
    path: PathBuf,
    reader: BufReader<File>,
    layout: Layout,
    /// Lines begun so far.
    line: u64,
    bytes_read: u64,
    ready: VecDeque<Record>,
    done: bool,
}

/// A longer row is a file that was never meant to be read row by row.
const MAX_ROW: usize = 256 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Records {
    /// Opens a file; the layout is read off its first character unless given.
    pub(crate) fn open(path: &Path, layout: Option<Layout>) -> Result<Self> {
        let mut records = Self {
            path: path.to_path_buf(),
            reader: BufReader::with_capacity(1 << 16, File::open(path)?),
            layout: layout.unwrap_or(Layout::Lines),
            line: 1,
            bytes_read: 0,
            ready: VecDeque::new(),
            done: false,
        };
        if records.reader.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
            records.consume(BYTE_ORDER_MARK.len());
        }
        if layout == Some(Layout::Lines) {
            return Ok(records);
        }
        records.skip_blank(|_| false)?;
        if records.reader.fill_buf()?.first() == Some(&b'[') {
            records.layout = Layout::Array;
            records.consume(1);
        }
        Ok(records)
    }

    /// Bytes of the file consumed so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    fn consume(&mut self, count: usize) {
        self.reader.consume(count);
        self.bytes_read += count as u64;
    }

    /// Skips white space and whatever `also` names.
    fn skip_blank(&mut self, also: fn(u8) -> bool) -> Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let blank = buffer.iter().take_while(|&&byte| byte.is_ascii_whitespace() || also(byte)).count();
            let lines = newlines(&buffer[..blank]);
            self.line += lines;
            let stop = blank < buffer.len() || buffer.is_empty();
            self.consume(blank);
            if stop {
                return Ok(());
            }
        }
    }

    /// Reads lines until one is not blank. Blank lines count only if another row follows: a file may well end in
    /// some.
    fn read_line(&mut self) -> Result<()> {
        loop {
            let mut bytes = Vec::new();
            let limited = &mut std::io::Read::take(&mut self.reader, MAX_ROW as u64 + 1);
            let count = limited.read_until(b'\n', &mut bytes)?;
            self.bytes_read += count as u64;
            if count == 0 {
                self.ready.clear();
                self.done = true;
                return Ok(());
            }
            if count > MAX_ROW {
                return Err(self.syntax(self.line, format!("a line of more than {MAX_ROW} bytes")));
            }
            bytes.truncate(bytes.trim_ascii_end().len());
            let blank = bytes.trim_ascii_start().is_empty();
            self.ready.push_back(Record { line: self.line, bytes: if blank { Vec::new() } else { bytes } });
            self.line += 1;
            if !blank {
                return Ok(());
            }
        }
    }

    /// Reads one element of the array, or its end.
    fn read_element(&mut self) -> Result<()> {
        self.skip_blank(|byte| byte == b',')?;
        let line = self.line;
        let mut bytes = Vec::new();
        let mut scanner = Scanner::default();
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                let message = "the list is not closed; is the file cut off?".to_owned();
                return Err(self.syntax(self.line, message));
            }
            let length = buffer.iter().position(|&byte| scanner.ends_at(byte)).unwrap_or(buffer.len());
            let ended_by = buffer.get(length).copied();
            bytes.extend_from_slice(&buffer[..length]);
            self.line += newlines(&buffer[..length]);
            self.consume(length + usize::from(ended_by.is_some()));
            if bytes.len() > MAX_ROW {
                return Err(self.syntax(line, format!("an element of more than {MAX_ROW} bytes")));
            }
            if let Some(end) = ended_by {
                if !bytes.trim_ascii().is_empty() {
                    self.ready.push_back(Record { line, bytes });
                }
                return if end == b']' { self.finish_array() } else { Ok(()) };
            }
        }
    }

    fn finish_array(&mut self) -> Result<()> {
        self.done = true;
        self.skip_blank(|_| false)?;
        if self.reader.fill_buf()?.is_empty() {
            return Ok(());
        }
        Err(self.syntax(self.line, "something follows after the end of the list".to_owned()))
    }

    fn syntax(&self, line: u64, message: String) -> Error {
        Error::Syntax { path: self.path.clone(), line, message }
    }
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.done {
            let read = match self.layout {
                Layout::Lines => self.read_line(),
                Layout::Array => self.read_element(),
            };
            if let Err(error) = read {
                self.done = true;
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
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
