//! The index of a shard: where each record lies, so that opening a store reads no record.

use std::path::Path;

use fs_err as fse;

use crate::{
    Error, Result,
    disk::ShardName,
    record::{ALIGN, Header, u32_at, u64_at},
    shard::{self, HEADER_BYTES},
};

pub(crate) const ENTRY_BYTES: usize = 32;

/// One record of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) row: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) len: u32,
    /// Checksum of the record's header, which ties the entry to it.
    pub(crate) crc: u32,
}

impl Entry {
    pub(crate) fn new(header: &Header, offset: u64) -> Self {
        Self { row: header.row, offset, bytes: header.bytes, len: header.len, crc: header.crc }
    }

    /// Whether this is the entry of the record with this header.
    pub(crate) fn fits(&self, header: &Header) -> bool {
        *self == Self::new(header, self.offset)
    }
}

/// Tokens of all entries.
pub(crate) fn tokens(entries: &[Entry]) -> u64 {
    entries.iter().map(|e| e.len as u64).sum()
}

/// The bytes of an index file.
pub(crate) fn encode(store_id: u32, name: ShardName, shard_bytes: u64, entries: &[Entry]) -> Vec<u8> {
    let mut table = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for entry in entries {
        let Entry { row, offset, bytes, len, crc } = entry;
        table.extend_from_slice(&row.to_le_bytes());
        table.extend_from_slice(&offset.to_le_bytes());
        table.extend_from_slice(&bytes.to_le_bytes());
        table.extend_from_slice(&len.to_le_bytes());
        table.extend_from_slice(&crc.to_le_bytes());
    }
    let mut header = shard::index_common(store_id, name);
    header[24..32].copy_from_slice(&(entries.len() as u64).to_le_bytes());
    header[32..40].copy_from_slice(&shard_bytes.to_le_bytes());
    header[40..48].copy_from_slice(&tokens(entries).to_le_bytes());
    header[48..52].copy_from_slice(&crc32fast::hash(&table).to_le_bytes());
    shard::seal(&mut header);
    [&header[..], &table].concat()
}

/// Reads and checks an index: entries lie end to end from the shard's header to its last byte.
pub(crate) fn read(path: &Path, store_id: u32, name: ShardName, shard_bytes: u64) -> Result<Vec<Entry>> {
    let bytes = fse::read(path)?;
    decode(&bytes, store_id, name, shard_bytes).map_err(|what| Error::Damaged {
        path: path.into(),
        what: format!("{what}; run the same capture again: it makes the index anew"),
    })
}

fn decode(bytes: &[u8], store_id: u32, name: ShardName, shard_bytes: u64) -> Result<Vec<Entry>, String> {
    let (header, table) = bytes.split_at_checked(HEADER_BYTES).ok_or("it ends within its header")?;
    if header[..24] != shard::index_common(store_id, name)[..24] {
        return Err("it is no index of this shard".into());
    }
    let crc = crc32fast::hash(&header[..HEADER_BYTES - 4]);
    if u32_at(header, HEADER_BYTES - 4) != crc || u32_at(header, 48) != crc32fast::hash(table) {
        return Err("the checksum does not match".into());
    }
    if u64_at(header, 32) != shard_bytes {
        return Err(format!("it is for a shard of {} bytes, expected {shard_bytes}", u64_at(header, 32)));
    }
    let (records, left) = (table.len() / ENTRY_BYTES, table.len() % ENTRY_BYTES);
    if left != 0 || u64_at(header, 24) != records as u64 {
        return Err(format!("it says {} records and has room for {records}", u64_at(header, 24)));
    }
    let entries: Vec<Entry> = table.chunks_exact(ENTRY_BYTES).map(entry).collect();
    check_chain(&entries, shard_bytes)?;
    if u64_at(header, 40) != tokens(&entries) {
        return Err(format!("it says {} tokens, its entries have {}", u64_at(header, 40), tokens(&entries)));
    }
    Ok(entries)
}

fn entry(bytes: &[u8]) -> Entry {
    Entry {
        row: u64_at(bytes, 0),
        offset: u64_at(bytes, 8),
        bytes: u64_at(bytes, 16),
        len: u32_at(bytes, 24),
        crc: u32_at(bytes, 28),
    }
}

fn check_chain(entries: &[Entry], shard_bytes: u64) -> Result<(), String> {
    let mut end = HEADER_BYTES as u64;
    for entry in entries {
        if entry.offset != end || entry.bytes == 0 || entry.bytes % ALIGN != 0 {
            return Err(format!("row {} does not follow the record before it", entry.row));
        }
        end = end.checked_add(entry.bytes).ok_or("sizes overflow")?;
    }
    if end != shard_bytes {
        return Err(format!("its records end at byte {end} of {shard_bytes}"));
    }
    Ok(())
}
