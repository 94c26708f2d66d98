//! The machine that a pickle runs on: it builds data, and stops at everything that would do more.
//!
//! Values live in one list and refer to each other by number, so that a value used a thousand times is stored once,
//! and nothing here or above walks a structure that a hostile file made deep or circular.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::{Error, Result};
use super::names::{Callable, callable, name_of};
use super::node::{Node, Storage};
use super::tensor::Strided;
use super::{Archive, torch};

/// Some gigabyte of them.
const MAX_VALUES: usize = 1 << 24;

/// The state of one run.
pub(super) struct Machine<'a> {
    path: &'a Path,
    archive: Archive<'a>,
    code: Vec<u8>,
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<usize>,
    /// Where the stack was at each open mark.
    marks: Vec<usize>,
    memo: BTreeMap<u32, usize>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(path: &'a Path, mut archive: Archive<'a>) -> Self {
        let code = std::mem::take(&mut archive.pickle);
        let (nodes, stack, marks, memo) = (Vec::new(), Vec::new(), Vec::new(), BTreeMap::new());
        Self { path, archive, code, at: 0, nodes, stack, marks, memo }
    }

    /// Runs to the end; all values, and which of them is the result.
    pub(super) fn run(mut self) -> Result<(Vec<Node>, usize)> {
        loop {
            let [opcode] = self.take()?;
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok((self.nodes, root));
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            // Protocol and frames say nothing that is needed.
            0x80 => self.take::<1>().map(|_| ()),
            0x95 => self.take::<8>().map(|_| ()),
            b'N' => self.push(Node::None),
            0x88 | 0x89 => self.push(Node::Bool(opcode == 0x88)),
            b'K' => self.take().and_then(|[byte]: [u8; 1]| self.push(Node::Int(byte.into()))),
            b'M' => self.take().and_then(|bytes| self.push(Node::Int(u16::from_le_bytes(bytes).into()))),
            b'J' => self.take().and_then(|bytes| self.push(Node::Int(i32::from_le_bytes(bytes).into()))),
            0x8a => self.long(),
            b'G' => self.take().and_then(|bytes| self.push(Node::Float(f64::from_be_bytes(bytes)))),
            0x8c | b'X' | 0x8d => self.text(opcode),
            b'C' | b'B' => self.byte_text(opcode),
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b't' => self.popped_to_mark().and_then(|items| self.push(Node::Tuple(items))),
            0x85..=0x87 => self.short_tuple(usize::from(opcode - 0x84)),
            b'a' => self.pop().and_then(|item| self.extend(vec![item])),
            b'e' => self.popped_to_mark().and_then(|items| self.extend(items)),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(&[key, value])
            }
            b'u' => self.popped_to_mark().and_then(|items| self.insert(&items)),
            b'q' | b'r' | 0x94 => self.remember(opcode),
            b'h' | b'j' => self.recall(opcode),
            b'c' => self.global_lines(),
            0x93 => self.global_stacked(),
            b'Q' => self.storage(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            other => Err(self.refuse(&format!("instruction {}", name_of(other)))),
        }
    }

    // Reading.

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.code.get(self.at..self.at + N).and_then(|bytes| bytes.try_into().ok());
        self.at += N;
        bytes.ok_or_else(|| self.damaged("it ends in the middle"))
    }

    fn take_slice(&mut self, length: u64) -> Result<&[u8]> {
        let start = self.at;
        let end = usize::try_from(length).ok().and_then(|length| start.checked_add(length));
        let Some(end) = end.filter(|&end| end <= self.code.len()) else {
            return Err(self.damaged("it ends in the middle of a text"));
        };
        self.at = end;
        Ok(&self.code[start..end])
    }

    fn line(&mut self) -> Result<String> {
        let rest = self.code.get(self.at..).unwrap_or_default();
        let length = rest.iter().take(512).position(|&byte| byte == b'\n');
        let Some(length) = length else { return Err(self.damaged("a name without an end")) };
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(line)
    }

    fn text(&mut self, opcode: u8) -> Result<()> {
        let length = match opcode {
            0x8c => self.take().map(|[byte]: [u8; 1]| u64::from(byte))?,
            b'X' => u64::from(u32::from_le_bytes(self.take()?)),
            _ => u64::from_le_bytes(self.take()?),
        };
        let text = std::str::from_utf8(self.take_slice(length)?).map(str::to_owned);
        let text = text.map_err(|_| self.damaged("a text that is not UTF-8"))?;
        self.push(Node::Text(text))
    }

    fn byte_text(&mut self, opcode: u8) -> Result<()> {
        let length = match opcode {
            b'C' => self.take().map(|[byte]: [u8; 1]| u64::from(byte))?,
            _ => u64::from(u32::from_le_bytes(self.take()?)),
        };
        let bytes = self.take_slice(length)?.to_vec();
        self.push(Node::Bytes(bytes))
    }

    /// An integer of up to eight bytes; larger ones are nobody's shape or count.
    fn long(&mut self) -> Result<()> {
        let [length] = self.take()?;
        let bytes = self.take_slice(length.into())?;
        if bytes.len() > 8 {
            return Err(self.refuse("an integer of more than 64 bits"));
        }
        let negative = bytes.last().is_some_and(|&byte| byte & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(whole)))
    }

    // The stack.

    fn push(&mut self, node: Node) -> Result<()> {
        if self.nodes.len() == MAX_VALUES {
            return Err(self.damaged("more values than a file of tensors can have"));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.damaged("it takes a value where there is none"));
        }
        Ok(self.stack.pop().expect("longer than the floor"))
    }

    fn popped_to_mark(&mut self) -> Result<Vec<usize>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("it closes what was never opened"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.get(floor..).and_then(<[usize]>::last).copied();
        top.ok_or_else(|| self.damaged("it takes a value where there is none"))
    }

    fn short_tuple(&mut self, length: usize) -> Result<()> {
        let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        self.push(Node::Tuple(items))
    }

    fn extend(&mut self, more: Vec<usize>) -> Result<()> {
        let top = self.top()?;
        match &mut self.nodes[top] {
            Node::List(items) => {
                items.extend(more);
                Ok(())
            }
            _ => Err(self.damaged("it appends to what is no list")),
        }
    }

    fn insert(&mut self, items: &[usize]) -> Result<()> {
        let top = self.top()?;
        if !items.len().is_multiple_of(2) {
            return Err(self.damaged("a key without a value"));
        }
        match &mut self.nodes[top] {
            Node::Dict(entries) => {
                entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err(self.damaged("it sets a key of what is no dictionary")),
        }
    }

    // The memo.

    fn remember(&mut self, opcode: u8) -> Result<()> {
        let slot = match opcode {
            b'q' => self.take().map(|[byte]: [u8; 1]| u32::from(byte))?,
            b'r' => u32::from_le_bytes(self.take()?),
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<()> {
        let slot = match opcode {
            b'h' => self.take().map(|[byte]: [u8; 1]| u32::from(byte))?,
            _ => u32::from_le_bytes(self.take()?),
        };
        let id = self.memo.get(&slot).copied();
        self.stack.push(id.ok_or_else(|| self.damaged("it recalls what it never kept"))?);
        Ok(())
    }

    // Names and what they make.

    fn global_lines(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.global(&module, &name)
    }

    fn global_stacked(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Node::Text(name), Node::Text(module)) = (&self.nodes[name], &self.nodes[module]) else {
            return Err(self.damaged("a name that is no text"));
        };
        let (name, module) = (name.clone(), module.clone());
        self.global(&module, &name)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        match callable(module, name) {
            Some(callable) => self.push(Node::Callable(callable)),
            None => Err(self.refuse(&format!("the name {module}.{name}"))),
        }
    }

    /// `('storage', class, key, device, elements)`: an entry of the archive.
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let parts = match &self.nodes[id] {
            Node::Tuple(parts) => parts.iter().map(|&part| &self.nodes[part]).collect(),
            _ => Vec::new(),
        };
        let [
            Node::Text(kind),
            Node::Callable(Callable::StorageOf(dtype)),
            Node::Text(key),
            _,
            Node::Int(elements),
        ] = parts[..]
        else {
            return Err(self.refuse("a persistent object that is no storage"));
        };
        let (dtype, elements, entry) = (*dtype, *elements, format!("data/{key}"));
        if kind != "storage" {
            return Err(self.refuse("a persistent object that is no storage"));
        }
        let range = self.archive.range(&entry)?;
        let needed = usize::try_from(elements).ok().and_then(|n| n.checked_mul(dtype.size()));
        if needed.is_none_or(|needed| needed > range.len()) {
            let why = format!("{elements} elements of {dtype} in {} bytes", range.len());
            return Err(self.damaged(&why));
        }
        self.push(Node::Storage(Storage { dtype, range }))
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Node::Tuple(arguments), Node::Callable(callable)) =
            (&self.nodes[arguments], &self.nodes[callable])
        else {
            return Err(self.refuse("a call of something that is no name"));
        };
        let (arguments, callable) = (arguments.clone(), *callable);
        match (callable, &arguments[..]) {
            (Callable::OrderedDict, []) => self.push(Node::Dict(Vec::new())),
            (Callable::OrderedDict, &[pairs]) => self.ordered(pairs),
            (Callable::Size, &[tuple]) => {
                let node = self.nodes[tuple].clone();
                if matches!(node, Node::Tuple(_)) {
                    self.push(node)
                } else {
                    Err(self.damaged("a wrong size"))
                }
            }
            (Callable::Tensor, &[storage, offset, shape, strides, ..]) => {
                self.tensor(storage, offset, shape, strides)
            }
            (Callable::Parameter, &[tensor, ..]) => {
                self.stack.push(tensor);
                Ok(())
            }
            _ => Err(self.refuse("a call with other arguments than PyTorch's")),
        }
    }

    /// An ordered dictionary from a list of pairs.
    fn ordered(&mut self, pairs: usize) -> Result<()> {
        let (Node::List(pairs) | Node::Tuple(pairs)) = &self.nodes[pairs] else {
            return Err(self.damaged("an ordered dictionary of no pairs"));
        };
        let pair = |&pair: &usize| match &self.nodes[pair] {
            Node::List(pair) | Node::Tuple(pair) => Some((*pair.first()?, *pair.get(1)?)),
            _ => None,
        };
        let entries = pairs.iter().map(pair).collect::<Option<Vec<_>>>();
        let entries = entries.ok_or_else(|| self.damaged("an ordered dictionary of no pairs"))?;
        self.push(Node::Dict(entries))
    }

    fn tensor(&mut self, storage: usize, offset: usize, shape: usize, strides: usize) -> Result<()> {
        let sizes = |id: usize| match &self.nodes[id] {
            Node::Tuple(items) | Node::List(items) => items.iter().map(|&item| self.size(item)).collect(),
            _ => None,
        };
        let (Node::Storage(Storage { dtype, range }), Some(offset), Some(shape), Some(strides)) =
            (&self.nodes[storage], self.size(offset), sizes(shape), sizes(strides))
        else {
            return Err(self.damaged("a tensor of something else than a storage and sizes"));
        };
        let tensor = Strided::new(*dtype, range.clone(), offset, shape, strides);
        let tensor = tensor.map_err(|why| self.damaged(&why))?;
        self.push(Node::Tensor(tensor))
    }

    fn size(&self, id: usize) -> Option<usize> {
        if let Node::Int(number) = self.nodes[id] { usize::try_from(number).ok() } else { None }
    }

    /// Attributes of a dictionary (PyTorch puts versions there) are of no interest; of anything else they are refused.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        let top = self.top()?;
        match self.nodes[top] {
            Node::Dict(_) => Ok(()),
            _ => Err(self.refuse("instruction BUILD on something else than a dictionary")),
        }
    }

    fn damaged(&self, what: &str) -> Error {
        torch(self.path, format!("its pickle is damaged at byte {}: {what}", self.at), super::AGAIN)
    }

    fn refuse(&self, what: &str) -> Error {
        let why = format!(
            "its pickle holds {what} (byte {}), and only tensors, dictionaries, lists, numbers and texts are read",
            self.at
        );
        torch(
            self.path,
            why,
            "save only those, from a source you trust: torch.save({name: tensor, ...}, FILE)",
        )
    }
}
