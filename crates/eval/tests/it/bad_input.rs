//! What cannot be decoded is named.

use specforge_eval::{Options, Speculation, evaluate};
use specforge_methods::VocabMap;
use specforge_tensor::Params;

use crate::support::{Distortion, NO_EOS, Oracle, VOCAB, options, tiny_target};

fn check(prompts: &[Vec<u32>], options: &Options, expected: &str) {
    let target = tiny_target(16, NO_EOS);
    let method = Oracle::new(&target, Distortion::None, 1);
    let error = evaluate(&target, &method, &Params::new(), prompts, options, &|_, _| {})
        .expect_err("must be refused");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn bad_prompts_are_named_by_number() {
    let options = options(Speculation::default(), 4);
    let good = vec![1, 2, 3];
    check(&[], &options, "no prompts: acceptance is measured by decoding at least one");
    check(&[good.clone(), vec![]], &options, "prompt 1: empty: expected at least one token");
    let long = "prompt 1: 16 tokens leave no room for an answer: the target's context is 16";
    check(&[good.clone(), vec![1; 16]], &options, long);
    let unknown = format!("prompt 0: token {VOCAB}: expected ids below the target's vocabulary of {VOCAB}");
    check(&[vec![1, VOCAB as u32]], &options, &unknown);
    check(
        &[good, vec![]],
        &Options { parallel: true, ..options },
        "prompt 1: empty: expected at least one token",
    );
}

#[test]
fn bad_options_are_refused_before_anything_runs() {
    let shape = Speculation { steps: 3, topk: 1, n_nodes: 9 };
    let expected = "n_nodes = 9: a chain (topk = 1) has steps + 1 = 4 nodes, the root included";
    check(&[vec![1]], &options(shape, 4), expected);
}

#[test]
fn a_draft_for_another_target_is_refused() {
    let target = tiny_target(16, NO_EOS);
    let vocab = VocabMap::from_offsets(&[0, VOCAB as i64], 2 * VOCAB).unwrap();
    let method = Oracle::new(&target, Distortion::None, 1).with_vocab(vocab);
    let options = options(Speculation::default(), 4);
    let error = evaluate(&target, &method, &Params::new(), &[vec![1, 2]], &options, &|_, _| {});
    let message = error.expect_err("must be refused").to_string();
    assert_eq!(
        message,
        "the draft's vocabulary names token 65, the target has 64: they do not belong together"
    );
}
