//! Chat completions: faults of every kind, several servers, bounds, waiting.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use specforge_remote::chat::Servers;
use specforge_remote::{Backoff, Error};
use specforge_testkit::{HttpRequest, HttpResponse, HttpServer};

use crate::{NEVER, backoff};

fn answer(text: &str) -> HttpResponse {
    let choice = json!({ "message": { "role": "assistant", "content": text }, "finish_reason": "stop" });
    HttpResponse::new(200, json!({ "choices": [choice], "usage": { "completion_tokens": 3 } }).to_string())
}

fn body(text: &str) -> Value {
    json!({ "model": "m", "messages": [{ "role": "user", "content": text }] })
}

fn servers(urls: &[&HttpServer], at_once: usize, backoff: Backoff) -> Servers {
    let urls: Vec<String> = urls.iter().map(|server| server.url().to_owned()).collect();
    Servers::new(&urls, Some("secret".to_owned()), at_once, backoff, Duration::from_millis(400))
}

/// A server that answers the n-th request, from 0, with what the closure says.
fn scripted(of: impl Fn(usize, &HttpRequest) -> HttpResponse + Send + Sync + 'static) -> HttpServer {
    let count = AtomicUsize::new(0);
    HttpServer::start(move |request| of(count.fetch_add(1, Ordering::Relaxed), request))
}

#[test]
fn a_completion_has_text_reasoning_and_reason() {
    let server = scripted(|_, request| {
        assert_eq!(request.header("authorization"), Some("Bearer secret"));
        assert_eq!(request.json()["messages"][0]["content"], "hi");
        let message = json!({ "content": "hello", "reasoning_content": "greet" });
        HttpResponse::new(
            200,
            json!({ "choices": [{ "message": message, "finish_reason": "length" }] }).to_string(),
        )
    });
    let got = servers(&[&server], 1, backoff(0)).complete(&body("hi"), &NEVER).unwrap();
    assert_eq!((got.content.as_str(), got.reasoning.as_deref()), ("hello", Some("greet")));
    assert_eq!((got.finish_reason.as_str(), got.tokens), ("length", None));
    assert_eq!(server.requests()[0].path, "/v1/chat/completions");
}

/// Every fault once, then the answer.
#[test]
fn transient_faults_are_tried_again() {
    let faults: Vec<(&str, HttpResponse)> = vec![
        ("429", HttpResponse::new(429, "slow down").with("Retry-After", "0")),
        ("500", HttpResponse::new(500, "oops")),
        ("503", HttpResponse::new(503, "")),
        ("cut off", HttpResponse { cut: Some(5), ..answer("never") }),
        ("nothing", HttpResponse { cut: Some(0), ..answer("never") }),
        ("slow", HttpResponse { delay: Duration::from_millis(800), ..answer("late") }),
        ("no JSON", HttpResponse::new(200, "<html>")),
        ("half JSON", HttpResponse::new(200, "{\"choices\": [")),
        ("no choices", HttpResponse::new(200, "{}")),
        ("no message", HttpResponse::new(200, "{\"choices\": [{}]}")),
    ];
    for (name, fault) in faults {
        let server = scripted(move |n, _| if n == 0 { fault.clone() } else { answer("fine") });
        let servers = servers(&[&server], 1, backoff(1));
        assert_eq!(servers.complete(&body("x"), &NEVER).map(|c| c.content).unwrap(), "fine", "{name}");
        assert_eq!(server.requests().len(), 2, "{name}");
    }
}

#[test]
fn what_stays_wrong_is_told_after_the_last_try() {
    let server =
        scripted(|_, _| HttpResponse::new(500, json!({ "error": { "message": "no memory" } }).to_string()));
    let error = servers(&[&server], 1, backoff(2)).complete(&body("x"), &NEVER).unwrap_err();
    assert!(error.is_transient() && error.to_string().ends_with("status 500: no memory"), "{error}");
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn refusals_are_not_tried_again() {
    for status in [400, 401, 404, 422] {
        let server =
            scripted(move |_, _| HttpResponse::new(status, json!({ "message": "too long" }).to_string()));
        let error = servers(&[&server], 1, backoff(5)).complete(&body("x"), &NEVER).unwrap_err();
        assert!(!error.is_transient() && error.to_string().contains("too long"), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
}

/// Never more at once than allowed, all of them used, and a dead server costs nothing but its own rest.
#[test]
fn requests_spread_over_servers_within_their_bounds() {
    let (busy, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let bounded = |busy: Arc<AtomicUsize>, most: Arc<AtomicUsize>| {
        scripted(move |_, _| {
            most.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(15));
            busy.fetch_sub(1, Ordering::SeqCst);
            answer("yes")
        })
    };
    let (a, b) = (bounded(busy.clone(), most.clone()), scripted(|_, _| answer("yes")));
    let dead = scripted(|_, _| HttpResponse::new(503, ""));
    let servers = servers(&[&a, &b, &dead], 2, backoff(8));
    assert_eq!(servers.capacity(), 6);
    let done = Mutex::new(0);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                for _ in 0..3 {
                    servers.complete(&body("x"), &NEVER).unwrap();
                    *done.lock().unwrap() += 1;
                }
            });
        }
    });
    assert_eq!(*done.lock().unwrap(), 36);
    assert_eq!(most.load(Ordering::SeqCst), 2, "at once on one server");
    assert_eq!(a.requests().len() + b.requests().len(), 36);
    assert!(!a.requests().is_empty() && !b.requests().is_empty());
}

#[test]
fn a_server_that_asks_for_time_gets_it() {
    let server = scripted(|n, _| match n {
        0 => HttpResponse::new(429, "").with("Retry-After", "1"),
        _ => answer("fine"),
    });
    let patient = Backoff { most: Duration::from_secs(5), ..backoff(1) };
    let started = Instant::now();
    servers(&[&server], 1, patient).complete(&body("x"), &NEVER).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(950), "{:?}", started.elapsed());
}

#[test]
fn waiting_ends_when_it_is_to_stop() {
    let server = scripted(|_, _| HttpResponse::new(429, "").with("Retry-After", "60"));
    let patient = Backoff { retries: 9, first: Duration::from_mins(1), most: Duration::from_mins(1) };
    let (servers, stop) = (servers(&[&server], 1, patient), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| servers.complete(&body("x"), &stop));
        std::thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(waiting.join().unwrap(), Err(Error::Stopped)));
    });
}

#[test]
fn models_are_those_that_all_servers_have() {
    let listing = |names: &'static [&str]| {
        scripted(move |_, request| {
            assert_eq!(request.path, "/v1/models");
            let list: Vec<_> = names.iter().map(|name| json!({ "id": name })).collect();
            HttpResponse::new(200, json!({ "data": list }).to_string())
        })
    };
    let (a, b) = (listing(&["x", "y"]), listing(&["y", "z"]));
    assert_eq!(servers(&[&a, &b], 1, backoff(0)).models().unwrap(), ["y"]);
    let nobody = Servers::new(&["127.0.0.1:1".to_owned()], None, 1, backoff(0), Duration::from_secs(1));
    let error = nobody.models().unwrap_err().to_string();
    assert!(error.contains("nothing listens at 127.0.0.1:1") && error.contains("running"), "{error}");
}
