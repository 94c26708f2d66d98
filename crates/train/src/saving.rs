//! Saving beside the training: a step waits for the copy to the host, a thread writes it out.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use specforge_export::{Tensor as FileTensor, write_safetensors};
use specforge_tensor::Params;

use crate::checkpoint::{DRAFT, INDEX, Index, STATE, file_tensor, sync_folder, write_synced};
use crate::{Checkpoints, Error, Optimizer, Ranks, Result, State};

/// How often the first rank looks whether the others' files are there.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What one rank writes of a step, in host memory.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Everything of the loop besides tensors.
    pub state: State,
    /// Whether this rank completes the checkpoint.
    pub is_first: bool,
    draft: Vec<FileTensor<'static>>,
    /// This rank's file of the optimizer's state, its number, and the files of all ranks.
    optimizer: Option<(Vec<FileTensor<'static>>, usize, Index)>,
    patience: Duration,
}

impl Snapshot {
    /// Copies what this rank is to write. Every parameter is there whole.
    pub(crate) fn take(params: &Params, optimizer: &Optimizer, state: &State) -> Result<Self> {
        let is_first = optimizer.ranks().is_none_or(|ranks| ranks.mesh.is_first());
        let is_beside_first = optimizer.ranks().is_none_or(Ranks::is_beside_first);
        let mut draft = Vec::new();
        for (_, param) in params.iter().filter(|(_, p)| p.trainable && is_beside_first) {
            // One matrix at a time is whole on a device.
            let whole = optimizer.whole(param)?;
            if is_first {
                draft.push(file_tensor(&param.name, &whole));
            }
        }
        let own = optimizer.state(params)?.map(|own| {
            let tensors = own.tensors.iter().map(|(name, tensor)| file_tensor(name, tensor)).collect();
            (tensors, own.file, own.index)
        });
        let patience = optimizer.ranks().map_or(Duration::ZERO, |ranks| ranks.patience);
        let state = state.clone();
        Ok(Self { state, is_first, draft, optimizer: own, patience })
    }

    /// Writes this rank's files into a folder; the first rank returns once everyone's are there.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs_err::create_dir_all(folder)?;
        if let Some((tensors, file, index)) = &self.optimizer {
            write_safetensors(&folder.join(&index.files[*file]), tensors)?;
        }
        if !self.is_first {
            return Ok(());
        }
        write_safetensors(&folder.join(DRAFT), &self.draft)?;
        let index = self.optimizer.as_ref().map(|(_, _, index)| index);
        if let Some(index) = index.filter(|index| index.files.len() > 1) {
            let text = serde_json::to_string_pretty(index).map_err(std::io::Error::other)?;
            write_synced(&folder.join(INDEX), &text)?;
        }
        let text = serde_json::to_string_pretty(&self.state).map_err(std::io::Error::other)?;
        write_synced(&folder.join(STATE), &text)?;
        self.wait_for_others(folder)?;
        sync_folder(folder)
    }

    /// A file is there once it is complete.
    fn wait_for_others(&self, folder: &Path) -> Result<()> {
        let until = Instant::now() + self.patience;
        let files: Vec<&String> = self.optimizer.iter().flat_map(|(_, _, index)| &index.files).collect();
        let missing = || files.iter().find(|name| !folder.join(name).exists());
        while let Some(name) = missing() {
            if Instant::now() > until {
                let reason = format!(
                    "another rank did not write it within {} s; all ranks need the same folder",
                    self.patience.as_secs()
                );
                return Err(Error::Checkpoint { path: folder.join(name), reason });
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

/// The checkpoint that is being written, if any: one at a time.
#[derive(Debug)]
pub(crate) struct Saving {
    checkpoints: Checkpoints,
    running: Option<JoinHandle<Result<PathBuf>>>,
}

impl Saving {
    pub(crate) fn new(checkpoints: Checkpoints) -> Self {
        Self { checkpoints, running: None }
    }

    /// Begins to write; one that is being written is finished first, and its folder returned.
    pub(crate) fn start(&mut self, snapshot: Snapshot) -> Result<Option<PathBuf>> {
        let before = self.finish()?;
        let checkpoints = self.checkpoints.clone();
        self.running = Some(std::thread::spawn(move || checkpoints.write(&snapshot)));
        Ok(before)
    }

    /// The folder that was written since the last call, if it is complete by now. An error of writing ends the run.
    pub(crate) fn poll(&mut self) -> Result<Option<PathBuf>> {
        if self.running.as_ref().is_some_and(JoinHandle::is_finished) { self.finish() } else { Ok(None) }
    }

    /// As [`Saving::poll`], after waiting for it.
    pub(crate) fn finish(&mut self) -> Result<Option<PathBuf>> {
        let Some(running) = self.running.take() else { return Ok(None) };
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }
}
