//! A `prepare` that is killed (SIGKILL) goes on where it was.

use serde_json::Value;

use crate::kill::Running;
use crate::world::{World, conversations, names};

/// The folder of unfinished sets, and what it says is done.
fn progress(world: &World) -> Option<Value> {
    let cache = fs_err::read_dir(world.path("runs/cache")).ok()?;
    let mut paths = cache.map(|entry| entry.unwrap().path());
    let work = paths.find(|path| path.extension().is_some_and(|end| end == "work"))?;
    serde_json::from_slice(&fs_err::read(work.join("progress.json")).ok()?).ok()
}

fn set(world: &World, cache: &str) -> Vec<(String, Vec<u8>)> {
    let folder = world.path(cache);
    let [key] = &names(&folder)[..] else { panic!("one set alone in {cache}: {:?}", names(&folder)) };
    let files = names(&folder.join(key)).into_iter();
    files.map(|name| (name.clone(), fs_err::read(folder.join(key).join(name)).unwrap())).collect()
}

#[test]
fn a_killed_prepare_goes_on_to_the_same_bits() {
    let world = World::new();
    world.write("conversations.jsonl", conversations(30_000, 5));
    world.ok(&["prepare", "R", "--set", "data.cache-dir=whole"]);
    let mut kills = 0;
    // Killed until it gets to the end.
    loop {
        let before = progress(&world).map_or(0, |progress| progress["rows"].as_u64().unwrap());
        let mut running = Running::start(&world, &["prepare", "R"]);
        running.wait_until(|| progress(&world).is_some_and(|now| now["rows"].as_u64() > Some(before)));
        if !running.kill() {
            break;
        }
        kills += 1;
        if kills == 3 {
            world.ok(&["prepare", "R"]);
            break;
        }
    }
    assert!(kills > 0, "it ended before it could be killed");
    assert!(set(&world, "runs/cache") == set(&world, "whole"), "after {kills} kills");
}

/// A folder with splits, a file with half its rows, and rows that are in both: what a recipe says of each is done.
#[test]
fn sources_have_splits_weights_and_no_row_twice() {
    let world = World::new();
    let all = world.text("conversations.jsonl");
    let lines: Vec<&str> = all.split_inclusive('\n').collect();
    fs_err::create_dir_all(world.path("set/main")).unwrap();
    world.write("set/main/train-00000.jsonl", lines[..20].concat());
    world.write("set/main/test-00000.jsonl", "{}\n");
    world.write("more.jsonl", lines[10..].concat());
    let prepare = |sources: &str, deduplicate: bool| {
        let sets = [format!("data.conversations={sources}"), format!("data.deduplicate={deduplicate}")];
        let counts = world.ok_json(&["prepare", "R", "--json", "--set", &sets[0], "--set", &sets[1]]);
        counts["rows_kept"].as_u64().unwrap() as usize
    };
    let (both, n) = ("[\"set\", \"more.jsonl\"]", lines.len());
    assert_eq!((prepare(both, false), prepare(both, true)), (n + 10, n));
    assert_eq!(prepare("[\"set\"]", true), 20);
    assert_eq!(prepare("[{path = \"set\", weight = 3}]", false), 60);
    let half = prepare("[{path = \"more.jsonl\", weight = 0.5}]", false);
    assert!(half > 5 && half < n - 15, "{half} of {}", n - 10);
}
