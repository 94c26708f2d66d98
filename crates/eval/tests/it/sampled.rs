//! Sampled decoding: reproducible, and wired to the same probabilities on both sides. That it follows the target's
//! distribution is tested on the pure functions.

use specforge_eval::{Options, Sampling, Speculation};

use crate::support::{
    Distortion, NO_EOS, Oracle, options, prompts, run, sampled, starting_with, tiny_target,
};

const SHAPES: [Speculation; 2] =
    [Speculation { steps: 4, topk: 1, n_nodes: 5 }, Speculation { steps: 4, topk: 3, n_nodes: 12 }];

#[test]
fn a_seed_gives_the_same_answers_and_another_one_others() {
    let target = tiny_target(128, NO_EOS);
    let (method, prompts) = (Oracle::new(&target, Distortion::Noise(1.0), 2), starting_with(2, prompts(3)));
    for shape in SHAPES {
        let answers = |seed, parallel| {
            let options = Options { plain: false, parallel, ..sampled(&options(shape, 20), 1.0, seed) };
            let report = run(&target, &method, &prompts, &options);
            assert_eq!(report.lossless, None);
            report.results.into_iter().map(|r| r.output_ids).collect::<Vec<_>>()
        };
        assert_eq!(answers(1, false), answers(1, true));
        assert_ne!(answers(1, false), answers(2, false));
    }
}

#[test]
fn the_perfect_draft_is_nearly_always_accepted() {
    let target = tiny_target(128, NO_EOS);
    let method = Oracle::new(&target, Distortion::None, 2);
    let report =
        run(&target, &method, &starting_with(2, prompts(3)), &sampled(&options(SHAPES[0], 31), 0.8, 3));
    assert!(report.acceptance_length > 4.9, "{}", report.acceptance_length);
    assert_eq!((report.lossless, report.first_difference), (None, None));
    assert!(report.speedup.is_some());
}

#[test]
fn a_tiny_temperature_or_top_p_is_greedy() {
    let target = tiny_target(128, NO_EOS);
    let (method, prompts) = (Oracle::new(&target, Distortion::Noise(1.0), 2), starting_with(2, prompts(2)));
    for shape in SHAPES {
        let greedy = run(&target, &method, &prompts, &options(shape, 20));
        for (temperature, top_p) in [(1e-6, 1.0), (1.0, 1e-9)] {
            let sampling = Sampling { temperature, top_p, seed: 8 };
            let report = run(&target, &method, &prompts, &Options { sampling, ..options(shape, 20) });
            for (a, b) in greedy.results.iter().zip(&report.results) {
                assert_eq!(a.output_ids, b.output_ids, "{temperature} {top_p}");
            }
        }
    }
}
