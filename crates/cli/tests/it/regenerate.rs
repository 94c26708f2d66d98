//! `specforge regenerate`: by servers that fail in every way, resumed, and by the target in process.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use specforge_testkit::{HttpRequest, HttpResponse, HttpServer};

use crate::kill::Running;
use crate::world::{World, names};

/// Conversations of two questions, with answers that are nobody's, in both spellings.
fn questions(count: usize) -> String {
    let row = |i: usize| match i % 2 {
        0 => json!({ "id": i, "messages": [
            { "role": "system", "content": "be brief" }, { "role": "user", "content": format!("first {i}") },
            { "role": "assistant", "content": "old" }, { "role": "user", "content": format!("second {i}") },
            { "role": "assistant", "content": "old" } ] }),
        _ => json!({ "id": i, "conversations": [
            { "from": "human", "value": format!("first {i}") }, { "from": "gpt", "value": "old" },
            { "from": "human", "value": format!("second {i}") } ] }),
    };
    (0..count).map(|i| format!("{}\n", row(i))).collect::<Vec<_>>().concat()
}

/// What the test's model answers: the last question and how many messages came before.
fn reply(request: &HttpRequest) -> String {
    let messages = request.json()["messages"].as_array().unwrap().clone();
    let last = messages.last().unwrap();
    assert_eq!(last["role"], "user", "{messages:?}");
    for answer in messages.iter().filter(|m| m["role"] == "assistant") {
        assert!(answer["content"].as_str().unwrap().starts_with("re: "), "an old answer: {messages:?}");
    }
    format!("re: {} after {}", last["content"].as_str().unwrap(), messages.len() - 1)
}

pub(crate) fn answer(text: &str) -> HttpResponse {
    let message = json!({ "role": "assistant", "content": text, "reasoning_content": "because" });
    let choice = json!({ "message": message, "finish_reason": "stop" });
    HttpResponse::new(200, json!({ "choices": [choice], "usage": { "completion_tokens": 4 } }).to_string())
}

/// A server of the model `m` that answers as [`reply`] unless the closure has something else for the request.
pub(crate) fn server(
    other: impl Fn(&HttpRequest) -> Option<HttpResponse> + Send + Sync + 'static,
) -> HttpServer {
    HttpServer::start(move |request| {
        if request.path == "/v1/models" {
            return HttpResponse::new(200, json!({ "data": [{ "id": "m" }] }).to_string());
        }
        other(request).unwrap_or_else(|| answer(&reply(request)))
    })
}

fn world(count: usize) -> World {
    let world = World::new();
    world.write("questions.jsonl", questions(count));
    world
}

pub(crate) fn args<'a>(url: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let all = ["regenerate", "--input", "questions.jsonl", "--output", "out.jsonl", "--server", url];
    [&all[..], more].concat()
}

