//! How much arithmetic a step is: ours, and SpecForge's for the same batch. Matrix products and attention apart,
//! nothing else counts.
//!
//! A product of `r` rows with a weight `[n, k]` is `2 r n k` operations; a trained layer does it three times: forward,
//! gradient of its input, gradient of its weight. One key of one query is `4 · heads · head_dim` forward (scores and
//! values) and by convention 2.5 times that backward, however often a kernel recomputes the scores.

use std::ops::Range;

use serde::Serialize;
use specforge_methods::eagle3::Dims;
use specforge_models::TargetInfo;
use specforge_train::features::teacher_is_read;

/// Forward, input gradient, weight gradient.
const TRAINED: f64 = 3.0;
/// Attention forward and backward, in forwards.
const ATTENTION: f64 = 3.5;
/// Captured layers that `fc` reads.
const CAPTURED: f64 = 3.0;

/// Rows of a batch, by what is computed for them.
#[derive(Debug, Clone, Default, Serialize)]
pub(in crate::commands) struct Rows {
    /// T, all tokens.
    pub(in crate::commands) tokens: usize,
    /// L, rows that some loss depends on: those computed after step 0.
    pub(in crate::commands) live: usize,
    /// R, rows with loss, over all steps.
    pub(in crate::commands) loss: usize,
    /// U, teacher rows that some loss reads.
    pub(in crate::commands) teacher: usize,
    /// Rows whose whole-vocabulary statistics the target computes online.
    pub(in crate::commands) stats: usize,
    /// Step-0 keys that live rows see, summed over them.
    live_keys: f64,
    /// The same of all rows.
    all_keys: f64,
}

/// Operations of one step.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::commands) struct Work {
    pub(in crate::commands) products: f64,
    pub(in crate::commands) attention: f64,
}

/// Widths of the target, which the draft has too.
pub(in crate::commands) struct Sizes {
    /// H.
    pub(in crate::commands) h: f64,
    /// All query heads, and all key heads.
    pub(in crate::commands) q: f64,
    pub(in crate::commands) kv: f64,
    /// The MLP.
    pub(in crate::commands) i: f64,
    /// V and Vd.
    pub(in crate::commands) vocab: f64,
    pub(in crate::commands) draft_vocab: f64,
    /// Layers of the target if it runs in the step, 0 if not.
    pub(in crate::commands) layers: f64,
    /// Test-time-training steps.
    pub(in crate::commands) steps: usize,
}

impl Rows {
    /// Row p carries loss at step i if token p+1+i is in its document and supervised, as the method's plan has it.
    pub(in crate::commands) fn of(bounds: &[Range<usize>], loss_mask: &[u8], steps: usize) -> Self {
        let mut rows = Self::default();
        bounds.iter().for_each(|bounds| rows.add_document(&loss_mask[bounds.clone()], steps));
        rows
    }

    /// One more document with this mask.
    pub(in crate::commands) fn add_document(&mut self, mask: &[u8], steps: usize) {
        // Rows before this one are known to be live or not.
        let mut next = 0;
        for t in (1..mask.len()).filter(|&t| mask[t] == 1) {
            let first = t.saturating_sub(steps);
            self.loss += t - first;
            self.teacher += 1;
            for row in first.max(next)..t {
                self.live += 1;
                self.live_keys += (row + 1) as f64;
            }
            next = t;
        }
        self.tokens += mask.len();
        self.all_keys += (mask.len() * (mask.len() + 1) / 2) as f64;
        self.stats += (0..mask.len()).filter(|&t| teacher_is_read(mask, t)).count();
    }

    /// The same kind of rows, this share as many.
    pub(in crate::commands) fn shrink(&mut self, share: f64) {
        for n in [&mut self.tokens, &mut self.live, &mut self.loss, &mut self.teacher, &mut self.stats] {
            *n = (*n as f64 * share).ceil() as usize;
        }
        self.live_keys *= share;
        self.all_keys *= share;
    }

    /// Adds up batches.
    pub(in crate::commands) fn add(&mut self, more: &Self) {
        let sums = [
            (&mut self.tokens, more.tokens),
            (&mut self.live, more.live),
            (&mut self.loss, more.loss),
            (&mut self.teacher, more.teacher),
            (&mut self.stats, more.stats),
        ];
        sums.into_iter().for_each(|(sum, n)| *sum += n);
        self.live_keys += more.live_keys;
        self.all_keys += more.all_keys;
    }
}

impl Sizes {
    pub(in crate::commands) fn of(
        info: &TargetInfo,
        draft_vocab: usize,
        steps: usize,
        with_target: bool,
    ) -> Self {
        Self {
            h: info.hidden_size as f64,
            q: (info.n_heads * info.head_dim) as f64,
            kv: (info.n_kv_heads * info.head_dim) as f64,
            i: info.intermediate_size as f64,
            vocab: info.vocab_size as f64,
            draft_vocab: draft_vocab as f64,
            layers: if with_target { info.n_layers as f64 } else { 0.0 },
            steps,
        }
    }

