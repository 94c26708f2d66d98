//! What one rank knows and tells all others.

use specforge_tensor::{Device, Error, Group, Result, Tensor};

/// The text that rank `root` has, on every rank; `device` is where tensors of this group lie.
pub fn tell(group: &dyn Group, device: Device, root: usize, text: &str) -> Result<String> {
    let mut length = Tensor::from_u32(device, vec![text.len() as u32]);
    group.broadcast(&mut length, root)?;
    let n = length.to_u32()[0] as usize;
    // Whole words; what is longer or shorter than the root's is overwritten anyway.
    let mut bytes = if group.rank() == root { text.as_bytes().to_vec() } else { Vec::new() };
    bytes.resize(n.next_multiple_of(4), 0);
    let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let mut words = Tensor::from_u32(device, words);
    if n > 0 {
        group.broadcast(&mut words, root)?;
    }
    let mut bytes: Vec<u8> = words.to_u32().into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.truncate(n);
    String::from_utf8(bytes).map_err(|_| Error::Group {
        op: "broadcast",
        rank: group.rank(),
        size: group.size(),
        why: format!("what rank {root} told is not text: the ranks are out of step"),
    })
}
