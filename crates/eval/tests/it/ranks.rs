//! Ranks that share a draft's matrices decode in step: each the same tokens as one alone.

use std::time::Duration;

use specforge_eval::{Options, Speculation, evaluate};
use specforge_methods::{Frozen, MethodConfig, Ranks, VocabMap, eagle3};
use specforge_models::Target;
use specforge_parallel::threads;

use crate::support::{NO_EOS, VOCAB, options, prompts, sampled, tiny_target};

/// Of every prompt the answer and how many proposals of each round are in it.
type Answers = Vec<(Vec<u32>, Vec<usize>)>;

/// An untrained draft of a part of the vocabulary.
fn decode(target: &Target, ranks: &Ranks, options: &Options) -> Answers {
    let frozen = Frozen { embedding: target.embedding().clone(), head: target.head().clone() };
    let config = MethodConfig::Eagle3(eagle3::Config::default());
    let vocab = VocabMap::from_offsets(&[3; 40], VOCAB).expect("a vocabulary");
    let (method, params) = config.build_on(ranks, target.info(), &frozen, vocab, 4).expect("a draft");
    let report = evaluate(target, &*method, &params, &prompts(4), options, &|_, _| {}).expect("a report");
    report.results.into_iter().map(|result| (result.output_ids, result.accepted)).collect()
}

#[test]
fn parallel_ranks_that_share_a_draft_decode_what_one_decodes() {
    let target = tiny_target(128, NO_EOS);
    for (steps, topk, n_nodes) in [(5, 1, 6), (4, 8, 32)] {
        let greedy = options(Speculation { steps, topk, n_nodes }, 24);
        for options in [sampled(&greedy, 1.0, 3), greedy] {
            let alone = decode(&target, &Ranks::default(), &options);
            let accepted: usize = alone.iter().flat_map(|(_, accepted)| accepted).sum();
            assert!(topk == 1 || accepted > 0, "nothing is accepted, so nothing is compared");
            for size in [2, 4] {
                let shared = threads::run(size, Duration::from_mins(1), |group| {
                    decode(&target, &Ranks { tensor: Some(group), sequence: None }, &options)
                });
                shared.iter().enumerate().for_each(|(r, got)| assert_eq!(got, &alone, "{r} of {size}"));
            }
        }
    }
}
