//! The order of rows and columns that makes a checkpoint's matrices those of heads of one size.

use super::Config;
use crate::loader::ZEROS;

/// Which rows and columns of a checkpoint's matrices go where in heads of size D.
pub(super) struct Heads<'a> {
    pub n: usize,
    /// D.
    pub d: usize,
    pub config: &'a Config,
}

impl Heads<'_> {
    /// The elements that are rotated, those first that are rotated with the second half.
    pub(super) fn rotated(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let (p, interleaved) = (self.config.qk_rope_head_dim, self.config.rope_interleave);
        (0..p).map(move |j| if interleaved { 2 * j % p + 2 * j / p } else { j })
    }

    /// For every head what `parts` gives of its first row, filled up with zeros.
    fn all<I: Iterator<Item = usize>>(&self, width: usize, parts: impl Fn(usize) -> I) -> Vec<usize> {
        let head = |n: usize| parts(n * width).chain(std::iter::repeat(ZEROS)).take(self.d);
        (0..self.n).flat_map(head).collect()
    }

    pub(super) fn queries(&self) -> Vec<usize> {
        let (rest, p, rotated) = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim, self.rotated());
        self.all(rest + p, |first| rotated.clone().map(move |j| first + rest + j).chain(first..first + rest))
    }

    pub(super) fn keys(&self) -> Vec<usize> {
        let (rest, p) = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim);
        self.all(rest + self.config.v_head_dim, |first| {
            std::iter::repeat_n(ZEROS, p).chain(first..first + rest)
        })
    }

    pub(super) fn values(&self) -> Vec<usize> {
        let (rest, v) = (self.config.qk_nope_head_dim, self.config.v_head_dim);
        self.all(rest + v, |first| first + rest..first + rest + v)
    }

    pub(super) fn outputs(&self) -> Vec<usize> {
        let v = self.config.v_head_dim;
        self.all(v, |first| first..first + v)
    }

    pub(super) fn spread(&self) -> Vec<f32> {
        let p = self.config.qk_rope_head_dim;
        let row = |at: usize| (0..p).map(move |j| f32::from(u8::from(at == j)));
        (0..self.n * self.d).flat_map(|r| row(r % self.d)).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const Z: usize = ZEROS;

    #[test]
    fn heads_have_what_is_rotated_first_and_zeros_last() {
        let config =
            json!({ "kv_lora_rank": 3, "qk_nope_head_dim": 1, "qk_rope_head_dim": 4, "v_head_dim": 2 });
        let config: Config = serde_json::from_value(config).unwrap();
        let heads = Heads { n: 2, d: 6, config: &config };
        assert_eq!(heads.queries(), [1, 3, 2, 4, 0, Z, 6, 8, 7, 9, 5, Z]);
        assert_eq!(heads.keys(), [Z, Z, Z, Z, 0, Z, Z, Z, Z, Z, 3, Z]);
        assert_eq!(heads.values(), [1, 2, Z, Z, Z, Z, 4, 5, Z, Z, Z, Z]);
        assert_eq!(heads.outputs(), [0, 1, Z, Z, Z, Z, 2, 3, Z, Z, Z, Z]);
        assert_eq!(heads.spread()[..12], [1., 0., 0., 0., 0., 1., 0., 0., 0., 0., 1., 0.]);
    }
}
