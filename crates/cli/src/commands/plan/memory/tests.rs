//! Projected memory against peaks that were measured, and against the counted heap.

use specforge_methods::eagle3::Config;

use super::super::ledger::total;
use super::*;
use crate::commands::bench::data::Data;
use crate::commands::bench::preset::Preset;
use crate::commands::bench::subject::{Source, Subject};
use crate::{heap, machine};

/// `specforge bench step`: preset, documents and their tokens, live share, the target's bytes (online).
type Line = (Preset, [usize; 2], f64, Option<[u64; 2]>, f64);

fn bench(line: &Line, device: Device) -> f64 {
    bench_on(line, device, Layout::ALONE)
}

fn bench_on(&(preset, [documents, each], live, online, _): &Line, device: Device, layout: Layout) -> f64 {
    let (info, config) = (preset.info().unwrap(), Config::default());
    let dims = Dims::resolve(&config, &info, preset.vocab(info.vocab_size).unwrap().len()).unwrap();
    let data = Data::draw(format!("{documents}x{each}").parse().unwrap(), (live, 0), info.vocab_size);
    let rows = Rows::of(&data.bounds, &data.loss_mask, config.ttt_steps);
    let storage = Storage::of(device, if device == Device::Cpu { 4 } else { 2 });
    let frozen = online.map_or(Frozen::Rows, |[matrix, table]| Frozen::Whole { matrix, table });
    let ahead = u64::from(online.is_some());
    let case = Case {
        dims: &dims,
        target: &info,
        steps: config.ttt_steps as u64,
        storage,
        threads: machine::threads() as u64,
        frozen,
        ahead,
        accumulates: false,
        target_beside: false,
        layout,
    };
    let mut held = peak(&case, &rows);
    // Not of the heap of a step.
    held.remove(&Kind::Program);
    total(&held) as f64
}

/// The peaks of BENCHMARKS.md, in GB.
#[test]
fn the_measured_peaks_of_every_preset() {
    let (llama, four, eight) = (Preset::Llama3_8b, Preset::Qwen3_4b, Preset::Qwen3_8b);
    let lines: [Line; 12] = [
        (llama, [1, 2048], 1.0, None, 9.1),
        (llama, [2, 2048], 1.0, None, 11.3),
        (llama, [1, 8192], 1.0, None, 15.7),
        (llama, [1, 32768], 1.0, None, 43.2),
        (llama, [2, 2048], 0.5, None, 9.5),
        (llama, [2, 2048], 0.25, None, 8.4),
        (four, [1, 2048], 1.0, None, 5.3),
        (four, [2, 2048], 1.0, None, 6.9),
        (eight, [2, 2048], 1.0, None, 10.6),
        (llama, [2, 2048], 1.0, Some([2, 2]), 27.5),
        (llama, [2, 2048], 1.0, Some([1, 2]), 20.5),
        (four, [2, 2048], 1.0, Some([2, 2]), 15.1),
    ];
    for line in &lines {
        let got = bench(line, Device::Cuda(0)) / 1e9;
        assert!(
            (got / line.4 - 1.0).abs() < 0.1,
            "{:?} {:?}: {got:.2} GB, measured {}",
            line.0,
            line.1,
            line.4
        );
    }
}

/// The first rank's peaks of BENCHMARKS.md, in GB.
#[test]
fn the_measured_peaks_of_several_ranks() {
    let on = |data, sequence, tensor, zero| Layout { data, tensor, sequence, zero, ..Layout::ALONE };
    for (tokens, layout, measured) in [
        ([2, 2048], on(2, 1, 1, 0), 11.0),
        ([2, 2048], on(2, 1, 1, 1), 9.1),
        ([2, 2048], on(2, 1, 1, 2), 9.1),
        ([2, 2048], on(2, 1, 1, 3), 9.1),
        ([2, 2048], on(1, 1, 2, 1), 7.2),
        ([1, 8192], on(1, 2, 1, 0), 11.3),
        ([1, 8192], on(1, 2, 1, 1), 9.3),
        ([1, 32768], on(1, 2, 1, 1), 22.5),
        ([1, 32768], on(1, 4, 1, 1), 12.9),
        ([2, 2048], on(4, 1, 1, 1), 7.7),
        ([2, 2048], on(1, 1, 4, 1), 5.1),
        ([2, 2048], on(2, 1, 2, 1), 5.8),
        ([1, 8192], on(2, 2, 1, 1), 7.9),
    ] {
        let line = (Preset::Llama3_8b, tokens, 1.0, None, measured);
        let got = bench_on(&line, Device::Cuda(0), layout) / 1e9;
        let what = format!("{tokens:?} on {layout}, level {}", layout.zero);
        assert!((got / measured - 1.0).abs() < 0.1, "{what}: {got:.2} GB, measured {measured}");
    }
}

/// The quick start's shapes on the CPU, against the heap that a step takes: offline, and with the target.
#[test]
fn the_counted_heap_of_the_quick_start() {
    for online in [None, Some([4, 4])] {
        let line = (Preset::Quickstart, [4, 128], 1.0, online, 0.0);
        let (info, config) = (line.0.info().unwrap(), Config::default());
        let source = if online.is_some() { Source::Target(None) } else { Source::Store };
        let data = Data::draw("4x128".parse().unwrap(), (1.0, 0), info.vocab_size);
        let vocab = line.0.vocab(info.vocab_size).unwrap();
        let (held, ()) = heap::peak_of(|| {
            let mut subject =
                Subject::new((&info, vocab), &config, data, source, (Device::Cpu, None)).unwrap();
            for _ in 0..2 {
                subject.step(&mut || Ok(())).unwrap().wait().unwrap();
            }
        });
        let (got, held) = (bench(&line, Device::Cpu), held as f64);
        assert!((got / held - 1.0).abs() < 0.1, "online {online:?}: {got} B, held {held} B");
    }
}
