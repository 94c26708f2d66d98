//! What is counted: acceptance, where answers end, and the report's keys.

use std::cell::RefCell;

use specforge_eval::{Options, Speculation, Stop, evaluate, plain};
use specforge_methods::VocabMap;
use specforge_tensor::Params;

use crate::support::{Distortion, NO_EOS, Oracle, VOCAB, options, prompts, run, starting_with, tiny_target};

#[test]
fn a_perfect_draft_accepts_everything() {
    let target = tiny_target(128, NO_EOS);
    let prompts = starting_with(2, prompts(3));
    for k in [1, 3, 5] {
        let method = Oracle::new(&target, Distortion::None, 2);
        let report = run(&target, &method, &prompts, &options(Speculation::chain(k), 1 + 4 * (k + 1)));
        assert_eq!(report.acceptance_length, k as f64 + 1.0);
        assert_eq!(report.acceptance_per_position, vec![1.0; k]);
        assert_eq!(report.target_forwards, 3 * 4);
        assert_eq!(report.tokens, 3 * (1 + 4 * (k + 1)));
    }
    // Where every candidate is kept, the likeliest path is among them.
    let method = Oracle::new(&target, Distortion::None, 2);
    let shape = Speculation { steps: 2, topk: 3, n_nodes: 13 };
    assert_eq!(run(&target, &method, &prompts, &options(shape, 1 + 4 * 3)).acceptance_length, 3.0);
}

#[test]
fn a_wrong_draft_accepts_nothing() {
    let target = tiny_target(128, NO_EOS);
    let method = Oracle::new(&target, Distortion::Negated, 2);
    for shape in [Speculation::chain(5), Speculation { steps: 4, topk: 3, n_nodes: 12 }] {
        let report = run(&target, &method, &starting_with(2, prompts(2)), &options(shape, 10));
        assert_eq!(report.acceptance_length, 1.0);
        assert_eq!(report.acceptance_per_position, vec![0.0; shape.steps]);
    }
}

#[test]
fn figures_agree_with_each_other() {
    let target = tiny_target(128, NO_EOS);
    let method = Oracle::new(&target, Distortion::Noise(0.5), 2);
    for shape in [Speculation::chain(4), Speculation { steps: 4, topk: 3, n_nodes: 12 }] {
        let report = run(&target, &method, &starting_with(2, prompts(4)), &options(shape, 40));
        let rounds = report.target_forwards as f64;
        assert!(
            report.acceptance_length > 1.1 && report.acceptance_length < 4.9,
            "{}",
            report.acceptance_length
        );
        assert_eq!(report.acceptance_length, (report.tokens - report.prompts) as f64 / rounds);
        // One bonus token per round, but where the end of an answer cut it off.
        let accepted: f64 = report.acceptance_per_position.iter().sum::<f64>() * rounds;
        let missing = rounds + accepted - (report.tokens - report.prompts) as f64;
        assert!((-1e-6..=report.prompts as f64 + 1e-6).contains(&missing), "{missing}");
        assert!(report.acceptance_per_position.is_sorted_by(|a, b| a >= b));
        let counted: usize = report.results.iter().flat_map(|r| &r.accepted).sum();
        assert!((accepted - counted as f64).abs() < 1e-6);
        let (fast, slow) = (report.tokens_per_second.unwrap(), report.plain_tokens_per_second.unwrap());
        assert!(fast > 0.0 && slow > 0.0 && (report.speedup.unwrap() - fast / slow).abs() < 1e-9);
    }
}

#[test]
fn a_draft_vocabulary_without_the_targets_tokens_accepts_nothing() {
    let target = tiny_target(128, NO_EOS);
    let prompt = vec![vec![2, 7, 1]];
    let options = options(Speculation::chain(3), 12);
    let own = plain(&target, (0, &prompt[0]), &options).unwrap().tokens;
    let kept: Vec<u32> = (0..VOCAB as u32).filter(|t| !own.contains(t)).collect();
    let offsets: Vec<i64> = kept.iter().enumerate().map(|(i, &t)| i64::from(t) - i as i64).collect();
    let vocab = VocabMap::from_offsets(&offsets, VOCAB).unwrap();
    let method = Oracle::new(&target, Distortion::None, 2).with_vocab(vocab);
    let report = run(&target, &method, &prompt, &options);
    assert_eq!((report.acceptance_length, report.lossless), (1.0, Some(true)));
}

