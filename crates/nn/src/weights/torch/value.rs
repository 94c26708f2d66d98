//! What was saved, seen from outside.

use super::TorchFile;
use super::node::Node;
use super::tensor::TorchTensor;

/// One value of a file; cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a> {
    pub(super) file: &'a TorchFile,
    pub(super) id: usize,
}

impl<'a> Value<'a> {
    fn node(self) -> &'a Node {
        &self.file.nodes[self.id]
    }

    fn of(self, id: usize) -> Self {
        Self { file: self.file, id }
    }

    /// The value of a text key of a dictionary; the last one, as in Python.
    pub fn get(self, key: &str) -> Option<Self> {
        self.entries()?.rev().find(|(name, _)| name.text() == Some(key)).map(|(_, value)| value)
    }

    /// Keys and values of a dictionary.
    pub fn entries(self) -> Option<impl DoubleEndedIterator<Item = (Self, Self)>> {
        let Node::Dict(entries) = self.node() else { return None };
        Some(entries.iter().map(move |&(key, value)| (self.of(key), self.of(value))))
    }

    /// Whether it is a dictionary.
    pub fn is_dict(self) -> bool {
        matches!(self.node(), Node::Dict(_))
    }

    /// Elements of a list or tuple.
    pub fn items(self) -> Option<impl ExactSizeIterator<Item = Self>> {
        let (Node::List(items) | Node::Tuple(items)) = self.node() else { return None };
        Some(items.iter().map(move |&item| self.of(item)))
    }

    /// A text.
    pub fn text(self) -> Option<&'a str> {
        if let Node::Text(text) = self.node() { Some(text) } else { None }
    }

    /// An integer.
    pub fn integer(self) -> Option<i64> {
        if let Node::Int(number) = self.node() { Some(*number) } else { None }
    }

    /// A number, integer or not.
    pub fn number(self) -> Option<f64> {
        match self.node() {
            Node::Int(number) => Some(*number as f64),
            Node::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// A truth value.
    pub fn truth(self) -> Option<bool> {
        if let Node::Bool(truth) = self.node() { Some(*truth) } else { None }
    }

    /// Bytes.
    pub fn bytes(self) -> Option<&'a [u8]> {
        if let Node::Bytes(bytes) = self.node() { Some(bytes) } else { None }
    }

    /// A tensor.
    pub fn tensor(self) -> Option<TorchTensor<'a>> {
        let Node::Tensor(layout) = self.node() else { return None };
        Some(TorchTensor { layout, file: self.file.bytes() })
    }

    /// What it is, in words.
    pub fn kind(self) -> &'static str {
        match self.node() {
            Node::None => "None",
            Node::Bool(_) => "a truth value",
            Node::Int(_) | Node::Float(_) => "a number",
            Node::Text(_) => "text",
            Node::Bytes(_) => "bytes",
            Node::Tuple(_) | Node::List(_) => "a list",
            Node::Dict(_) => "a dictionary",
            Node::Callable(_) => "a name",
            Node::Storage(_) => "a storage",
            Node::Tensor(_) => "a tensor",
        }
    }
}
