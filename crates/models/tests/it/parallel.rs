//! A target that ranks share against the same target alone: hidden states, logits, statistics, decoding.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use specforge_models::{Capture, Error, KvCache, Target};
use specforge_parallel::threads;
use specforge_tensor::{DType, Device, Group, Tape, Tensor};
use specforge_testkit::{assert_close, assert_close_max, golden_cases};

const PATIENCE: Duration = Duration::from_mins(1);

/// States of all layers, the last one, logits, best tokens, log-sum-exp, and logits of cached decoding.
fn outputs(target: &Target) -> (Vec<Vec<f32>>, Vec<u32>) {
    let vocab = target.info().vocab_size as u32;
    let documents: Vec<Vec<u32>> =
        [7, 12].iter().map(|&n| (0..n).map(|t| (t * t * 31 + n * 7) % vocab).collect()).collect();
    let all = Capture { layers: (0..target.info().n_layers).collect(), last_hidden: true };
    let documents: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
    let captured = target.forward(&documents, &all).unwrap();
    let last = captured.last_hidden.unwrap();
    let stats = target.vocab_stats(&last).unwrap();
    let mut cache = KvCache::new(target, 12).unwrap();
    target.extend(&mut cache, &documents[1][..9], None, &all).unwrap();
    let decoded = target.extend(&mut cache, &documents[1][9..], None, &all).unwrap().last_hidden.unwrap();
    let floats = vec![
        captured.hidden_states.to_f32(),
        last.to_f32(),
        target.logits(&last).unwrap().to_f32(),
        stats.logsumexp.to_f32(),
        target.logits(&decoded).unwrap().to_f32(),
    ];
    (floats, stats.argmax.to_u32())
}

fn compare(folder: &Path, name: &str, size: usize) {
    let (alone, best) = outputs(&Target::load(folder, Device::Cpu, Some(DType::F32)).unwrap());
    let shared = threads::run(size, PATIENCE, |ranks| {
        outputs(&Target::load_shared(folder, Device::Cpu, Some(DType::F32), &ranks).unwrap())
    });
    let what = ["states", "last", "logits", "logsumexp", "decoded"];
    for (rank, (got, got_best)) in shared.iter().enumerate() {
        for ((got, want), what) in got.iter().zip(&alone).zip(what) {
            assert_close_max(&format!("{name}, rank {rank} of {size}: {what}"), got, want, 1e-5);
        }
        assert_eq!(got_best, &best, "{name}, rank {rank} of {size}");
    }
}

#[test]
fn parallel_golden_targets_over_2_and_4_ranks() {
    let mut seen = Vec::new();
    for (name, folder) in golden_cases("targets/") {
        let config: serde_json::Value =
            serde_json::from_slice(&fs_err::read(folder.join("config.json")).unwrap()).unwrap();
        let family = config["architectures"][0].as_str().unwrap_or_default().to_owned();
        let is_shared = ["Llama", "Qwen2", "Qwen3", "Mistral", "Granite"]
            .iter()
            .any(|f| family == format!("{f}ForCausalLM"));
        if !is_shared || config.get("quantization_config").is_some() {
            continue;
        }
        compare(&folder, &name, 2);
        compare(&folder, &name, 4);
        seen.push(family);
    }
    seen.sort();
    seen.dedup();
    // The repository holds all but Granite.
    assert!(seen.len() >= 4, "{seen:?}");
}

#[test]
fn parallel_targets_that_do_not_come_out_even_are_refused() {
    let refused = |name: &str, size: usize| {
        let (_, folder) = golden_cases("targets/").into_iter().find(|(n, _)| n.ends_with(name)).unwrap();
        let of = |ranks: Arc<dyn Group>| match Target::load_shared(&folder, Device::Cpu, None, &ranks) {
            Err(error @ Error::Setting { .. }) => error.to_string(),
            other => panic!("{name} over {size}: {other:?}"),
        };
        threads::run(size, PATIENCE, of).swap_remove(0)
    };
    let message = refused("gemma3", 2);
    assert!(message.contains("they can share LlamaForCausalLM"), "{message}");
    let message = refused("qwen3", 3);
    assert!(message.contains("vocab_size = 304") && message.contains("multiple of 3"), "{message}");
}

/// The statistics of a vocabulary do not depend on how it is cut, ties included.
#[test]
fn parallel_statistics_take_the_first_of_equal_tokens() {
    let hidden = |device| Tensor::from_f32(device, vec![1.0, 2.0, -1.0, 0.5], &[2, 2]).unwrap();
    let rows = vec![0.5, 0.5, 0.0, 0.75, 0.5, 0.5, -1.0, 0.0];
    let head = Tensor::from_f32(Device::Cpu, rows, &[4, 2]).unwrap();
    let alone = Tape::vocab_stats(&hidden(Device::Cpu), &head).unwrap();
    let shared = threads::run(2, PATIENCE, |ranks| {
        let own = head.rows(2 * ranks.rank()..2 * ranks.rank() + 2).unwrap();
        let stats = Tape::vocab_stats_shared(&hidden(Device::Cpu), &own, Some(&ranks)).unwrap();
        (stats.argmax.to_u32(), stats.logsumexp.to_f32(), stats.top.to_f32())
    });
    for (argmax, logsumexp, top) in shared {
        assert_eq!((argmax, top), (alone.argmax.to_u32(), alone.top.to_f32()));
        assert_close("logsumexp", &logsumexp, &alone.logsumexp.to_f32(), 1e-6, 0.0);
    }
}
