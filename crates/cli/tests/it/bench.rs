//! `specforge bench` on a CPU: every figure is there and positive, and wrong arguments are named.

use serde_json::Value;

use crate::world::World;

#[track_caller]
fn positive(facts: &Value, pointers: &[&str]) {
    for pointer in pointers {
        let figure = facts.pointer(pointer).and_then(Value::as_f64);
        assert!(figure.is_some_and(|n| n > 0.0 && n.is_finite()), "{pointer} in {facts:#}");
    }
}

#[test]
fn a_step_is_measured() {
    let world = World::new();
    let step =
        ["bench", "step", "--preset", "quickstart", "--tokens", "2x64", "--steps", "2", "--warmup", "1"];
    let offline = world.ok_json(&[&step[..], &["--device", "cpu", "--json"]].concat());
    let figures = [
        "/step_ms/median",
        "/step_ms/min",
        "/step_ms/max",
        "/tokens_per_second",
        "/phases_ms/forward",
        "/phases_ms/backward",
        "/phases_ms/optimizer",
        "/flop/ours/products",
        "/flop/ours/attention",
        "/flop/specforge/products",
        "/tflops",
        "/loss",
    ];
    positive(&offline, &figures);
    assert_eq!((&offline["rows"]["tokens"], &offline["rows"]["live"]), (&128.into(), &126.into()));
    // A CPU has no floor to replay and no pool to watch; offline no target runs.
    for none in ["floor", "memory", "driver"] {
        assert_eq!(offline[none], Value::Null, "{none}");
    }
    assert_eq!(offline["phases_ms"]["target"], Value::Null);
    let online = world
        .ok_json(&[&step[..], &["--device", "cpu", "--json", "--mode", "online", "--live", "0.5"]].concat());
    positive(&online, &figures);
    positive(&online, &["/phases_ms/target"]);
    let live = |facts: &Value| facts["rows"]["live"].as_u64();
    assert!(live(&online) < live(&offline), "{online:#}");
}

/// On a CPU ranks are threads. Ranks of one batch have the loss that one has alone, and share its work.
#[test]
fn a_step_is_measured_over_parallel_ranks() {
    let world = World::new();
    let step = |more: &[&str]| {
        let args =
            ["bench", "step", "--preset", "quickstart", "--tokens", "2x64", "--device", "cpu", "--json"];
        world.ok_json(&[&args[..], &["--steps", "2", "--warmup", "1"], more].concat())
    };
    let loss = |facts: &Value| facts["loss"].as_f64().unwrap();
    let alone = step(&[]);
    assert_eq!(alone["sent_bytes"], Value::Null);
    for ranks in ["--sequence", "--tensor"] {
        let shared = step(&[ranks, "2"]);
        assert!((loss(&shared) / loss(&alone) - 1.0).abs() < 1e-4, "{} {}", loss(&shared), loss(&alone));
        assert_eq!(shared["rows"], alone["rows"]);
    }
    let two = step(&["--data", "2", "--zero", "3", "--mode", "online"]);
    positive(
        &two,
        &["/tokens_per_second", "/sent_bytes/gradients", "/sent_bytes/overlapped", "/sent_bytes/weights"],
    );
    for (more, message) in [
        (&["--tensor", "2", "--mode", "online"][..], "use --mode offline"),
        (&["--sequence", "2", "--exchange", "heads"], "num-key-value-heads"),
        (&["--data", "0"], "at least 1"),
        (&["--data", "5000"], "at most 4096"),
    ] {
        let args = ["bench", "step", "--preset", "quickstart", "--tokens", "2x64", "--device", "cpu"];
        world.fails(&[&args[..], more].concat(), &[message]);
    }
}

#[test]
fn the_parts_of_a_step_are_measured() {
    let world = World::new();
    let common = ["--device", "cpu", "--json", "--steps", "2", "--warmup", "0"];
    for (args, figures) in [
        (
            &[
                "attention",
                "--tokens",
                "32",
                "--heads",
                "4",
                "--kv-heads",
                "2",
                "--head-dim",
                "16",
                "--extras",
                "1",
            ][..],
            &["/forward/tflops", "/backward/ms/median"][..],
        ),
        (
            &["attention", "--tokens", "2x32", "--heads", "2", "--kv-heads", "1", "--window", "8"],
            &["/forward/tflops"],
        ),
        (&["gemm", "--m", "8", "--n", "16", "--k", "32"], &["/forward/tflops", "/weight_gradient/tflops"]),
        (&["adamw", "--params", "1e4"], &["/ms/median", "/gb_per_second"]),
        (
            &["loss", "--rows", "28", "--teacher-rows", "4", "--hidden", "16", "--vocab", "64"],
            &["/ms/median", "/tflops"],
        ),
        (
            &["experts", "--rows", "8", "--experts", "4", "--top-k", "2", "--hidden", "16", "--width", "8"],
            &["/route/ms/median", "/products/tflops"],
        ),
    ] {
        positive(&world.ok_json(&[&["bench"], args, &common].concat()), figures);
    }
}

#[test]
fn the_table_names_the_device_first() {
    let world = World::new();
    let small = ["bench", "adamw", "--params", "1000", "--steps", "1", "--device", "cpu"];
    let table = world.ok(&small).stdout;
    assert!(table.starts_with("device") && table.contains("cpu") && table.contains("GB/s"), "{table}");
}

#[test]
fn every_measurement_explains_itself() {
    let world = World::new();
    for (command, words) in [
        ("step", ["--preset", "--live", "fused", "floor"]),
        ("attention", ["--kv-heads", "--extras", "--window", "2.5"]),
        ("gemm", ["--m", "--n", "--k", "float32"]),
        ("adamw", ["--params", "28", "--device", "--json"]),
        ("loss", ["--teacher-rows", "--vocab", "floor", "--json"]),
        ("experts", ["--top-k", "--width", "sorted", "e4m3"]),
    ] {
        let help = world.ok(&["bench", command, "--help"]).stdout;
        words.iter().for_each(|word| assert!(help.contains(word), "{command}: {word} is not in: {help}"));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let world = World::new();
    for (args, expected) in [
        (&["step", "--tokens", "0x5"][..], &["--tokens", "0x5", "2x2048"][..]),
        (&["step", "--tokens", "many"], &["--tokens", "many"]),
        (&["step", "--preset", "quickstart", "--tokens", "1x4096"], &["--tokens 1x4096", "at most 2048"]),
        (&["step", "--live", "2"], &["--live", "at most 1"]),
        (&["step", "--live", "0"], &["--live", "above 0"]),
        (&["step", "--preset", "gpt-5"], &["--preset", "gpt-5", "llama3-8b"]),
        (&["step", "--steps", "0"], &["--steps"]),
        (&["step", "--target-dtype", "fp8"], &["--target-dtype fp8", "--mode online"]),
        (&["step", "--target-dtype", "fp8", "--mode", "online"], &["--target-dtype fp8", "needs a GPU"]),
        (&["attention", "--kv-heads", "5"], &["--kv-heads 5", "divisor"]),
        (&["gemm", "--m", "0"], &["--m", "at least 1"]),
        (&["adamw", "--params", "0"], &["--params", "425e6"]),
        (&["loss", "--rows", "4", "--teacher-rows", "8"], &["--teacher-rows 8", "at most"]),
        (&["experts", "--top-k", "200"], &["--top-k 200", "at most the 128"]),
    ] {
        world.fails(&[&["bench"], args, &["--device", "cpu"]].concat(), expected);
    }
}