    /// A draft's own, which may differ from its target's; without the target.
    pub(in crate::commands) fn of_draft(dims: &Dims, steps: usize) -> Self {
        Self {
            h: dims.hidden_size as f64,
            q: (dims.num_attention_heads * dims.head_dim) as f64,
            kv: (dims.num_key_value_heads * dims.head_dim) as f64,
            i: dims.intermediate_size as f64,
            vocab: dims.vocab_size as f64,
            draft_vocab: dims.draft_vocab_size as f64,
            layers: 0.0,
            steps,
        }
    }

    /// Forward of o_proj and the MLP, per row.
    fn finish(&self) -> f64 {
        2.0 * (self.q * self.h + 3.0 * self.h * self.i)
    }

    /// Keys seen at all steps by rows that see `keys` step-0 keys, and i keys of their own at step i.
    fn keys_seen(&self, keys: f64, rows: usize) -> f64 {
        let own = (self.steps * self.steps.saturating_sub(1) / 2) as f64;
        self.steps as f64 * keys + own * rows as f64
    }

    /// The target's layers, forward: products, then attention.
    fn target(&self, rows: &Rows) -> [f64; 2] {
        let layer = 2.0 * self.h * (self.q + 2.0 * self.kv) + self.finish();
        [self.layers * rows.tokens as f64 * layer, self.layers * 4.0 * self.q * rows.all_keys]
    }
}

/// What the target does where it runs in the step: its layers, and its whole head where a loss may read it.
pub(in crate::commands) fn target(s: &Sizes, rows: &Rows) -> Work {
    let [layers, attention] = s.target(rows);
    let stats = if s.layers > 0.0 { 2.0 * rows.stats as f64 * s.h * s.vocab } else { 0.0 };
    Work { products: layers + stats, attention }
}

/// What we do.
pub(in crate::commands) fn ours(s: &Sizes, rows: &Rows) -> Work {
    let [t, l, r, u] = [rows.tokens, rows.live, rows.loss, rows.teacher].map(|n| n as f64);
    let (qkv, kv, later) = (s.q + 2.0 * s.kv, 2.0 * s.kv, s.steps as f64 - 1.0);
    // fc of all rows; nobody asks for the gradient of captured states.
    let fc = (TRAINED - 1.0) * 2.0 * t * s.h * CAPTURED * s.h;
    // The embedding half of q, k and v, and the step-0 keys and values, of all rows, once.
    let shared = TRAINED * 2.0 * t * s.h * (qkv + kv);
    // Live rows: queries at step 0, queries, keys and values later; the rest of the layer at every step.
    let projections = TRAINED * 2.0 * l * s.h * (s.q + later * qkv);
    let finish = TRAINED * l * s.finish() * s.steps as f64;
    // The head of rows with loss; the teacher over the draft vocabulary, each row once.
    let head = TRAINED * 2.0 * r * s.h * s.draft_vocab + 2.0 * u * s.h * s.draft_vocab;
    let target = target(s, rows);
    let attention = ATTENTION * 4.0 * s.q * s.keys_seen(rows.live_keys, rows.live) + target.attention;
    Work { products: fc + shared + projections + finish + head + target.products, attention }
}

/// What SpecForge does: every step computes all rows, q, k and v read the embedding again, the draft's head runs at
/// every step, and the target's whole head once for every token.
pub(in crate::commands) fn specforge(s: &Sizes, rows: &Rows) -> Work {
    let t = rows.tokens as f64;
    let fc = (TRAINED - 1.0) * 2.0 * s.h * CAPTURED * s.h;
    let qkv = 2.0 * (s.q + 2.0 * s.kv) * 2.0 * s.h;
    let step = TRAINED * (qkv + s.finish() + 2.0 * s.h * s.draft_vocab);
    let [layers, seen] = s.target(rows);
    let products = t * (fc + s.steps as f64 * step + 2.0 * s.h * s.vocab) + layers;
    let attention = ATTENTION * 4.0 * s.q * s.keys_seen(rows.all_keys, rows.tokens) + seen;
    Work { products, attention }
}

#[cfg(test)]
mod tests {
    use super::super::data::Data;
    use super::super::preset::{Preset, Tokens};
    use super::{Rows, Sizes, ours, specforge};

    #[test]
    fn the_arithmetic_of_llama3_8b() {
        let info = Preset::Llama3_8b.info().unwrap();
        let data = Data::draw(Tokens { documents: 1, each: 2048 }, (1.0, 0), info.vocab_size);
        let (rows, sizes) = (Rows::of(&data.bounds, &data.loss_mask, 7), Sizes::of(&info, 32_000, 7, false));
        assert_eq!((rows.live, rows.teacher, rows.loss), (2047, 2047, 7 * 2047 - 21));
        // 16.97 GFLOP per token, as worked out by hand from SpecForge's code.
        assert_eq!((specforge(&sizes, &rows).products / 2048.0 / 1e7).round(), 1697.0);
        assert!(ours(&sizes, &rows).products < specforge(&sizes, &rows).products);
    }
}
