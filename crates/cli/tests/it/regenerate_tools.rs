//! `specforge regenerate` where the model calls tools.

use serde_json::{Value, json};
use specforge_testkit::{HttpRequest, HttpResponse};

use crate::regenerate::{answer, args, rows, server};
use crate::world::World;

/// A question, two calls at once, their results, an answer; another question, whose result has no answer yet.
fn conversation() -> Value {
    let call = |id: &str, city: &str| {
        let function = json!({ "name": "weather", "arguments": json!({ "city": city }).to_string() });
        json!({ "id": id, "type": "function", "function": function })
    };
    let tool = json!({ "type": "function", "function": { "name": "weather", "parameters": {} } });
    json!({ "id": 0, "tools": [tool], "messages": [
        { "role": "user", "content": "warmer where?" },
        { "role": "assistant", "content": "let me see", "reasoning_content": "hm",
          "tool_calls": [call("a", "Bonn"), call("b", "Rome")] },
        { "role": "tool", "tool_call_id": "a", "name": "weather", "content": "9" },
        { "role": "tool", "tool_call_id": "b", "name": "weather", "content": "19" },
        { "role": "assistant", "content": "old: Rome" },
        { "role": "user", "content": "and Oslo?" },
        { "role": "assistant", "content": null, "tool_calls": [call("c", "Oslo")] },
        { "role": "tool", "tool_call_id": "c", "name": "weather", "content": "1" },
    ] })
}

fn world(rows: &[Value]) -> World {
    let world = World::new();
    let lines: Vec<String> = rows.iter().map(|row| format!("{row}\n")).collect();
    world.write("questions.jsonl", lines.concat());
    world
}

/// What the test's model answers: the last message and how many came before it.
fn reply(request: &HttpRequest) -> HttpResponse {
    let messages = request.json()["messages"].as_array().unwrap().clone();
    let (last, before) = messages.split_last().unwrap();
    answer(&format!("re: {} after {}", last["content"].as_str().unwrap(), before.len()))
}

#[test]
fn calls_and_results_stay_and_texts_are_regenerated() {
    let (world, server) = (world(&[conversation()]), server(|request| Some(reply(request))));
    let counts = world.ok_json(&args(server.url(), &["--json"]));
    assert_eq!(
        (&counts["done"], &counts["answers"], &counts["kept_calls"]),
        (&1.into(), &2.into(), &2.into())
    );
    let row = &rows(&world, "out.jsonl")[0];
    assert_eq!(row["regenerated"], json!({ "model": "m", "tokens": 8, "kept_calls": 2 }));
    assert_eq!(row["tools"], conversation()["tools"]);
    let said: Vec<_> =
        row["messages"].as_array().unwrap().iter().map(|m| m["content"].as_str().unwrap()).collect();
    let expected =
        ["warmer where?", "let me see", "9", "19", "re: 19 after 3", "and Oslo?", "", "1", "re: 1 after 7"];
    assert_eq!(said, expected);
    let call = &row["messages"][1];
    assert_eq!(
        call["tool_calls"][1]["function"],
        json!({ "name": "weather", "arguments": { "city": "Rome" } })
    );
    // What another model thought does not stay.
    assert!(call.get("reasoning_content").is_none() && row["messages"][3]["tool_call_id"] == "b");
    // As the interface has it: tools beside the messages, arguments in a text.
    let requests = server.requests();
    let bodies: Vec<_> =
        requests.iter().filter(|r| r.path.ends_with("completions")).map(HttpRequest::json).collect();
    assert_eq!(bodies.len(), 2);
    for body in &bodies {
        assert_eq!(body["tools"], conversation()["tools"]);
        assert_eq!(body["messages"][1]["tool_calls"][0]["function"]["arguments"], "{\"city\":\"Bonn\"}");
    }
    assert_eq!(bodies[1]["messages"][4]["content"], "re: 19 after 3");
    world.ok(&["prepare", "R", "--set", "data.conversations=[\"out.jsonl\"]"]);
}

#[test]
fn what_cannot_be_regenerated_is_counted() {
    let mut only_call = conversation();
    only_call["messages"].as_array_mut().unwrap().truncate(2);
    // A call in the text, as some data have them, is told by its result.
    let in_text = json!({ "messages": [{ "role": "user", "content": "y" },
        { "role": "assistant", "content": "<tool_call>{}</tool_call>" }, { "role": "tool", "content": "7" },
        { "role": "assistant", "content": "old" }] });
    let (mut again, mut as_text) = (conversation(), conversation());
    again["messages"][0]["content"] = "again".into();
    as_text["messages"][0]["content"] = "as text".into();
    let world = world(&[only_call, in_text, again, as_text]);
    let server = server(|request| {
        let first = request.json()["messages"][0]["content"].clone();
        let calls = json!({ "content": null, "tool_calls": [] });
        let choices = json!({ "choices": [{ "message": calls, "finish_reason": "tool_calls" }] });
        Some(match first.as_str().unwrap() {
            "again" => HttpResponse::new(200, choices.to_string()),
            "as text" => answer("<tool_call>\n{}\n</tool_call>"),
            _ => reply(request),
        })
    });
    let counts = world.ok_json(&args(server.url(), &["--json"]));
    assert_eq!((&counts["done"], &counts["skipped"], &counts["rows"]), (&1.into(), &3.into(), &4.into()));
    let row = &rows(&world, "out.jsonl")[0]["messages"];
    assert_eq!(
        (&row[1]["content"], &row[3]["content"]),
        (&json!("<tool_call>{}</tool_call>"), &json!("re: 7 after 2"))
    );
    let why: Vec<String> = rows(&world, "out.skipped.jsonl").iter().map(|r| r["why"].to_string()).collect();
    let expected = ["every answer calls a tool", "answer 1 calls a tool", "answer 1 calls a tool"];
    assert!(why.len() == 3 && why.iter().zip(expected).all(|(why, part)| why.contains(part)), "{why:?}");
    let skip = world.ok_json(&args(server.url(), &["--json", "--overwrite", "--tools", "skip"]));
    assert_eq!((&skip["done"], &skip["skipped"]), (&0.into(), &4.into()));
}

/// The target in process sees calls and results through its template.
#[test]
fn the_target_answers_after_results_in_process() {
    let world = world(&[conversation()]);
    let more = ["--max-tokens", "6", "--cut-off", "keep", "--temperature", "0"];
    world
        .ok(&[&["regenerate", "R", "--input", "questions.jsonl", "--output", "out.jsonl"][..], &more]
            .concat());
    let row = &rows(&world, "out.jsonl")[0];
    assert_eq!(row["regenerated"]["kept_calls"].as_u64(), Some(1), "{row}");
    let messages = row["messages"].as_array().unwrap();
    // Cut off, so the conversation ends with the first new answer.
    assert_eq!((messages.len(), &messages[4]["role"]), (5, &json!("assistant")), "{row}");
    assert_ne!(messages[4]["content"], "old: Rome");
}
