//! The names that a pickle may use, and what instructions are called.

use super::super::Dtype;

/// The names that a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Callable {
    OrderedDict,
    /// `torch.Size`, a tuple.
    Size,
    /// `torch._utils._rebuild_tensor_v2`.
    Tensor,
    /// `torch._utils._rebuild_parameter`.
    Parameter,
    /// A class of storages, of this element type.
    StorageOf(Dtype),
}

/// What a name of a module stands for; none for all names but PyTorch's own few.
pub(super) fn callable(module: &str, name: &str) -> Option<Callable> {
    match (module, name) {
        ("collections", "OrderedDict") => Some(Callable::OrderedDict),
        ("torch", "Size") => Some(Callable::Size),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Callable::Tensor),
        ("torch._utils", "_rebuild_parameter") => Some(Callable::Parameter),
        ("torch", storage) => dtype_of(storage).map(Callable::StorageOf),
        _ => None,
    }
}

fn dtype_of(storage: &str) -> Option<Dtype> {
    Some(match storage {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        _ => return None,
    })
}

/// Instructions that make objects or run code, by the names of Python's `pickletools`.
pub(super) fn name_of(opcode: u8) -> String {
    let name = match opcode {
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        b'i' => "INST",
        b'o' => "OBJ",
        b'P' => "PERSID",
        0x82..=0x84 => "EXT",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        b'2' => "DUP",
        b'0' => "POP",
        b'1' => "POP_MARK",
        _ => "",
    };
    if name.is_empty() { format!("0x{opcode:02x}") } else { name.to_owned() }
}