pub(crate) fn rows(world: &World, file: &str) -> Vec<Value> {
    world.text(file).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn chats(server: &HttpServer) -> usize {
    server.requests().iter().filter(|request| request.path.ends_with("completions")).count()
}

#[test]
fn every_turn_is_answered_on_top_of_the_new_answers() {
    let (world, server) = (world(4), server(|_| None));
    let counts = world.ok_json(&args(server.url(), &["--json", "--reasoning", "keep", "--top-p", "0.9"]));
    assert_eq!(
        counts,
        json!({ "rows": 4, "done": 4, "skipped": 0, "failed": 0, "resumed": 0, "answers": 8, "tokens": 32, "kept_calls": 0 })
    );
    let rows = rows(&world, "out.jsonl");
    assert_eq!(rows.iter().map(|row| row["id"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let say = |role: &str, content: &str| json!({ "role": role, "content": content });
    let re =
        |content: &str| json!({ "role": "assistant", "content": content, "reasoning_content": "because" });
    assert_eq!(
        rows[0]["messages"],
        json!([
            say("system", "be brief"),
            say("user", "first 0"),
            re("re: first 0 after 1"),
            say("user", "second 0"),
            re("re: second 0 after 3")
        ])
    );
    assert_eq!(
        rows[1]["conversations"],
        json!([
            say("user", "first 1"),
            re("re: first 1 after 0"),
            say("user", "second 1"),
            re("re: second 1 after 2")
        ])
    );
    assert_eq!(rows[0]["regenerated"], json!({ "model": "m", "tokens": 8 }));
    let requests = server.requests();
    let body = requests.iter().find(|r| r.path.ends_with("completions")).unwrap().json();
    assert_eq!(
        (&body["temperature"], &body["top_p"], &body["max_tokens"]),
        (&json!(0.7), &json!(0.9), &json!(4096))
    );
    assert!(body.get("repetition_penalty").is_none() && body.get("chat_template_kwargs").is_none());
    assert_eq!(names(&world.path("")).iter().filter(|name| name.starts_with("out")).count(), 1);
    world.ok(&["prepare", "R", "--set", "data.conversations=[\"out.jsonl\"]"]);
}

#[test]
fn reasoning_is_dropped_or_disabled() {
    let (world, server) = (world(1), server(|_| None));
    world.ok(&args(server.url(), &[]));
    assert!(!world.text("out.jsonl").contains("because"));
    world.ok(&args(server.url(), &["--overwrite", "--reasoning", "disable", "--repetition-penalty", "1.1"]));
    let body = server.requests().last().unwrap().json();
    assert_eq!(body["chat_template_kwargs"], json!({ "enable_thinking": false }));
    assert_eq!((&body["repetition_penalty"], body.get("presence_penalty")), (&json!(1.1), None));
}

/// Every request fails once, in one way or another, on two servers: the output is that of servers that never fail.
#[test]
fn faults_change_nothing() {
    let (world, good) = (world(12), server(|_| None));
    world.ok(&args(good.url(), &[]));
    let expected = world.text("out.jsonl");
    let faulty = || {
        let seen = Mutex::new(BTreeMap::<Vec<u8>, usize>::new());
        server(move |request| {
            let mut seen = seen.lock().unwrap();
            let kind = seen.len();
            let count = seen.entry(request.body.clone()).or_insert(0);
            *count += 1;
            if *count > 1 {
                return None;
            }
            Some(match kind % 7 {
                0 => HttpResponse::new(429, "").with("Retry-After", "0"),
                1 => HttpResponse::new(500, "oops"),
                2 => HttpResponse { cut: Some(9), ..answer("never") },
                3 => HttpResponse::new(200, "{\"choices\""),
                4 => HttpResponse { delay: Duration::from_millis(1500), ..answer("late") },
                5 => HttpResponse::new(503, ""),
                _ => HttpResponse { cut: Some(0), ..answer("never") },
            })
        })
    };
    let (a, b) = (faulty(), faulty());
    let more = [
        "--server",
        b.url(),
        "--timeout",
        "1",
        "--retries",
        "6",
        "--retry-wait",
        "0.02",
        "--overwrite",
        "--concurrency",
        "8",
    ];
    world.ok(&args(a.url(), &more));
    assert_eq!(world.text("out.jsonl"), expected);
    assert!(chats(&a) > 0 && chats(&b) > 0);
}

#[test]
fn what_cannot_be_used_and_what_failed_add_up_to_the_input() {
    let (world, fails) = (world(6), std::sync::Arc::new(Mutex::new(true)));
    let call = json!([{ "function": { "name": "f", "arguments": "{}" } }]);
    let tools = json!({ "messages": [{ "role": "user", "content": "x" },
        { "role": "assistant", "content": "", "tool_calls": call }] });
    let text = world.text("questions.jsonl") + &format!("{tools}\nnot json\n{{\"messages\": []}}\n");
    world.write("questions.jsonl", text);
    let failing = fails.clone();
    let server = server(move |request| {
        let messages = request.json()["messages"].to_string();
        if messages.contains("first 2") && *failing.lock().unwrap() {
            return Some(HttpResponse::new(400, json!({ "message": "the context is too long" }).to_string()));
        }
        if messages.contains("first 3") {
            let cut = json!({ "message": { "content": "to be" }, "finish_reason": "length" });
            return Some(HttpResponse::new(200, json!({ "choices": [cut] }).to_string()));
        }
        messages.contains("first 4").then(|| answer("  "))
    });
    let ran = world.run(&args(server.url(), &[]));
    ran.refused(&["1 of 9 conversations failed", "out.errors.jsonl", "--resume"]);
    let ids = |file: &str| rows(&world, file).iter().map(|row| row["id"].as_u64()).collect::<Vec<_>>();
    assert_eq!(ids("out.jsonl"), [Some(0), Some(1), Some(5)]);
    let errors = rows(&world, "out.errors.jsonl");
    assert_eq!((errors.len(), &errors[0]["row"]["id"], &errors[0]["line"]), (1, &json!(2), &json!(3)));
    assert!(errors[0]["why"].as_str().unwrap().contains("context is too long"), "{errors:?}");
    let why: Vec<String> = rows(&world, "out.skipped.jsonl").iter().map(|r| r["why"].to_string()).collect();
    let expected = ["was cut off", "is empty", "every answer calls a tool", "not valid JSON", "no user turn"];
    assert_eq!(why.len(), expected.len(), "{why:?}");
    assert!(why.iter().zip(expected).all(|(why, part)| why.contains(part)), "{why:?}");
    // The failure alone is tried again.
    let before = chats(&server);
    *fails.lock().unwrap() = false;
    let counts = world.ok_json(&args(server.url(), &["--resume", "--json"]));
    assert_eq!((&counts["done"], &counts["resumed"], &counts["skipped"]), (&json!(4), &json!(3), &json!(5)));
    assert_eq!(chats(&server), before + 2);
    assert_eq!(ids("out.jsonl"), [Some(0), Some(1), Some(2), Some(5)]);
    assert!(!world.has("out.errors.jsonl") && !world.has("out.jsonl.journal"));
    let again = world.ok(&args(server.url(), &["--resume"]));
    assert!(again.stderr.contains("complete already"), "{}", again.stderr);
}

/// Killed at any time; equal conversations are told apart by how many there are.
#[test]
fn a_killed_run_goes_on_conversation_by_conversation() {
    let world = world(20);
    world.write("questions.jsonl", questions(20) + &questions(3));
    let quick = server(|_| None);
    world.ok(&args(quick.url(), &[]));
    let expected = world.text("out.jsonl");
    assert_eq!(expected.lines().count(), 23);
    fs_err::remove_file(world.path("out.jsonl")).unwrap();
    let slow =
        server(|request| Some(HttpResponse { delay: Duration::from_millis(25), ..answer(&reply(request)) }));
    let lines = |world: &World| world.text("out.jsonl.journal").lines().count();
    let mut killed = 0;
    for _ in 0..3 {
        let before = if world.has("out.jsonl.journal") { lines(&world) } else { 0 };
        let mut running = Running::start(&world, &args(slow.url(), &["--resume", "--concurrency", "2"]));
        running.wait_until(|| world.has("out.jsonl.journal") && lines(&world) > before + 3);
        killed += usize::from(running.kill());
    }
    assert!(killed >= 2 && !world.has("out.jsonl"));
    // A line that was being written when the power went.
    let mut journal = world.bytes("out.jsonl.journal");
    journal.extend(b"{\"key\": \"half");
    world.write("out.jsonl.journal", journal);
    world.ok(&args(slow.url(), &["--resume"]));
    assert_eq!(world.text("out.jsonl"), expected);
    // Every conversation has two answers; at most two were under way at each kill.
    assert!(chats(&slow) <= 2 * 23 + 4 * killed, "{} requests", chats(&slow));
}

#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let world = world(40);
    let slow =
        server(|request| Some(HttpResponse { delay: Duration::from_millis(40), ..answer(&reply(request)) }));
    let mut running = Running::start(&world, &args(slow.url(), &["--concurrency", "2"]));
    running
        .wait_until(|| world.has("out.jsonl.journal") && world.text("out.jsonl.journal").lines().count() > 2);
    running.signal("INT").refused(&["stopped with", "--resume"]);
    assert!(!world.has("out.jsonl"));
    world.fails(&args(slow.url(), &[]), &["out.jsonl.journal", "--resume", "--overwrite"]);
    let other = ["--resume", "--temperature", "0.1", "--max-tokens", "9"];
    world.fails(
        &args(slow.url(), &other),
        &["same run", "temperature: was 0.7, is 0.1", "max-tokens: was 4096, is 9"],
    );
    world.ok(&args(slow.url(), &["--resume"]));
    world.fails(&args(slow.url(), &[]), &["out.jsonl", "--resume", "--overwrite"]);
}

#[test]
fn what_nobody_would_be_answered_for_ends_at_once() {
    let world = world(30);
    let closed =
        server(|_| Some(HttpResponse::new(401, json!({ "error": { "message": "wrong key" } }).to_string())));
    world.fails(
        &args(closed.url(), &["--concurrency", "1"]),
        &["no conversation would be answered", "wrong key"],
    );
    assert!(chats(&closed) < 5);
    world.fails(&args(closed.url(), &["--overwrite", "--model", "other"]), &["--model other", "has m"]);
    world.fails(&args("http://127.0.0.1:1", &["--overwrite"]), &["nothing listens at 127.0.0.1:1"]);
    world.fails(&args(closed.url(), &["--overwrite", "--input", "nowhere.jsonl"]), &["nowhere.jsonl"]);
    world.fails(&["regenerate", "--output", "x"], &["required"]);
}

/// The target in process: its own greedy text, the same however many run at once, and one that prepares.
#[test]
fn the_target_answers_in_process() {
    let world = World::new();
    let by = |name: &str, more: &[&str]| {
        let all = [
            "regenerate",
            "R",
            "--output",
            name,
            "--max-tokens",
            "12",
            "--cut-off",
            "keep",
            "--max-rows",
            "8",
        ];
        world.ok(&[&all[..], more].concat());
        rows(&world, name)
    };
    let greedy = by("greedy.jsonl", &["--temperature", "0", "--concurrency", "1"]);
    assert_eq!(greedy, by("again.jsonl", &["--temperature", "0", "--concurrency", "3"]));
    assert_eq!(greedy.len(), 8);
    let sampled = by("sampled.jsonl", &["--seed", "7"]);
    assert_eq!(sampled, by("sampled2.jsonl", &["--seed", "7", "--concurrency", "2"]));
    assert_ne!(sampled, greedy);
    for row in &greedy {
        // The target goes through its letters in order.
        let said = row["messages"][1]["content"].as_str().unwrap();
        assert!(said.len() >= 10, "{row}");
    }
    world.ok(&["prepare", "R", "--set", "data.conversations=[\"greedy.jsonl\"]"]);
}
