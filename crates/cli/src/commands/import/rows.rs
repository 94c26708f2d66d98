//! The token ids and loss masks of files, as rows that a recipe can name.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use specforge_import::{FeatureFile, files};

use crate::show::{Progress, note, print};

/// Unpacked files are held in memory whole; here no target says how long a row can be.
const MOST_BYTES: u64 = 8 << 30;

/// Writes one row per file, padding cut off.
pub(super) fn write(from: &Path, out: &Path) -> Result<()> {
    let files = files(from)?;
    let unfinished = out.with_added_extension("tmp");
    let mut writer = BufWriter::new(fs_err::File::create(&unfinished)?);
    let progress = Progress::new("rows", false);
    for (done, path) in files.iter().enumerate() {
        let file = FeatureFile::open(path, MOST_BYTES)?;
        let features = file.features()?;
        let Some(mask) = features.loss_mask else {
            bail!("{}: it has no loss_mask: name the conversations it was made of instead", path.display());
        };
        let n = without_padding(&features.input_ids, &mask);
        let row = json!({ "input_ids": &features.input_ids[..n], "loss_mask": &mask[..n] });
        writeln!(writer, "{row}")?;
        progress.set(done as u64 + 1, files.len() as u64);
    }
    progress.done();
    writer.into_inner().context("rows")?.sync_all()?;
    fs_err::rename(&unfinished, out)?;
    note!("rows      {} rows; name this file in data.conversations and import with that recipe", files.len());
    print(out.display())
}

/// The length without the run of one unsupervised token at the end, which is what batches are filled up with.
fn without_padding(ids: &[u32], mask: &[u8]) -> usize {
    let Some(&pad) = ids.last() else { return 0 };
    let padding = ids.iter().zip(mask).rev().take_while(|&(&id, &bit)| id == pad && bit == 0).count();
    ids.len() - padding
}

#[cfg(test)]
mod tests {
    use super::without_padding;

    #[test]
    fn padding_is_one_token_that_is_not_supervised() {
        assert_eq!(without_padding(&[4, 5, 0, 0], &[0, 1, 0, 0]), 2);
        assert_eq!(without_padding(&[4, 5, 5, 5], &[0, 1, 1, 0]), 3);
        assert_eq!(without_padding(&[4, 5], &[0, 1]), 2);
        assert_eq!(without_padding(&[7, 7], &[0, 0]), 0);
        assert_eq!(without_padding(&[], &[]), 0);
    }
}
