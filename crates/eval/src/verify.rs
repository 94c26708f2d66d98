//! Which proposed tokens are accepted, as pure functions over the target's answers, so that their exactness can be
//! tested without a model.
//!
//! Greedy: the longest path that the target would have taken itself. Sampled: rejection sampling (Leviathan et al.,
//! 2023, arXiv 2211.17192; Chen et al., 2023, arXiv 2302.01318), over several siblings one after the other (SpecInfer,
//! Miao et al., 2023, arXiv 2305.09781); what comes out is distributed exactly as the target's own tokens.

use rand_chacha::ChaCha8Rng;

use crate::Result;
use crate::distribution::{draw, normalise, uniform};
use crate::propose::Proposal;

/// The outcome of one round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The accepted nodes from the root down.
    pub accepted: Vec<usize>,
    /// The token that the target itself puts after them.
    pub bonus: u32,
}

/// Accepts while a child is the target's own choice. `target_tokens` holds that choice after the root and then after
/// each node, `[1 + nodes]`.
pub fn verify_greedy(proposal: &Proposal, target_tokens: &[u32]) -> Verified {
    let (mut accepted, mut at) = (Vec::new(), None);
    loop {
        let bonus = target_tokens[row(at)];
        let Some(next) = proposal.children(at).find(|&c| proposal.nodes[c].token == bonus) else {
            return Verified { accepted, bonus };
        };
        accepted.push(next);
        at = Some(next);
    }
}

/// Accepts by rejection sampling. `target_ids` maps the draft's ids to the target's; `target` gives the target's
/// probabilities `[V]` in row r: after the root for 0, after node r - 1 otherwise. Only rows on the path are asked for.
///
/// At each node, children `c` were drawn one after the other without replacement from the draft's `q`. `c` is accepted
/// with probability `min(1, p(c) / q(c))`; otherwise `p` becomes what is left, `max(p - q, 0)` normalised, and `q` loses
/// `c`. When no child is accepted the bonus is drawn from the last `p`.
pub fn verify_sampled(
    proposal: &Proposal,
    target_ids: &[u32],
    target: &dyn Fn(usize) -> Result<Vec<f64>>,
    rng: &mut ChaCha8Rng,
) -> Result<Verified> {
    let (mut accepted, mut at) = (Vec::new(), None);
    loop {
        let mut p = target(row(at))?;
        let Some(next) = try_children(proposal, at, target_ids, &mut p, rng) else {
            let bonus = draw(&p, rng).expect("probabilities do not sum to zero") as u32;
            return Ok(Verified { accepted, bonus });
        };
        accepted.push(next);
        at = Some(next);
    }
}

/// The first child that is accepted; leaves in `p` the distribution to draw from if there is none.
fn try_children(
    proposal: &Proposal,
    at: Option<usize>,
    target_ids: &[u32],
    p: &mut [f64],
    rng: &mut ChaCha8Rng,
) -> Option<usize> {
    let mut q = vec![0.0; p.len()];
    for (&id, &weight) in target_ids.iter().zip(proposal.distributions.get(&at)?) {
        q[id as usize] = weight;
    }
    for child in proposal.children(at) {
        let token = proposal.nodes[child].token as usize;
        if uniform(rng) * q[token] < p[token] {
            return Some(child);
        }
        leave_residual(p, &q);
        q[token] = 0.0;
        normalise(&mut q);
    }
    None
}

/// `p` becomes `max(p - q, 0)` normalised. Where nothing is left the two are equal, rejection had probability zero
/// and happened by rounding alone: `p` stays.
fn leave_residual(p: &mut [f64], q: &[f64]) {
    if p.iter().zip(q).any(|(p, q)| p > q) {
        p.iter_mut().zip(q).for_each(|(p, q)| *p = (*p - q).max(0.0));
        normalise(p);
    }
}

/// The target's row for what follows a node: the root is the first.
fn row(node: Option<usize>) -> usize {
    node.map_or(0, |n| n + 1)
}

#[cfg(test)]
mod tests;
