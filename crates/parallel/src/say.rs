//! What one rank knows and tells all others, or another one.

use specforge_tensor::{Device, Error, Group, Result, Tensor};

/// The numbers that rank `root` has, on every rank; `device` is where tensors of this group lie.
pub fn tell_numbers(group: &dyn Group, device: Device, root: usize, own: &[u32]) -> Result<Vec<u32>> {
    let mut length = Tensor::from_u32(device, vec![own.len() as u32]);
    group.broadcast(&mut length, root)?;
    // What is longer or shorter than the root's is overwritten anyway.
    let mut numbers = own.to_vec();
    numbers.resize(length.to_u32()[0] as usize, 0);
    if numbers.is_empty() {
        return Ok(numbers);
    }
    let mut numbers = Tensor::from_u32(device, numbers);
    group.broadcast(&mut numbers, root)?;
    Ok(numbers.to_u32())
}

/// The text that rank `root` has, on every rank; `device` is where tensors of this group lie.
pub fn tell(group: &dyn Group, device: Device, root: usize, text: &str) -> Result<String> {
    let (rank, size) = (group.rank(), group.size());
    let why = || format!("what rank {root} told is not text: the ranks are out of step");
    let numbers = tell_numbers(group, device, root, &to_numbers(text))?;
    from_numbers(&numbers).ok_or_else(|| Error::Group { op: "broadcast", rank, size, why: why() })
}

/// Sends numbers to one rank, which must [`receive_numbers`].
pub fn send_numbers(group: &dyn Group, device: Device, to: usize, numbers: &[u32]) -> Result<()> {
    group.send(&Tensor::from_u32(device, vec![numbers.len() as u32]), to)?;
    if numbers.is_empty() {
        return Ok(());
    }
    group.send(&Tensor::from_u32(device, numbers.to_vec()), to)
}

/// What another rank sends with [`send_numbers`].
pub fn receive_numbers(group: &dyn Group, device: Device, from: usize) -> Result<Vec<u32>> {
    let mut length = Tensor::from_u32(device, vec![0]);
    group.receive(&mut length, from)?;
    let n = length.to_u32()[0] as usize;
    if n == 0 {
        return Ok(Vec::new());
    }
    let mut numbers = Tensor::from_u32(device, vec![0; n]);
    group.receive(&mut numbers, from)?;
    Ok(numbers.to_u32())
}

/// A text as numbers: its length in bytes, then four of them at a time.
fn to_numbers(text: &str) -> Vec<u32> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(text.len().next_multiple_of(4), 0);
    let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    [text.len() as u32].into_iter().chain(words).collect()
}

/// The text that [`to_numbers`] was given.
fn from_numbers(numbers: &[u32]) -> Option<String> {
    let (length, words) = numbers.split_first()?;
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(*length as usize);
    String::from_utf8(bytes).ok()
}
