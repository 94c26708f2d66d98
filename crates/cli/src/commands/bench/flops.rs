//! How much arithmetic a step is: ours, and SpecForge's for the same batch. Matrix products and attention apart,
//! nothing else counts.
//!
//! A product of `r` rows with a weight `[n, k]` is `2 r n k` operations; a trained layer does it three times: forward,
//! gradient of its input, gradient of its weight. One key of one query is `4 · heads · head_dim` forward (scores and
//! values) and by convention 2.5 times that backward, however often a kernel recomputes the scores.

use std::collections::BTreeSet;

use serde::Serialize;
use specforge_models::TargetInfo;
use specforge_train::features::teacher_is_read;

use super::data::Data;

/// Forward, input gradient, weight gradient.
const TRAINED: f64 = 3.0;
/// Attention forward and backward, in forwards.
const ATTENTION: f64 = 3.5;
/// Captured layers that `fc` reads.
const CAPTURED: f64 = 3.0;

/// Rows of a batch, by what is computed for them.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Rows {
    /// T, all tokens.
    pub(super) tokens: usize,
    /// L, rows that some loss depends on: those computed after step 0.
    pub(super) live: usize,
    /// R, rows with loss, over all steps.
    pub(super) loss: usize,
    /// U, teacher rows that some loss reads.
    pub(super) teacher: usize,
    /// Rows whose whole-vocabulary statistics the target computes online.
    pub(super) stats: usize,
    /// Step-0 keys that live rows see, summed over them.
    live_keys: f64,
    /// The same of all rows.
    all_keys: f64,
}

/// Operations of one step.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Work {
    pub(super) products: f64,
    pub(super) attention: f64,
}

/// Widths of the target, which the draft has too.
pub(super) struct Sizes {
    /// H.
    pub(super) h: f64,
    /// All query heads, and all key heads.
    pub(super) q: f64,
    pub(super) kv: f64,
    /// The MLP.
    pub(super) i: f64,
    /// V and Vd.
    pub(super) vocab: f64,
    pub(super) draft_vocab: f64,
    /// Layers of the target if it runs in the step, 0 if not.
    pub(super) layers: f64,
    /// Test-time-training steps.
    pub(super) steps: usize,
}

impl Rows {
    /// Row p carries loss at step i if token p+1+i is in its document and supervised, as the method's plan has it.
    pub(super) fn of(data: &Data, steps: usize) -> Self {
        let (mut rows, mut live) = (Self { tokens: data.n_tokens(), ..Self::default() }, BTreeSet::new());
        for bounds in &data.bounds {
            for t in (bounds.start + 1..bounds.end).filter(|&t| data.loss_mask[t] == 1) {
                let earlier = steps.min(t - bounds.start);
                live.extend((t - earlier..t).map(|p| (p, p - bounds.start + 1)));
                rows.loss += earlier;
                rows.teacher += 1;
            }
            rows.all_keys += (bounds.len() * (bounds.len() + 1) / 2) as f64;
            let mask = &data.loss_mask[bounds.clone()];
            rows.stats += (0..mask.len()).filter(|&t| teacher_is_read(mask, t)).count();
        }
        rows.live = live.len();
        rows.live_keys = live.iter().map(|(_, keys)| *keys as f64).sum();
        rows
    }
}

impl Sizes {
    pub(super) fn of(info: &TargetInfo, draft_vocab: usize, steps: usize, with_target: bool) -> Self {
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

/// What we do.
pub(super) fn ours(s: &Sizes, rows: &Rows) -> Work {
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
    // Online: the target, and its whole head where a loss may read it.
    let [layers, seen] = s.target(rows);
    let stats = if s.layers > 0.0 { 2.0 * rows.stats as f64 * s.h * s.vocab } else { 0.0 };
    let attention = ATTENTION * 4.0 * s.q * s.keys_seen(rows.live_keys, rows.live) + seen;
    Work { products: fc + shared + projections + finish + head + layers + stats, attention }
}

/// What SpecForge does: every step computes all rows, q, k and v read the embedding again, the draft's head runs at
/// every step, and the target's whole head once for every token.
pub(super) fn specforge(s: &Sizes, rows: &Rows) -> Work {
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
    use super::super::preset::{Preset, Tokens};
    use super::{Data, Rows, Sizes, ours, specforge};

    #[test]
    fn the_arithmetic_of_llama3_8b() {
        let info = Preset::Llama3_8b.info().unwrap();
        let data = Data::draw(Tokens { documents: 1, each: 2048 }, 1.0, info.vocab_size);
        let (rows, sizes) = (Rows::of(&data, 7), Sizes::of(&info, 32_000, 7, false));
        assert_eq!((rows.live, rows.teacher, rows.loss), (2047, 2047, 7 * 2047 - 21));
        // 16.97 GFLOP per token, as worked out by hand from SpecForge's code.
        assert_eq!((specforge(&sizes, &rows).products / 2048.0 / 1e7).round(), 1697.0);
        assert!(ours(&sizes, &rows).products < specforge(&sizes, &rows).products);
    }
}
