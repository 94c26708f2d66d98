//! A loaded target and its forward passes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use specforge_nn::weights::Weights;
use specforge_tensor::{DType, Device, Group, ParamId, Params, Split, Tape, Tensor, Var, VocabStats, Weight};

use crate::cache::{KvCache, Tree};
use crate::frame::Frame;
use crate::loader::{Loader, Source};
use crate::pass::{Layers, Pass, Sight};
use crate::quantization::Quantization;
use crate::rotary::{RotaryTables, Sequence};
use crate::{Capture, Captured, Error, Result, TargetInfo, architecture};

/// A frozen target model.
#[derive(Debug)]
pub struct Target {
    info: TargetInfo,
    /// What of it this rank computes; alone all of it.
    own: TargetInfo,
    /// Ranks that share it.
    ranks: Option<Arc<dyn Group>>,
    frame: Frame,
    device: Device,
    rotary: RotaryTables,
    /// Of layers with a rotary embedding of their own.
    local_rotary: Option<RotaryTables>,
    params: Params,
    /// `[V, H]`.
    embedding: ParamId,
    layers: Layers,
    /// The norm after the last layer, `[H]`.
    norm: ParamId,
    /// `[V, H]`; the embedding where they are tied and logits are not scaled.
    head: ParamId,
}

impl Target {
    /// Loads a Hugging Face folder. Weights go from the mapped files straight to tensors of the type `storage`, or
    /// of the type they are stored in; arithmetic is the device's, whatever the storage. `E4m3` rounds the matrices of
    /// linear layers to 8-bit floats, on devices that have them.
    pub fn load(folder: impl AsRef<Path>, device: Device, storage: Option<DType>) -> Result<Self> {
        let folder = folder.as_ref();
        let info = TargetInfo::read(folder)?;
        let weights = Weights::open(folder)?;
        Self::build(info, folder, Source::Files(&weights), device, storage, None)
    }

    /// As [`Target::load`], shared by ranks (tensor parallel; Shoeybi et al., 2019): each has some heads, some of every
    /// MLP, and some rows of embedding and head, and reads no more than that of the files. All ranks make the same calls
    /// with the same tokens and get the same states. With fewer key-value heads than ranks, neighbouring ranks have the
    /// same ones. Calls of the target and of a draft must not meet in one group: give the target one of its own
    /// ([`Group::split`]) where a thread of its own runs it.
    pub fn load_shared(
        folder: impl AsRef<Path>,
        device: Device,
        storage: Option<DType>,
        ranks: &Arc<dyn Group>,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let info = TargetInfo::read(folder)?;
        let weights = Weights::open(folder)?;
        Self::build(info, folder, Source::Files(&weights), device, storage, Some(ranks))
    }

    /// A target of this description with weights that the device draws: for measuring.
    pub fn random(info: TargetInfo, device: Device, storage: Option<DType>) -> Result<Self> {
        Self::build(info, Path::new("random weights"), Source::Random, device, storage, None)
    }

    fn build(
        info: TargetInfo,
        folder: &Path,
        source: Source<'_>,
        device: Device,
        storage: Option<DType>,
        ranks: Option<&Arc<dyn Group>>,
    ) -> Result<Self> {
        let architecture = architecture::of(&info.path, &info.raw)?;
        let ranks = ranks.filter(|ranks| ranks.size() > 1);
        let own = info.shared_by(ranks.map_or(1, |ranks| ranks.size()))?;
        let frame = (architecture.frame)(&info)?;
        let mut params = Params::new();
        // Embedding, head and norms stay as they are: they are small, or the teacher's.
        let (fp8, storage) = match storage {
            Some(DType::E4m3) => (true, Some(DType::Bf16)),
            other => (false, other),
        };
        let (prefix, norm_offset) = (frame.prefix.to_owned(), frame.norm_offset);
        let (quantization, params_of) = (Quantization::of(&info)?, &mut params);
        let mut loader = Loader {
            folder,
            source,
            params: params_of,
            device,
            storage,
            fp8,
            quantization,
            norm_offset,
            prefix,
            ranks,
        };
        let embedding = embedding_of(&info, &frame, &mut loader)?;
        let mut body = loader.at(frame.body);
        let layers = (architecture.layers)(&info, &mut body.at("layers"))?;
        let norm = body.norm(frame.norm, info.hidden_size)?;
        let head = head_of(&info, &frame, embedding, &mut loader)?;
        let rotary = RotaryTables::new(info.rope.clone(), device);
        let local_rotary = frame.local_rope.clone().map(|rope| RotaryTables::new(rope, device));
        let ranks = ranks.cloned();
        Ok(Self {
            info,
            own,
            ranks,
            frame,
            device,
            rotary,
            local_rotary,
            params,
            embedding,
            layers,
            norm,
            head,
        })
    }

    /// The target's description.
    pub fn info(&self) -> &TargetInfo {
        &self.info
    }

    /// The device that holds the weights.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The ranks that share it; `None` alone.
    pub fn ranks(&self) -> Option<&Arc<dyn Group>> {
        self.ranks.as_ref()
    }

