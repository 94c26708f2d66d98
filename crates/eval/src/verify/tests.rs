use std::collections::BTreeMap;

use specforge_methods::{Drafter, Result as MethodResult, VocabMap};
use specforge_nn::init::stream;
use specforge_tensor::Tensor;
use specforge_testkit::Lcg;

use super::*;
use crate::propose::{Choice, Node, propose};
use crate::{Sampling, Speculation};

/// Tokens of the toy vocabulary.
const V: usize = 5;
/// Tokens looked at per answer: `V^N` cells.
const N: usize = 3;
const DRAWS: usize = 50_000;

/// A distribution that depends on the path, with a weight of zero for the tokens of `without`.
fn toy(path: &[u32], salt: u64, without: &[usize]) -> Vec<f64> {
    let seed = path.iter().fold(salt, |s, &t| s.wrapping_mul(31).wrapping_add(u64::from(t) + 1));
    let mut lcg = Lcg::new(seed);
    let mut p: Vec<f64> = (0..V).map(|_| (1.5 * f64::from(lcg.normal())).exp()).collect();
    without.iter().for_each(|&t| p[t] = 0.0);
    normalise(&mut p);
    p
}

/// A toy draft over `vocab`: its own distribution, restricted to its tokens.
#[derive(Debug)]
struct ToyDraft<'a> {
    vocab: &'a VocabMap,
    salt: u64,
    paths: Vec<Vec<u32>>,
}

impl ToyDraft<'_> {
    fn logits(&self, path: &[u32]) -> Vec<f32> {
        let p = toy(path, self.salt, &[]);
        self.vocab.target_ids().iter().map(|&t| p[t as usize].ln() as f32).collect()
    }
}

impl Drafter for ToyDraft<'_> {
    fn commit(&mut self, _: &Tensor, _: &[u32]) -> MethodResult<Vec<f32>> {
        Ok(self.logits(&[]))
    }

    fn expand(&mut self, nodes: &[(u32, Option<usize>)]) -> MethodResult<Vec<Vec<f32>>> {
        let path = |&(token, parent): &(u32, Option<usize>)| {
            let before = parent.map_or(&[][..], |p| &self.paths[p]);
            [before, &[token]].concat()
        };
        let paths: Vec<_> = nodes.iter().map(path).collect();
        let logits = paths.iter().map(|p| self.logits(p)).collect();
        self.paths.extend(paths);
        Ok(logits)
    }
}

/// A setting of the distribution test.
struct Case {
    speculation: Speculation,
    vocab: VocabMap,
    /// Tokens the target rules out.
    without: &'static [usize],
    temperature: f64,
    /// Propose the likeliest tokens instead of drawn ones, which breaks exactness.
    cheat: bool,
}

impl Case {
    fn new(steps: usize, topk: usize, n_nodes: usize) -> Self {
        let speculation = Speculation { steps, topk, n_nodes };
        speculation.check().expect("a valid shape");
        Self { speculation, vocab: VocabMap::full(V), without: &[], temperature: 1.0, cheat: false }
    }

    fn target(&self, path: &[u32]) -> Vec<f64> {
        toy(path, 1, self.without)
    }

    /// One round, then plain draws until there are `N` tokens; and how many proposals were accepted.
    fn answer(&self, rng: &mut ChaCha8Rng) -> (Vec<u32>, usize) {
        let mut drafter = ToyDraft { vocab: &self.vocab, salt: 2, paths: Vec::new() };
        let root = drafter.logits(&[]);
        let sampling = Sampling { temperature: self.temperature, ..Sampling::default() };
        let mut choice = Choice { sampling, rng };
        let mut proposal =
            propose(&mut drafter, root, &self.vocab, &self.speculation, &mut choice).expect("a proposal");
        if self.cheat {
            let greedy = Choice { sampling: Sampling::default(), rng: choice.rng };
            proposal = self.cheated(greedy);
        }
        let paths = paths(&proposal);
        let target = |row: usize| Ok(self.target(&paths[row]));
        let verified = verify_sampled(&proposal, self.vocab.target_ids(), &target, rng).expect("verified");
        let accepted = verified.accepted.len();
        let mut tokens = verified.accepted.last().map_or(Vec::new(), |&n| paths[n + 1].clone());
        assert_eq!(tokens.len(), accepted, "accepted nodes form one path");
        tokens.push(verified.bonus);
        while tokens.len() < N {
            let p = self.target(&tokens);
            tokens.push(draw(&p, rng).expect("a token") as u32);
        }
        tokens.truncate(N);
        (tokens, accepted)
    }

    /// The likeliest tokens, passed off as drawn from the draft's distribution.
    fn cheated(&self, mut choice: Choice<'_>) -> Proposal {
        let mut drafter = ToyDraft { vocab: &self.vocab, salt: 2, paths: Vec::new() };
        let root = drafter.logits(&[]);
        let mut proposal =
            propose(&mut drafter, root, &self.vocab, &self.speculation, &mut choice).expect("a proposal");
        let paths = paths(&proposal);
        for node in &proposal.nodes {
            let path = &paths[node.parent.map_or(0, |p| p + 1)];
            proposal.distributions.insert(node.parent, toy(path, 2, &[]));
        }
        proposal
    }

