//! What to measure: how the draft proposes, how tokens are chosen, and how long.

use crate::{Error, Result};

/// Settings of [`crate::evaluate`].
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// How the draft proposes.
    pub speculation: Speculation,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens after which an answer is cut.
    pub max_new_tokens: usize,
    /// Also decode every prompt without the draft: the baseline of the speed figures and, when greedy, the proof
    /// that nothing is lost.
    pub plain: bool,
    /// Decode prompts side by side: a quick measure of acceptance, without speed figures. The tokens are the same.
    pub parallel: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            speculation: Speculation::default(),
            sampling: Sampling::default(),
            max_new_tokens: 128,
            plain: true,
            parallel: false,
        }
    }
}

/// How the draft proposes: SGLang's three flags under short names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// `--speculative-num-steps`: the depth of the proposals, which costs the draft one forward pass per level.
    pub steps: usize,
    /// `--speculative-eagle-topk`: nodes expanded per level and children of each. 1 is a chain.
    pub topk: usize,
    /// `--speculative-num-draft-tokens`: tokens the target checks in one pass. As in SGLang this counts the root,
    /// which is the last token already chosen and no proposal: `n_nodes - 1` tokens are proposed.
    pub n_nodes: usize,
}

impl Default for Speculation {
    /// A chain of five tokens.
    fn default() -> Self {
        Self::chain(5)
    }
}

impl Speculation {
    /// A chain of `steps` proposed tokens: `topk` 1 and `n_nodes` one more than `steps`.
    pub fn chain(steps: usize) -> Self {
        Self { steps, topk: 1, n_nodes: steps + 1 }
    }

    /// Whether proposals never branch.
    pub fn is_chain(&self) -> bool {
        self.topk == 1
    }

    /// Refuses settings that SGLang would refuse or silently change.
    pub fn check(&self) -> Result<()> {
        let error =
            |key, got: usize, reason: String| Err(Error::Options { key, got: got.to_string(), reason });
        if !(1..=32).contains(&self.steps) {
            return error("steps", self.steps, "expected 1 to 32".to_owned());
        }
        if !(1..=64).contains(&self.topk) {
            return error("topk", self.topk, "expected 1 to 64".to_owned());
        }
        if self.is_chain() && self.n_nodes != self.steps + 1 {
            let reason =
                format!("a chain (topk = 1) has steps + 1 = {} nodes, the root included", self.steps + 1);
            return error("n_nodes", self.n_nodes, reason);
        }
        let most = 1 + self.topk + (self.steps - 1) * self.topk * self.topk;
        if !(2..=most).contains(&self.n_nodes) {
            let reason = format!(
                "expected 2 to {most}: the root, and at most topk + (steps - 1) * topk * topk proposed tokens"
            );
            return error("n_nodes", self.n_nodes, reason);
        }
        Ok(())
    }
}

/// How tokens are chosen from the target's logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this before the softmax; 0 is greedy: always the most probable token.
    pub temperature: f64,
    /// Only the most probable tokens that together reach this probability are kept (the target's distribution
    /// alone; the draft proposes from all of its own). 1 keeps all.
    pub top_p: f64,
    /// Seed of every random choice. Each prompt draws from a stream of its own.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The temperature of the draft's softmax: as in SGLang, that of the request, and 1 when greedy.
    pub(crate) fn draft_temperature(&self) -> f64 {
        if self.is_greedy() { 1.0 } else { self.temperature }
    }

    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let reason = "expected 0 (greedy) or above".to_owned();
            return Err(Error::Options { key: "temperature", got: self.temperature.to_string(), reason });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let reason = "expected above 0 and at most 1".to_owned();
            return Err(Error::Options { key: "top_p", got: self.top_p.to_string(), reason });
        }
        Ok(())
    }
}

impl Options {
    /// Refuses settings that cannot be.
    pub fn check(&self) -> Result<()> {
        self.speculation.check()?;
        self.sampling.check()?;
        if self.max_new_tokens == 0 {
            let reason = "expected at least 1".to_owned();
            return Err(Error::Options { key: "max_new_tokens", got: "0".to_owned(), reason });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: &Options, key: &str) {
        let error = options.check().expect_err("must be refused").to_string();
        assert!(
            error.starts_with(key) && error.contains("expected") | error.contains("has steps + 1"),
            "{error}"
        );
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let speculation = |steps, topk, n_nodes| Options {
            speculation: Speculation { steps, topk, n_nodes },
            ..Options::default()
        };
        check(&speculation(0, 1, 1), "steps = 0");
        check(&speculation(5, 0, 6), "topk = 0");
        check(&speculation(5, 1, 8), "n_nodes = 8: a chain (topk = 1) has steps + 1 = 6 nodes");
        check(&speculation(2, 2, 8), "n_nodes = 8: expected 2 to 7");
        check(&speculation(2, 2, 1), "n_nodes = 1");
        let sampling = |temperature, top_p| Options {
            sampling: Sampling { temperature, top_p, seed: 0 },
            ..Options::default()
        };
        check(&sampling(-1.0, 1.0), "temperature = -1");
        check(&sampling(f64::NAN, 1.0), "temperature = NaN");
        check(&sampling(1.0, 0.0), "top_p = 0");
        check(&Options { max_new_tokens: 0, ..Options::default() }, "max_new_tokens = 0");
        assert!(Options::default().check().is_ok());
        assert!(speculation(5, 8, 60).check().is_ok());
    }
}
