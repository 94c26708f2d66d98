//! Greedy output is token for token the target's own, whatever the draft and however it proposes.

use specforge_eval::{Generated, Speculation, difference, evaluate, plain};
use specforge_methods::{Frozen, MethodConfig, VocabMap, eagle3};

use crate::support::{Distortion, NO_EOS, Oracle, VOCAB, options, prompts, run, starting_with, tiny_target};

const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 2), (5, 1, 6), (3, 2, 6), (2, 4, 9), (5, 4, 16), (4, 8, 32)];

#[test]
fn greedy_output_is_the_targets_own() {
    let target = tiny_target(128, NO_EOS);
    let prompts = starting_with(9, prompts(3));
    for distortion in [Distortion::None, Distortion::Negated, Distortion::Noise(2.0)] {
        let method = Oracle::new(&target, distortion, 9);
        for (steps, topk, n_nodes) in SHAPES {
            let options = options(Speculation { steps, topk, n_nodes }, 24);
            let report = run(&target, &method, &prompts, &options);
            let context = format!("{distortion:?} {steps} {topk} {n_nodes}: {:?}", report.first_difference);
            assert_eq!(report.lossless, Some(true), "{context}");
            assert_eq!(report.first_difference, None);
            for (i, result) in report.results.iter().enumerate() {
                let own = plain(&target, (i, &prompts[i]), &options).unwrap();
                assert_eq!(result.output_ids, own.tokens, "{context}");
            }
        }
    }
}

#[test]
fn an_untrained_eagle3_draft_loses_nothing_and_gains_nothing() {
    let target = tiny_target(128, NO_EOS);
    let frozen = Frozen { embedding: target.embedding().clone(), head: target.head().clone() };
    for vocab in [VocabMap::full(VOCAB), VocabMap::from_offsets(&[3; 20], VOCAB).unwrap()] {
        let config = MethodConfig::Eagle3(eagle3::Config::default());
        let (method, params) = config.build(target.info(), &frozen, vocab, 4).unwrap();
        for (steps, topk, n_nodes) in SHAPES {
            let options = options(Speculation { steps, topk, n_nodes }, 24);
            let report = evaluate(&target, &*method, &params, &prompts(3), &options, &|_, _| {}).unwrap();
            assert_eq!(report.lossless, Some(true), "{:?}", report.first_difference);
            assert!(report.acceptance_length < 1.3 || topk > 1, "{}", report.acceptance_length);
        }
    }
}

#[test]
fn a_difference_is_found_and_its_gap_is_the_targets() {
    let target = tiny_target(128, NO_EOS);
    let prompt = prompts(2).remove(1);
    let options = options(Speculation::default(), 12);
    let own = plain(&target, (3, &prompt), &options).unwrap();
    assert_eq!(difference(&target, (3, &prompt), &own, &own, &options).unwrap(), None);
    let mut other: Generated = own.clone();
    other.tokens[7] = (own.tokens[7] + 1) % VOCAB as u32;
    let found = difference(&target, (3, &prompt), &other, &own, &options).unwrap().expect("a difference");
    assert_eq!((found.prompt, found.index), (3, 7));
    assert_eq!((found.token, found.plain_token), (other.tokens[7], own.tokens[7]));
    let up_to = plain(&target, (3, &prompt), &crate::support::options(Speculation::default(), 8)).unwrap();
    let gap = up_to.last_logits[own.tokens[7] as usize] - up_to.last_logits[other.tokens[7] as usize];
    assert!((found.logit_gap - f64::from(gap)).abs() < 1e-6 && found.logit_gap >= 0.0, "{found:?}");
}
