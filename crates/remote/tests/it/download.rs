//! Repositories into the cache: resumed, verified, refused.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use specforge_remote::hub::{Hub, HubSettings, RepoId, Watch};
use specforge_testkit::{COMMIT, Fault, HttpResponse, TestHub, tempdir};

use crate::{NEVER, backoff, hub, settings, watch};

const REPO: &str = "models--small--target";

fn id() -> RepoId {
    RepoId::parse("small/target").unwrap()
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn start(fault: Fault) -> TestHub {
    let files = [
        ("README.md", b"# x".to_vec()),
        ("config.json", b"{\"a\": 1}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
        ("pytorch_model.bin", b"other".to_vec()),
        ("original/model.safetensors", b"other".to_vec()),
    ];
    TestHub::start("small/target", &files, fault)
}

fn good() -> TestHub {
    start(Box::new(|_| None))
}

fn expect_whole(folder: &Path) {
    assert_eq!(fs_err::read(folder.join("config.json")).unwrap(), b"{\"a\": 1}");
    assert_eq!(fs_err::read(folder.join("model.safetensors")).unwrap(), weights());
    let names: Vec<_> = fs_err::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn a_repository_comes_into_the_cache_that_others_share() {
    let (server, cache) = (good(), tempdir());
    let seen = Mutex::new(Vec::new());
    let progress = |done, total| seen.lock().unwrap().push((done, total));
    let folder =
        hub(server.url(), cache.path()).folder(&id(), Watch { progress: &progress, stop: &NEVER }).unwrap();
    assert_eq!(folder, cache.path().join(REPO).join("snapshots").join(COMMIT));
    expect_whole(&folder);
    assert_eq!(fs_err::read_to_string(cache.path().join(REPO).join("refs/main")).unwrap(), COMMIT);
    let link = fs_err::read_link(folder.join("config.json")).unwrap();
    assert!(link.starts_with("../../blobs"), "{}", link.display());
    assert_eq!(Hub::of_snapshot(&folder).unwrap().to_string(), format!("small/target@{COMMIT}"));
    let total = 300_000 + 8 + 2;
    assert_eq!(seen.lock().unwrap().iter().max(), Some(&(total, total)));
    // Once more: the listing alone is asked for.
    let before = server.requests().len();
    assert_eq!(hub(server.url(), cache.path()).folder(&id(), watch()).unwrap(), folder);
    assert_eq!(server.requests().len(), before + 1);
    // By its commit.
    let pinned = RepoId::parse(&format!("small/target@{COMMIT}")).unwrap();
    assert_eq!(hub(server.url(), cache.path()).folder(&pinned, watch()).unwrap(), folder);
}

#[test]
fn the_token_goes_to_the_hub() {
    let (server, cache) = (good(), tempdir());
    let with_token = HubSettings { token: Some("hf_x".to_owned()), ..settings(server.url(), cache.path()) };
    Hub::new(with_token).folder(&id(), watch()).unwrap();
    assert!(server.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_x")));
}

#[test]
fn offline_uses_the_cache_alone() {
    let (server, cache) = (good(), tempdir());
    let offline = || Hub::new(HubSettings { offline: true, ..settings(server.url(), cache.path()) });
    let error = offline().folder(&id(), watch()).unwrap_err().to_string();
    assert!(
        error.contains("small/target is not in the cache") && error.contains("HF_HUB_OFFLINE"),
        "{error}"
    );
    assert!(server.requests().is_empty());
    let folder = hub(server.url(), cache.path()).folder(&id(), watch()).unwrap();
    let before = server.requests().len();
    assert_eq!(offline().folder(&id(), watch()).unwrap(), folder);
    assert_eq!(server.requests().len(), before);
    // No network at all is as good.
    let nowhere =
        Hub::new(HubSettings { backoff: backoff(0), ..settings("http://127.0.0.1:1", cache.path()) });
    assert_eq!(nowhere.folder(&id(), watch()).unwrap(), folder);
    let other = RepoId::parse("small/other").unwrap();
    assert!(nowhere.folder(&other, watch()).unwrap_err().to_string().contains("nothing listens"));
}

/// Cut off again and again: each try goes on where the last one ended, and none brings a byte twice.
#[test]
fn a_download_that_is_cut_off_goes_on() {
    let tries = AtomicUsize::new(0);
    let server = start(Box::new(move |request| {
        if !request.path.starts_with("/storage/") {
            return None;
        }
        let start: usize = request
            .header("range")
            .map_or(0, |range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        let rest = weights()[start..].to_vec();
        let whole = tries.fetch_add(1, Ordering::Relaxed) == 5;
        let status = if start == 0 { 200 } else { 206 };
        let cut = (!whole).then_some(rest.len().min(50_000));
        Some(HttpResponse { cut, ..HttpResponse::new(status, rest) })
    }));
    let cache = tempdir();
    let folder = hub(server.url(), cache.path()).folder(&id(), watch()).unwrap();
    expect_whole(&folder);
    let resumed = server
        .requests()
        .iter()
        .filter(|r| r.path.starts_with("/storage/") && r.header("range").is_some())
        .count();
    assert_eq!(resumed, 5);
}

#[test]
fn what_an_interrupted_run_left_is_used() {
    let cut = AtomicBool::new(true);
    let fault: Fault = Box::new(move |request| {
        let first = request.path.starts_with("/storage/") && cut.swap(false, Ordering::Relaxed);
        first.then(|| HttpResponse { cut: Some(100_000), ..HttpResponse::new(200, weights()) })
    });
    let (server, cache) = (start(fault), tempdir());
    let once = Hub::new(HubSettings { backoff: backoff(0), ..settings(server.url(), cache.path()) });
    let error = once.folder(&id(), watch()).unwrap_err().to_string();
    assert!(error.contains("/storage/") || error.contains("model.safetensors"), "{error}");
    assert!(!cache.path().join(REPO).join("refs/main").exists());
    expect_whole(&once.folder(&id(), watch()).unwrap());
    let ranges: Vec<_> =
        server.requests().iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
    assert!(ranges.iter().any(|range| range == "bytes=100000-"), "{ranges:?}");
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let first = AtomicBool::new(true);
    let server = start(Box::new(move |request| {
        if !request.path.starts_with("/storage/") {
            return None;
        }
        let cut = first.swap(false, Ordering::Relaxed).then_some(1000);
        Some(HttpResponse { cut, ..HttpResponse::new(200, weights()) })
    }));
    let cache = tempdir();
    expect_whole(&hub(server.url(), cache.path()).folder(&id(), watch()).unwrap());
}

#[test]
fn wrong_content_is_found_and_thrown_away() {
    let server = start(Box::new(|request| {
        let mut wrong = weights();
        wrong[1234] ^= 1;
        request.path.starts_with("/storage/").then(|| HttpResponse::new(200, wrong))
    }));
    let cache = tempdir();
    let error = hub(server.url(), cache.path()).folder(&id(), watch()).unwrap_err().to_string();
    assert!(error.contains("expected hash") && error.contains("run the same command again"), "{error}");
    let blobs: Vec<_> = fs_err::read_dir(cache.path().join(REPO).join("blobs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".incomplete"))
        .collect();
    assert!(blobs.is_empty(), "{blobs:?}");
    // Less than announced.
    let server = start(Box::new(|request| {
        let all = weights();
        let answer = if request.header("range").is_some() {
            HttpResponse::new(416, "")
        } else {
            HttpResponse::new(200, &all[..70_000])
        };
        request.path.starts_with("/storage/").then_some(answer)
    }));
    let cache = tempdir();
    let error = hub(server.url(), cache.path()).folder(&id(), watch()).unwrap_err().to_string();
    assert!(error.contains("expected 300000 bytes, got 70000 bytes"), "{error}");
    // More than announced.
    let server = start(Box::new(|request| {
        let longer = [weights(), vec![0; 10]].concat();
        request.path.starts_with("/storage/").then(|| HttpResponse::new(200, longer))
    }));
    let cache = tempdir();
    let error = hub(server.url(), cache.path()).folder(&id(), watch()).unwrap_err().to_string();
    assert!(error.contains("more than the 300000 bytes"), "{error}");
}

#[test]
fn every_refusal_says_what_to_do() {
    let refused = |fault: Fault, token: Option<&str>| {
        let (server, cache) = (start(fault), tempdir());
        let token = token.map(str::to_owned);
        let hub =
            Hub::new(HubSettings { token, backoff: backoff(1), ..settings(server.url(), cache.path()) });
        hub.folder(&id(), watch()).unwrap_err().to_string()
    };
    let always = |status: u16, code: &'static str| -> Fault {
        Box::new(move |_| Some(HttpResponse::new(status, "{\"error\": \"no\"}").with("X-Error-Code", code)))
    };
    for (status, code, token, expected) in [
        (401, "RepoNotFound", None, &["small/target", "is the name right?", "set HF_TOKEN"][..]),
        (404, "RepoNotFound", Some("t"), &["is the name right?", "the token in HF_TOKEN"]),
        (403, "GatedRepo", None, &["accept the terms at", "/small/target", "set HF_TOKEN"]),
        (401, "GatedRepo", Some("t"), &["accept the terms at", "the token in HF_TOKEN"]),
        (404, "RevisionNotFound", None, &["no revision main", "/commits"]),
        (403, "", None, &["status 403", "set HF_TOKEN"]),
        (500, "", None, &["status 500: no"]),
    ] {
        let message = refused(always(status, code), token);
        assert!(expected.iter().all(|part| message.contains(part)), "{status} {code}: {message}");
    }
    // A file that is listed and not there.
    let gone = refused(
        Box::new(|request| {
            request
                .path
                .ends_with("tokenizer.json")
                .then(|| HttpResponse::new(404, "Entry not found").with("X-Error-Code", "EntryNotFound"))
        }),
        None,
    );
    assert!(gone.contains("tokenizer.json") || gone.contains("lacks a file"), "{gone}");
    let malformed = refused(Box::new(|_| Some(HttpResponse::new(200, "<html>"))), None);
    assert!(malformed.contains("not JSON"), "{malformed}");
    let cache = tempdir();
    let empty = TestHub::start("small/target", &[("README.md", vec![])], Box::new(|_| None));
    let error = hub(empty.url(), cache.path()).folder(&id(), watch()).unwrap_err().to_string();
    assert!(error.contains("no config.json"), "{error}");
}

#[test]
fn a_download_stops_when_told_and_leaves_what_it_has() {
    let server = start(Box::new(|request| {
        request
            .path
            .starts_with("/storage/")
            .then(|| HttpResponse { delay: Duration::from_millis(100), ..HttpResponse::new(200, weights()) })
    }));
    let (cache, stop) = (tempdir(), AtomicBool::new(false));
    let hub = hub(server.url(), cache.path());
    let progress = |done, _| stop.store(done > 5, Ordering::Relaxed);
    let error = hub.folder(&id(), Watch { progress: &progress, stop: &stop }).unwrap_err();
    assert_eq!(error.to_string(), "stopped");
    expect_whole(&hub.folder(&id(), watch()).unwrap());
}