    /// Token embeddings as the checkpoint has them, `[V, H]`, in the storage type; this rank's rows where it is shared.
    pub fn embedding(&self) -> &Tensor {
        &self.params.get(self.embedding).value
    }

    /// The language-model head, `[V, H]`, in the storage type; the embedding where they are tied. A factor on the
    /// logits is in it. This rank's rows where it is shared.
    pub fn head(&self) -> &Tensor {
        &self.params.get(self.head).value
    }

    /// The rows `[R, H]` of tokens as they enter the first layer.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        Ok(self.embed_on(&Tape::inference(&self.params), tokens)?.value().clone())
    }

    fn embed_on(&self, tape: &Tape<'_>, tokens: &[u32]) -> Result<Var> {
        let index = Tensor::from_u32(self.device, tokens.to_vec());
        let rows = tape.embedding_shared(self.embedding, &index, self.ranks.as_ref())?;
        Ok(if self.frame.embedding_scale == 1.0 {
            rows
        } else {
            tape.scale(&rows, self.frame.embedding_scale)?
        })
    }

    /// Logits `[R, V]` of last hidden states `[R, H]`.
    pub fn logits(&self, last_hidden: &Tensor) -> Result<Tensor> {
        let tape = Tape::inference(&self.params);
        let logits = tape.linear(&tape.input(last_hidden.clone()), &Weight::of(self.head))?;
        let logits = match &self.ranks {
            Some(ranks) => tape.input(Split::of(ranks, false, ranks.size()).whole(logits.value(), ranks)?),
            None => logits,
        };
        let cap = self.frame.logit_cap;
        Ok(cap.map_or(Ok(logits.clone()), |cap| tape.soft_cap(&logits, cap))?.value().clone())
    }

    /// Best token and log-sum-exp over the whole vocabulary of last hidden states `[R, H]`.
    pub fn vocab_stats(&self, last_hidden: &Tensor) -> Result<VocabStats> {
        Ok(Tape::vocab_stats_shared(last_hidden, self.head(), self.ranks.as_ref())?)
    }

    /// Runs documents of any lengths, packed without padding: each starts at position 0 and sees itself alone.
    ///
    /// Layers above the last one captured do not run unless the last hidden state is asked for. The same documents
    /// give the same bits whenever they are asked for together, on any number of threads.
    pub fn forward(&self, documents: &[&[u32]], capture: &Capture) -> Result<Captured> {
        capture.check(self.layers.len())?;
        for (document, tokens) in documents.iter().enumerate() {
            self.check_tokens(document, tokens)?;
            self.check_length(document, tokens.len(), tokens.len())?;
        }
        let bounds = bounds_of(documents);
        let sequence =
            |tokens: &&[u32]| Sequence { positions: (0..tokens.len() as u32).collect(), len: tokens.len() };
        let sequences: Vec<_> = documents.iter().map(sequence).collect();
        let depth = capture.depth(self.layers.len());
        let tokens = documents.concat();
        let (hidden_states, last_hidden) =
            self.run(&tokens, &sequences, Sight::Documents(&bounds), capture, depth)?;
        Ok(Captured { hidden_states, last_hidden, bounds })
    }

    /// Runs tokens on top of a cached sequence and adds them to the cache.
    ///
    /// Without `parents` they continue the sequence. With parents they are nodes of a tree: `u32::MAX` hangs a node
    /// on the last cached token, any other number on that earlier node of this call; a node's position is the
    /// cached length plus its depth, and it sees the cached tokens, its ancestors and itself. A tree has to be
    /// settled, by [`KvCache::keep`] or [`KvCache::truncate`], before the next call.
    ///
    /// A call that fails leaves the cache as it was.
    pub fn extend(
        &self,
        cache: &mut KvCache,
        tokens: &[u32],
        parents: Option<&[u32]>,
        capture: &Capture,
    ) -> Result<Captured> {
        capture.check(self.layers.len())?;
        self.check_tokens(0, tokens)?;
        self.check_cache(cache)?;
        let n = tokens.len();
        let chain: Vec<u32> = (0..n as u32).map(|node| node.wrapping_sub(1)).collect();
        let parents = parents.unwrap_or(&chain);
        if parents.len() != n {
            return Err(Error::Cache(format!("{} parents for {n} tokens", parents.len())));
        }
        let (tree, first) = (Tree::new(parents)?, cache.len());
        let positions: Vec<u32> = (0..n).map(|node| (first + tree.depth(node)) as u32).collect();
        let len = positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.check_length(0, n, len)?;
        let tree = (!tree.is_chain()).then_some(tree);
        let sequence = [Sequence { positions, len }];
        cache.begin(parents.to_vec(), tree.is_some())?;
        let sight = Sight::Cached { cache: &mut *cache, first, tree: tree.as_ref() };
        // All layers run, whatever is captured: the cache needs their keys.
        let run = self.run(tokens, &sequence, sight, capture, self.layers.len());
        let (hidden_states, last_hidden) = run.inspect_err(|_| cache.truncate(first))?;
        Ok(Captured { hidden_states, last_hidden, bounds: bounds_of(&[tokens]) })
    }

    /// The first `depth` layers over packed tokens; the captured states and the last one.
    fn run(
        &self,
        tokens: &[u32],
        sequences: &[Sequence],
        sight: Sight<'_>,
        capture: &Capture,
        depth: usize,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (device, width) = (self.device, self.info.hidden_size);
        let tape = Tape::inference(&self.params);
        let local = self.local_rotary.as_ref().map(|tables| tables.of(sequences)).transpose()?;
        let rotary = (self.rotary.of(sequences)?, local);
        let mut pass = Pass::new(&self.own, &self.frame, &tape, rotary, sequences, sight);
        let mut states = Tensor::activations(device, &[tokens.len(), capture.layers.len() * width])?;
        // 1. Embeddings.
        let mut h = self.embed_on(&tape, tokens)?;
        // 2. Layers; the outputs asked for go side by side.
        for (i, layer) in self.layers[..depth].iter().enumerate() {
            pass.layer = i;
            h = layer.forward(&mut pass, &h)?;
            if let Ok(slot) = capture.layers.binary_search(&i) {
                device.kernels().add_columns(&mut states, slot * width..(slot + 1) * width, h.value())?;
            }
        }
        // 3. Final norm.
        let eps = self.info.rms_norm_eps as f32;
        let last = capture.last_hidden.then(|| tape.rms_norm(&h, self.norm, eps)).transpose()?;
        Ok((states, last.map(|last| last.value().clone())))
    }

    fn check_tokens(&self, document: usize, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.info.vocab_size;
        let outside = tokens.iter().position(|&token| token as usize >= vocab_size);
        outside.map_or(Ok(()), |at| Err(Error::Token { document, at, token: tokens[at], vocab_size }))
    }

    fn check_length(&self, document: usize, n: usize, len: usize) -> Result<()> {
        let max = self.info.max_position_embeddings;
        if n > 0 && len <= max { Ok(()) } else { Err(Error::Length { document, len, max }) }
    }

    /// Per layer, the widths of what is cached of a row.
    pub(crate) fn cached(&self) -> Vec<Vec<usize>> {
        let kv = self.own.n_kv_heads * self.own.head_dim;
        self.layers.iter().map(|layer| layer.cached(kv)).collect()
    }

    fn check_cache(&self, cache: &KvCache) -> Result<()> {
        if cache.fits(&self.cached(), self.device) {
            return Ok(());
        }
        Err(Error::Cache("it was made for another target".to_owned()))
    }
}

