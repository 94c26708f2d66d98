//! The feature store: what was captured from a target, on disk, for training without the target.
//!
//! One *record* holds the features of one *row* (a training sequence) of `len` tokens: for every
//! field of the [`Schema`] an array of `[len, width]` values. Records lie in *shards*, append-only
//! files written by one [`Writer`] each and read through a memory map by a [`Reader`].
//! The bytes are described in `docs/reference/feature-store.md`.
//!
//! This crate knows nothing about models, methods or text: it stores named arrays and the
//! [`Identity`] of what they were captured from, and compares that identity when asked.
//!
//! ```
//! use specforge_store::{DType, Encoding, Field, Identity, Reader, Schema, Spec, Values, Writer, WriterOptions};
//! # fn main() -> specforge_store::Result<()> {
//! # let folder = tempfile::tempdir().map_err(specforge_store::Error::Io)?;
//! # let folder = folder.path().join("features");
//! let schema = Schema::new(vec![Field::new("input_ids", DType::U32, 1)])?;
//! let spec = Spec { schema, encoding: Encoding::Bf16, identity: Identity::default() };
//!
//! let mut writer = Writer::open(&folder, &spec, &WriterOptions::default())?;
//! if !writer.contains(7) {
//!     writer.append(7, 3, &[("input_ids", Values::U32(&[11, 12, 13]))])?;
//! }
//! writer.finish()?;
//!
//! let reader = Reader::open(&folder)?;
//! assert_eq!(reader.record(7)?.field_u32("input_ids")?, [11, 12, 13]);
//! # Ok(())
//! # }
//! ```

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!("the store is read straight from memory maps: a 64-bit little-endian machine is needed");

mod disk;
mod error;
mod fp8;
mod identity;
mod index;
mod lossless;
mod manifest;
mod part;
mod reader;
mod record;
mod schema;
mod shard;
mod writer;

pub use error::{Error, Result};
pub use identity::{CaptureSpec, Difference, Identity, Spec, TargetIdentity};
pub use reader::{Damage, Reader, Record, Report, Summary, Verify};
pub use record::Values;
pub use schema::{DType, Encoding, Field, Schema};
pub use writer::{Writer, WriterOptions, finish_interrupted};