#[test]
fn an_answer_ends_at_eos_inside_an_accepted_run() {
    let prompt = vec![vec![2, 7, 1]];
    let shape = options(Speculation::chain(5), 40);
    let tokens = plain(&tiny_target(128, NO_EOS), (0, &prompt[0]), &shape).unwrap().tokens;
    // Rounds of six tokens follow the first: the first five of each are the draft's.
    let is_inside = |&i: &usize| i > 1 && (i - 1) % 6 < 4 && !tokens[..i].contains(&tokens[i]);
    let at = (0..tokens.len()).rev().find(is_inside).expect("a token that comes late for the first time");
    let target = tiny_target(128, tokens[at]);
    let report = run(&target, &Oracle::new(&target, Distortion::None, 2), &prompt, &shape);
    let result = &report.results[0];
    assert_eq!(result.output_ids, tokens[..=at]);
    assert_eq!((result.stop, report.lossless), (Stop::Eos, Some(true)));
    assert_eq!(result.accepted.last(), Some(&((at - 1) % 6 + 1)));
}

#[test]
fn answers_end_at_the_limit_and_at_the_context() {
    let (target, prompt) = (tiny_target(32, NO_EOS), vec![vec![2; 20]]);
    let method = Oracle::new(&target, Distortion::None, 2);
    for shape in [Speculation::chain(5), Speculation { steps: 4, topk: 3, n_nodes: 12 }] {
        for (limit, tokens, stop) in [
            (1, 1, Stop::Length),
            (2, 2, Stop::Length),
            (9, 9, Stop::Length),
            (12, 12, Stop::Length),
            (50, 12, Stop::Context),
        ] {
            let report = run(&target, &method, &prompt, &options(shape, limit));
            assert_eq!((report.tokens, report.results[0].stop), (tokens, stop), "{limit}");
            assert_eq!(report.lossless, Some(true));
            assert_eq!(report.target_forwards == 0, limit == 1);
        }
    }
}

#[test]
fn side_by_side_gives_the_same_answers_without_speed_figures() {
    let target = tiny_target(128, NO_EOS);
    let (method, prompts) = (Oracle::new(&target, Distortion::Noise(0.5), 2), starting_with(2, prompts(6)));
    let one_by_one = Options { plain: false, ..options(Speculation::chain(3), 16) };
    let side_by_side = Options { parallel: true, ..one_by_one.clone() };
    let heard = RefCell::new(Vec::new());
    let progress = |done, total| heard.borrow_mut().push((done, total));
    let b = evaluate(&target, &method, &Params::new(), &prompts, &side_by_side, &progress).unwrap();
    assert_eq!((heard.borrow().first(), heard.borrow().last()), (Some(&(0, 6)), Some(&(6, 6))));
    let a = run(&target, &method, &prompts, &one_by_one);
    let ids = |r: &specforge_eval::Report| r.results.iter().map(|r| r.output_ids.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&a), ids(&b));
    assert_eq!(a.acceptance_per_position, b.acceptance_per_position);
    assert_eq!((b.tokens_per_second, b.lossless), (None, None));
    assert!(a.tokens_per_second.is_some() && a.plain_tokens_per_second.is_none() && a.speedup.is_none());
}

#[test]
fn the_report_is_json_with_the_documented_keys() {
    let target = tiny_target(128, NO_EOS);
    let method = Oracle::new(&target, Distortion::None, 2);
    let report = run(&target, &method, &starting_with(2, prompts(1)), &options(Speculation::chain(2), 7));
    let json = serde_json::to_value(&report).unwrap();
    let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = "mode steps topk n_nodes temperature top_p prompts tokens target_forwards acceptance_length \
                    acceptance_per_position lossless first_difference tokens_per_second plain_tokens_per_second \
                    speedup seconds results";
    assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    assert_eq!((&json["mode"], &json["n_nodes"]), (&"chain".into(), &3.into()));
    assert_eq!((&json["acceptance_length"], &json["results"][0]["stop"]), (&3.0.into(), &"length".into()));
}