/// A target's embedding and head as [`Target::embedding`] and [`Target::head`] have them, on the host, in the type
/// `storage`: what a draft needs of it while it trains from a store.
pub fn tables(folder: impl AsRef<Path>, info: &TargetInfo, storage: DType) -> Result<[Tensor; 2]> {
    let (folder, mut params) = (folder.as_ref(), Params::new());
    let frame = (architecture::of(&info.path, &info.raw)?.frame)(info)?;
    let weights = Weights::open(folder)?;
    let (source, params_of) = (Source::Files(&weights), &mut params);
    let mut loader = Loader {
        folder,
        source,
        params: params_of,
        device: Device::Cpu,
        storage: Some(storage),
        fp8: false,
        quantization: Quantization::of(info)?,
        norm_offset: frame.norm_offset,
        prefix: frame.prefix.to_owned(),
        ranks: None,
    };
    let embedding = embedding_of(info, &frame, &mut loader)?;
    let head = head_of(info, &frame, embedding, &mut loader)?;
    Ok([embedding, head].map(|id| params.get(id).value.clone()))
}

fn embedding_of(info: &TargetInfo, frame: &Frame, loader: &mut Loader<'_>) -> Result<ParamId> {
    loader.at(frame.body).table("embed_tokens.weight", &[info.vocab_size, info.hidden_size])
}

/// The head. A factor on the logits goes into it, so that the teacher's logits, which training computes from the head,
/// have it too: exact for the powers of two that models use.
fn head_of(info: &TargetInfo, frame: &Frame, embedding: ParamId, loader: &mut Loader<'_>) -> Result<ParamId> {
    let table = [info.vocab_size, info.hidden_size];
    let head = if info.tie_word_embeddings { embedding } else { loader.table("lm_head.weight", &table)? };
    if frame.logit_scale == 1.0 {
        return Ok(head);
    }
    let (name, value) = (loader.params.get(head).name.clone(), &loader.params.get(head).value);
    let value = value.device().kernels().scale(value, frame.logit_scale)?.cast(value.dtype())?;
    Ok(loader.params.add(format!("{name} (scaled)"), value, false))
}

/// The rows of each document in their pack.
fn bounds_of(documents: &[&[u32]]) -> Vec<Range<usize>> {
    let ends = documents.iter().scan(0, |end, tokens| {
        *end += tokens.len();
        Some(*end)
    });
    ends.zip(documents).map(|(end, tokens)| end - tokens.len()..end).collect()
}
