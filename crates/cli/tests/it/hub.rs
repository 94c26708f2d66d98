//! Names of the hub in place of folders, against a hub that the test starts.

use serde_json::Value;
use specforge_testkit::{COMMIT, HttpResponse, SmallTarget, TestHub};

use crate::world::{Ran, World};

/// A hub that has the small target as `small/target`, and a world whose commands use it.
struct Hubs {
    world: World,
    hub: TestHub,
}

impl Hubs {
    fn new(fault: specforge_testkit::Fault) -> Self {
        let world = World::new();
        SmallTarget::llama(1).write(&world.path("source"));
        let file = |name: &'static str| (name, world.bytes(&format!("source/{name}")));
        let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
        let hub = TestHub::start("small/target", &names.map(file), fault);
        fs_err::remove_dir_all(world.path("source")).unwrap();
        fs_err::remove_dir_all(world.path("target")).unwrap();
        Self { world, hub }
    }

    fn run(&self, args: &[&str], variables: &[(&str, &str)]) -> Ran {
        let mut command = self.world.specforge(args);
        command.env("HF_ENDPOINT", self.hub.url()).env("HF_HOME", self.world.path("hf"));
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.envs(variables.iter().copied());
        Ran::of(&mut command)
    }

    #[track_caller]
    fn ok(&self, args: &[&str], variables: &[(&str, &str)]) -> Ran {
        let ran = self.run(args, variables);
        assert_eq!(ran.code, Some(0), "{args:?}: {}{}", ran.stdout, ran.stderr);
        ran
    }
}

const TARGET: [&str; 2] = ["--set", "target.path=small/target"];

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "R"], &TARGET[..], more].concat()
}

#[test]
fn a_run_on_a_target_of_the_hub_is_trained_served_and_pushed() {
    let hubs = Hubs::new(Box::new(|_| None));
    let ran = hubs.ok(&train(&[]), &[]);
    assert!(ran.stderr.contains(&format!("small/target@{COMMIT}")), "{}", ran.stderr);
    let requests = hubs.hub.requests().len();
    // From the cache, without the network.
    let offline = [("HF_HUB_OFFLINE", "1")];
    let eval = [&["eval", "R", "--json"], &TARGET[..]].concat();
    let eval: Value = serde_json::from_str(&hubs.ok(&eval, &offline).stdout).unwrap();
    assert_eq!(eval["lossless"], true);
    let info = hubs.ok(&["info", "small/target"], &offline);
    assert!(info.stdout.contains("LlamaForCausalLM"), "{}", info.stdout);
    let check = ["export", "--check", "runs/run/export", "--target", "small/target"];
    assert!(hubs.ok(&check, &offline).stdout.contains("PASS"));
    assert_eq!(hubs.hub.requests().len(), requests);
    // Up again.
    let push = [&["export", "R", "--push", "me/draft", "--private", "--json"], &TARGET[..]].concat();
    hubs.run(&push, &[]).refused(&["me/draft", "needs HF_TOKEN"]);
    let pushed: Value = serde_json::from_str(&hubs.ok(&push, &[("HF_TOKEN", "hf_w")]).stdout).unwrap();
    assert_eq!(pushed["url"], format!("{}/me/draft", hubs.hub.url()));
    let uploads = hubs.hub.uploads();
    assert_eq!(uploads.created.unwrap()["private"], true);
    assert_eq!(
        uploads.stored.values().next().unwrap(),
        &hubs.world.bytes("runs/run/export/model.safetensors")
    );
    let paths: Vec<_> = uploads.commit.iter().skip(1).map(|line| line["value"]["path"].clone()).collect();
    assert_eq!(paths, ["README.md", "config.json", "model.safetensors"]);
    let card = decoded(uploads.commit[1]["value"]["content"].as_str().unwrap());
    let length = hubs.world.json("runs/run/summary.json")["acceptance_length"].as_f64().unwrap();
    for part in [
        "base_model: small/target\n",
        "| conversations | conversations.jsonl: 60 rows",
        &format!("| acceptance length | {length:.2} (3 draft steps"),
        "--model small/target --speculative-algorithm EAGLE3",
        "--speculative-draft-model-path me/draft --speculative-num-steps 3",
        "[method.eagle3]",
        "# --set target.path=small/target",
    ] {
        assert!(card.contains(part), "{part:?} is not in: {card}");
    }
}

/// Base64, for looking at what was sent.
fn decoded(text: &str) -> String {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let (mut bits, mut count, mut out) = (0u32, 0, Vec::new());
    for byte in text.bytes().filter(|&byte| byte != b'=') {
        bits = bits << 6 | u32::from(value(byte));
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn a_folder_of_that_name_wins() {
    let hubs = Hubs::new(Box::new(|_| None));
    SmallTarget::llama(2).write(&hubs.world.path("small/target"));
    hubs.ok(&[&["prepare", "R"], &TARGET[..]].concat(), &[]);
    assert!(hubs.hub.requests().is_empty());
}

#[test]
fn conversations_may_be_a_dataset_of_the_hub() {
    let world = World::new();
    let rows = world.bytes("conversations.jsonl");
    let files = [("README.md", vec![]), ("data/train.jsonl", rows), ("data/test.jsonl", b"{}\n".to_vec())];
    let hub = TestHub::start("datasets/small/talk", &files, Box::new(|_| None));
    let hubs = Hubs { world, hub };
    let talk = ["--set", "data.conversations=[\"datasets/small/talk\"]", "--json"];
    let ran = hubs.ok(&[&["prepare", "R"], &talk[..]].concat(), &[]);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["rows_kept"], 60, "{report}");
    assert!(hubs.world.has(&format!("hf/hub/datasets--small--talk/snapshots/{COMMIT}/data/train.jsonl")));
    // A part of it: the other one was never downloaded, and is not used where it was.
    let part = ["--set", "data.conversations=[\"datasets/small/talk/data/te*.jsonl\"]"];
    hubs.run(&[&["prepare", "R"], &part[..]].concat(), &[]).refused(&["data/test.jsonl", "1"]);
    let lacks = ["--set", "data.conversations=[\"datasets/small/talk/other\"]"];
    hubs.run(&[&["prepare", "R"], &lacks[..]].concat(), &[])
        .refused(&["small/talk/other", "of this name or folder"]);
    let none = ["prepare", "R", "--set", "data.conversations=[\"datasets/small/none\"]"];
    hubs.run(&none, &[]).refused(&["datasets/small/none", "is the name right?"]);
}

#[test]
fn what_the_hub_refuses_says_what_to_do() {
    let gated = Hubs::new(Box::new(|_| Some(HttpResponse::new(403, "").with("X-Error-Code", "GatedRepo"))));
    gated.run(&train(&[]), &[]).refused(&["small/target", "accept the terms at", "HF_TOKEN"]);
    assert!(!gated.world.has("runs/run/checkpoints"));
    let hubs = Hubs::new(Box::new(|_| None));
    let missing = ["info", "small/other"];
    hubs.run(&missing, &[]).refused(&["small/other", "no such folder", "is the name right?"]);
    hubs.run(&["info", "small/target@v9"], &[]).refused(&["no revision v9"]);
    let offline = [("HF_HUB_OFFLINE", "true")];
    hubs.run(&missing, &offline).refused(&["small/other is not in the cache", "HF_HUB_OFFLINE"]);
    let nowhere = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    hubs.run(&missing, &nowhere).refused(&["no such folder", "nothing listens at 127.0.0.1:1"]);
    hubs.run(&["export", "R", "--push", "draft"], &[]).refused(&["--push draft", "owner/name"]);
}