    /// Chi-square statistic of `DRAWS` answers against the target's own distribution, less its expectation in
    /// standard deviations, and the mean number of accepted proposals.
    fn deviation(&self) -> (f64, f64) {
        let mut rng = stream(7, "distribution");
        let mut counts: BTreeMap<Vec<u32>, f64> = BTreeMap::new();
        let mut accepted = 0;
        for _ in 0..DRAWS {
            let (tokens, n) = self.answer(&mut rng);
            *counts.entry(tokens).or_default() += 1.0;
            accepted += n;
        }
        let (mut statistic, mut cells, mut rest) = (0.0, 0.0f64, (0.0, 0.0));
        for cell in 0..V.pow(N as u32) {
            let tokens: Vec<u32> = (0..N).map(|i| (cell / V.pow(i as u32) % V) as u32).collect();
            let probability: f64 = (0..N).map(|i| self.target(&tokens[..i])[tokens[i] as usize]).product();
            let (count, expected) = (counts.get(&tokens).copied().unwrap_or(0.0), DRAWS as f64 * probability);
            assert!(expected > 0.0 || count == 0.0, "{tokens:?} has probability 0 and came {count} times");
            // Cells that are too rare for the approximation are counted as one.
            if expected < 10.0 {
                rest = (rest.0 + count, rest.1 + expected);
            } else {
                (statistic, cells) = (statistic + (count - expected).powi(2) / expected, cells + 1.0);
            }
        }
        if rest.1 >= 10.0 {
            (statistic, cells) = (statistic + (rest.0 - rest.1).powi(2) / rest.1, cells + 1.0);
        }
        let freedom = cells - 1.0;
        ((statistic - freedom) / (2.0 * freedom).sqrt(), accepted as f64 / DRAWS as f64)
    }
}

/// The tokens of the path to the root and to each node.
fn paths(proposal: &Proposal) -> Vec<Vec<u32>> {
    let mut paths = vec![Vec::new()];
    for node in &proposal.nodes {
        let path = [&paths[node.parent.map_or(0, |p| p + 1)][..], &[node.token]].concat();
        paths.push(path);
    }
    paths
}

fn check(case: &Case) {
    let (deviation, accepted) = case.deviation();
    assert!(deviation.abs() < 4.0, "{deviation} standard deviations from the target's distribution");
    assert!(accepted > 0.2, "the test needs accepted proposals, got {accepted} per round");
}

#[test]
fn a_sampled_chain_follows_the_targets_distribution() {
    check(&Case::new(1, 1, 2));
    check(&Case::new(4, 1, 5));
    check(&Case { temperature: 0.5, ..Case::new(3, 1, 4) });
}

#[test]
fn a_sampled_tree_follows_the_targets_distribution() {
    check(&Case::new(1, 3, 4));
    check(&Case::new(2, 2, 7));
    check(&Case::new(3, 2, 6));
    check(&Case::new(3, 3, 9));
    check(&Case { temperature: 2.0, ..Case::new(4, 4, 16) });
    // All tokens are proposed: the last sibling is always accepted or ruled out.
    check(&Case::new(2, V, 1 + V));
}

#[test]
fn a_smaller_draft_vocabulary_changes_nothing() {
    let vocab = || VocabMap::from_offsets(&[1, 1, 2], V).expect("offsets");
    check(&Case { vocab: vocab(), ..Case::new(3, 1, 4) });
    check(&Case { vocab: vocab(), ..Case::new(3, 2, 7) });
    check(&Case { vocab: vocab(), ..Case::new(2, 3, 10) });
}

#[test]
fn tokens_that_the_target_rules_out_never_come() {
    check(&Case { without: &[0, 3], ..Case::new(3, 1, 4) });
    check(&Case { without: &[1], ..Case::new(3, 2, 8) });
    check(&Case {
        without: &[4],
        vocab: VocabMap::from_offsets(&[0, 2, 2], V).expect("offsets"),
        ..Case::new(2, 2, 6)
    });
}

/// Shows that the distribution test sees a wrong proposal: it must be able to fail.
#[test]
fn undrawn_proposals_are_seen_in_the_distribution() {
    for case in [Case::new(3, 1, 4), Case::new(2, 2, 6)] {
        let (deviation, _) = Case { cheat: true, ..case }.deviation();
        assert!(deviation > 20.0, "{deviation}");
    }
}

#[test]
fn the_same_distribution_accepts_everything() {
    let p = toy(&[], 2, &[]);
    let mut rng = stream(1, "same");
    for _ in 0..1000 {
        let token = draw(&p, &mut rng).expect("a token") as u32;
        let distributions = BTreeMap::from([(None, p.clone())]);
        let proposal = Proposal { nodes: vec![Node { token, parent: None }], distributions };
        let ids: Vec<u32> = (0..V as u32).collect();
        let verified = verify_sampled(&proposal, &ids, &|_| Ok(p.clone()), &mut rng).expect("verified");
        assert_eq!(verified.accepted, [0]);
    }
}

#[test]
fn greedy_takes_the_longest_path_of_the_targets_choices() {
    let node = |token, parent| Node { token, parent };
    //  0: 7     1: 8     2: 7-9    3: 8-9    4: 8-6    5: 8-6-5
    let nodes = vec![
        node(7, None),
        node(8, None),
        node(9, Some(0)),
        node(9, Some(1)),
        node(6, Some(1)),
        node(5, Some(4)),
    ];
    let proposal = Proposal { nodes, distributions: BTreeMap::new() };
    let check = |target: [u32; 7], accepted: &[usize], bonus: u32| {
        let want = Verified { accepted: accepted.to_vec(), bonus };
        assert_eq!(verify_greedy(&proposal, &target), want, "{target:?}");
    };
    check([1, 9, 9, 1, 1, 1, 1], &[], 1);
    check([7, 1, 9, 1, 1, 1, 1], &[0], 1);
    check([7, 9, 9, 3, 1, 1, 1], &[0, 2], 3);
    check([8, 9, 6, 1, 1, 5, 4], &[1, 4, 5], 4);
    check([8, 9, 6, 1, 1, 2, 4], &[1, 4], 2);
    assert_eq!(verify_greedy(&Proposal::default(), &[3]), Verified { accepted: vec![], bonus: 3 });
}
