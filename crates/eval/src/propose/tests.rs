use specforge_methods::Result as MethodResult;
use specforge_nn::init::stream;
use specforge_tensor::Tensor;

use super::*;

/// A draft whose probabilities depend on the depth alone, and which remembers what it was asked.
#[derive(Debug)]
struct ByDepth {
    probabilities: Vec<Vec<f32>>,
    depths: Vec<usize>,
    calls: Vec<Vec<(u32, Option<usize>)>>,
}

impl ByDepth {
    fn logits(&self, depth: usize) -> Vec<f32> {
        self.probabilities[depth.min(self.probabilities.len() - 1)].iter().map(|p| p.ln()).collect()
    }
}

impl Drafter for ByDepth {
    fn commit(&mut self, _: &Tensor, _: &[u32]) -> MethodResult<Vec<f32>> {
        Ok(self.logits(0))
    }

    fn expand(&mut self, nodes: &[(u32, Option<usize>)]) -> MethodResult<Vec<Vec<f32>>> {
        self.calls.push(nodes.to_vec());
        self.depths.extend(
            nodes.iter().map(|(_, parent)| 1 + parent.map_or(0, |p| self.depths[p])).collect::<Vec<_>>(),
        );
        let first = self.depths.len() - nodes.len();
        Ok(self.depths[first..].iter().map(|&depth| self.logits(depth)).collect())
    }
}

fn by_depth(probabilities: &[&[f32]]) -> ByDepth {
    let probabilities = probabilities.iter().map(|p| p.to_vec()).collect();
    ByDepth { probabilities, depths: Vec::new(), calls: Vec::new() }
}

fn run(drafter: &mut ByDepth, vocab: &VocabMap, shape: (usize, usize, usize), temperature: f64) -> Proposal {
    let (steps, topk, n_nodes) = shape;
    let speculation = Speculation { steps, topk, n_nodes };
    speculation.check().expect("a valid shape");
    let mut rng = stream(3, "propose");
    let mut choice = Choice { sampling: Sampling { temperature, ..Sampling::default() }, rng: &mut rng };
    let root = drafter.logits(0);
    propose(drafter, root, vocab, &speculation, &mut choice).expect("a proposal")
}

fn nodes(proposal: &Proposal) -> Vec<(u32, Option<usize>)> {
    proposal.nodes.iter().map(|n| (n.token, n.parent)).collect()
}

#[test]
fn a_chain_takes_the_likeliest_token_of_each_level() {
    let mut drafter = by_depth(&[&[0.1, 0.9], &[0.8, 0.2], &[0.3, 0.7]]);
    // The draft's tokens 0 and 1 are the target's 2 and 5.
    let vocab = VocabMap::from_offsets(&[2, 4], 8).expect("offsets");
    let proposal = run(&mut drafter, &vocab, (3, 1, 4), 0.0);
    assert_eq!(nodes(&proposal), [(5, None), (2, Some(0)), (5, Some(1))]);
    assert_eq!(drafter.calls, [vec![(5, None)], vec![(2, Some(0))]], "three steps cost two expansions");
    assert!(proposal.distributions.is_empty());
}

/// By hand, for probabilities 0.5, 0.3, 0.15, 0.05 at every depth: level 1 has A 0.5 and B 0.3, level 2 AA 0.25, AB 0.15,
/// BA 0.15 and BB 0.09, of which AA and AB are expanded to AAA 0.125, AAB 0.075, ABA 0.075 and ABB 0.045.
#[test]
fn a_tree_keeps_the_likeliest_nodes_of_all_levels() {
    let full = [(0, None), (1, None), (0, Some(0)), (1, Some(0)), (0, Some(1)), (0, Some(2))];
    for n_nodes in 2..=7 {
        let mut drafter = by_depth(&[&[0.5, 0.3, 0.15, 0.05]]);
        let proposal = run(&mut drafter, &VocabMap::full(4), (3, 2, n_nodes), 0.0);
        assert_eq!(nodes(&proposal), full[..n_nodes - 1], "{n_nodes} nodes");
        assert_eq!(drafter.calls, [vec![(0, None), (1, None)], vec![(0, Some(0)), (1, Some(0))]]);
    }
    let proposal = run(&mut by_depth(&[&[0.5, 0.3, 0.15, 0.05]]), &VocabMap::full(4), (3, 2, 8), 0.0);
    // One more is BB, which comes before AAA.
    assert_eq!(nodes(&proposal)[5..], [(1, Some(1)), (0, Some(2))]);
}

#[test]
fn parents_come_first_and_siblings_differ_however_tokens_are_chosen() {
    for temperature in [0.0, 0.7, 3.0] {
        for (steps, topk, n_nodes) in [(1, 3, 4), (4, 2, 9), (5, 3, 20), (3, 4, 30), (6, 1, 7)] {
            let mut drafter = by_depth(&[&[0.3, 0.25, 0.2, 0.15, 0.1], &[0.96, 0.01, 0.01, 0.01, 0.01]]);
            let proposal = run(&mut drafter, &VocabMap::full(5), (steps, topk, n_nodes), temperature);
            assert_eq!(proposal.nodes.len(), n_nodes - 1, "{temperature} {steps} {topk} {n_nodes}");
            for (i, node) in proposal.nodes.iter().enumerate() {
                assert!(node.parent.is_none_or(|p| p < i), "{proposal:?}");
                let twins = proposal.children(node.parent).filter(|&c| proposal.nodes[c].token == node.token);
                assert_eq!(twins.count(), 1, "{proposal:?}");
                let has_distribution = proposal.distributions.contains_key(&node.parent);
                assert_eq!(has_distribution, temperature > 0.0, "{proposal:?}");
            }
            assert_eq!(drafter.calls.len(), steps - 1);
        }
    }
}

/// Certain tokens tie with their children; ancestors must be kept all the same.
#[test]
fn certain_paths_keep_their_ancestors() {
    let mut drafter = by_depth(&[&[1.0, 0.0]]);
    let proposal = run(&mut drafter, &VocabMap::full(2), (4, 2, 4), 0.0);
    assert_eq!(nodes(&proposal), [(0, None), (0, Some(0)), (0, Some(1))]);
}

#[test]
fn fewer_tokens_than_asked_for_are_all_there_are() {
    let mut drafter = by_depth(&[&[0.5, 0.5]]);
    let proposal = run(&mut drafter, &VocabMap::full(2), (2, 4, 20), 1.0);
    assert_eq!(proposal.nodes.len(), 6);
    // Drawing never takes a token of probability 0.
    let proposal = run(&mut by_depth(&[&[1.0, 0.0]]), &VocabMap::full(2), (3, 2, 8), 1.0);
    assert_eq!(nodes(&proposal), [(0, None), (0, Some(0)), (0, Some(1))]);
}

#[test]
fn a_draft_that_breaks_its_contract_is_named() {
    let mut rng = stream(3, "propose");
    let mut choice = Choice { sampling: Sampling::default(), rng: &mut rng };
    let mut drafter = by_depth(&[&[0.5, 0.5]]);
    let root = drafter.logits(0);
    let error = propose(&mut drafter, root, &VocabMap::full(3), &Speculation::chain(2), &mut choice);
    let message = error.expect_err("must be refused").to_string();
    assert_eq!(message, "draft: logits over the draft vocabulary: expected 3, got 2");
    let root = vec![f32::NAN, 0.0];
    let error = propose(&mut drafter, root, &VocabMap::full(2), &Speculation::chain(2), &mut choice);
    assert!(error.expect_err("must be refused").to_string().starts_with("the draft's logits are not finite"));
}
