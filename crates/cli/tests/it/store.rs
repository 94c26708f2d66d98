//! `specforge capture`: interrupted, damaged, or of something else.

use std::time::Duration;

use crate::kill::Running;
use crate::left::Left;
use crate::world::{World, names, torn};

/// Offline mode over a store of its own place.
const OFFLINE: [&str; 6] = ["--set", "mode=offline", "--set", "store.path=store", "--set", "name=offline"];

fn with<'a>(command: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[command, "R"], OFFLINE.as_slice(), more].concat()
}

/// Names in the store, which may not be there yet, with this ending.
fn ending(world: &World, end: &str) -> Vec<String> {
    let names = if world.has("store") { names(&world.path("store")) } else { Vec::new() };
    names.into_iter().filter(|name| name.ends_with(end)).collect()
}

/// The finished shards of the store.
fn shards(world: &World) -> Vec<String> {
    ending(world, ".bin")
}

#[test]
fn a_capture_killed_at_any_time_goes_on_where_it_was() {
    let world = World::new();
    // Long enough to be killed in: 64 rows run side by side before they are written.
    world.write("conversations.jsonl", crate::world::conversations(900, 5));
    let whole = ["--set", "train.epochs=1", "--set", "name=whole", "--set", "store.path=whole"];
    world.ok(&with("capture", &whole));
    world.ok(&with("train", &whole));
    let mut in_time = 0;
    for i in 0..8u64 {
        let mut running = Running::start(&world, &with("capture", &[]));
        running.wait_until(|| world.has("store/manifest.json"));
        std::thread::sleep(Duration::from_millis(3 + 9 * (i % 4)));
        in_time += usize::from(running.kill());
    }
    assert!(in_time >= 4, "only {in_time} kills found the program at work");
    world.ok(&with("capture", &[]));
    let verified = world.ok(&["info", "store", "--verify"]);
    assert!(verified.stdout.contains("verified: 900 records"), "{}", verified.stdout);
    assert_eq!(torn(&world.path("store")), Vec::<String>::new());
    world.ok(&with("train", &["--set", "train.epochs=1"]));
    Left::by(&world, "offline").assert_same(&Left::by(&world, "whole"), "a capture killed eight times");
}

#[test]
fn a_capture_that_is_interrupted_says_how_to_go_on() {
    let world = World::new();
    world.write("conversations.jsonl", crate::world::conversations(2000, 5));
    let mut running = Running::start(&world, &with("capture", &[]));
    running.wait_until(|| !ending(&world, ".part").is_empty());
    let ran = running.signal("INT");
    ran.refused(&["stopped with", "of 2000 rows captured", "same command again"]);
    let ran = world.ok(&with("capture", &["--json"]));
    assert!(ran.stderr.contains("are there already"), "{}", ran.stderr);
    assert!(ran.stdout.contains("\"rows\": 2000"), "{}", ran.stdout);
}

#[test]
fn capturing_again_finds_everything_done() {
    let world = World::new();
    world.ok(&with("capture", &[]));
    let before: Vec<Vec<u8>> =
        shards(&world).iter().map(|name| world.bytes(&format!("store/{name}"))).collect();
    let ran = world.ok(&with("capture", &[]));
    assert!(ran.stderr.contains("60 of 60 rows are there already"), "{}", ran.stderr);
    let after: Vec<Vec<u8>> =
        shards(&world).iter().map(|name| world.bytes(&format!("store/{name}"))).collect();
    assert!(before == after && !before.is_empty());
}

#[test]
fn a_store_is_split_where_the_recipe_says() {
    let world = World::new();
    world.write("conversations.jsonl", crate::world::conversations(200, 5));
    world.ok(&with("capture", &["--set", "store.shard-mib=1"]));
    assert!(shards(&world).len() > 1, "{:?}", shards(&world));
    world.ok(&["info", "store", "--verify"]);
}

#[test]
fn a_store_of_something_else_is_refused_by_name() {
    let world = World::new();
    world.ok(&with("capture", &[]));
    let check = |more: &[&str], expected: &[&str]| {
        for command in ["train", "capture"] {
            world.fails(&with(command, more), &[&["store", "does not fit"], expected].concat());
        }
    };
    check(&["--set", "data.max-length=48"], &["max_length", "96", "48"]);
    check(&["--set", "method.eagle3.capture-layers=[1,2,3]"], &["layers"]);
    specforge_testkit::SmallTarget::llama(2).write(&world.path("target"));
    check(&[], &["weights"]);
}

#[test]
fn training_without_a_store_says_how_to_make_one() {
    let world = World::new();
    world.fails(&with("train", &[]), &["store", "specforge capture"]);
}

#[test]
fn a_flipped_bit_is_found_and_named() {
    let world = World::new();
    world.ok(&with("capture", &[]));
    let shard = format!("store/{}", shards(&world)[0]);
    let mut bytes = world.bytes(&shard);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    world.write(&shard, &bytes);
    let ran = world.run(&["info", "store", "--verify"]);
    ran.refused(&["1 of 60 records are damaged"]);
    assert!(ran.stdout.contains("damaged:") && ran.stdout.contains("shard-00000-00000"), "{}", ran.stdout);
    world.fails(&with("train", &[]), &["damaged record for row", "shard-00000-00000.bin", "capture again"]);
    // What the message says to do is enough.
    fs_err::remove_file(world.path(&shard)).unwrap();
    for name in names(&world.path("store")).iter().filter(|name| name.starts_with("manifest-")) {
        fs_err::remove_file(world.path(&format!("store/{name}"))).unwrap();
    }
    world.ok(&with("capture", &[]));
    world.ok(&["info", "store", "--verify"]);
}

#[test]
fn a_cut_off_shard_is_named() {
    let world = World::new();
    world.ok(&with("capture", &[]));
    let shard = format!("store/{}", shards(&world)[0]);
    let bytes = world.bytes(&shard);
    world.write(&shard, &bytes[..bytes.len() - 100]);
    world.fails(&with("train", &[]), &["shard-00000-00000.bin", "damaged"]);
}
