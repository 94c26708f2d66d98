//! Folders up to the hub.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use specforge_remote::hub::{Hub, HubSettings, RepoId, Upload, UploadFile};
use specforge_testkit::{Fault, HttpResponse, TestHub, tempdir};

use crate::{settings, watch};

fn files(folder: &Path) -> Vec<UploadFile> {
    let weights = folder.join("model.safetensors");
    fs_err::write(&weights, vec![7u8; 5000]).unwrap();
    vec![
        UploadFile::Text("# A draft".to_owned(), "README.md".to_owned()),
        UploadFile::Local(weights, "model.safetensors".to_owned()),
    ]
}

fn upload(server: &TestHub, folder: &Path, token: Option<&str>) -> specforge_remote::Result<String> {
    let token = token.map(str::to_owned);
    let hub = Hub::new(HubSettings { token, ..settings(server.url(), folder) });
    let id = RepoId::parse("me/draft").unwrap();
    hub.upload(&Upload { id: &id, private: true, message: "A draft", files: files(folder) }, watch())
}

fn start(fault: Fault) -> TestHub {
    TestHub::start("other/repo", &[], fault)
}

#[test]
fn files_go_up_as_one_commit() {
    let (server, folder) = (start(Box::new(|_| None)), tempdir());
    let url = upload(&server, folder.path(), Some("hf_w")).unwrap();
    assert_eq!(url, format!("{}/me/draft", server.url()));
    let seen = server.uploads();
    let created = json!({ "name": "draft", "organization": "me", "type": "model", "private": true });
    assert_eq!(seen.created, Some(created));
    assert_eq!(seen.stored.values().collect::<Vec<_>>(), [&vec![7u8; 5000]]);
    let oid = seen.stored.keys().next().unwrap();
    assert_eq!(
        seen.commit,
        [
            json!({ "key": "header", "value": { "summary": "A draft", "description": "" } }),
            json!({ "key": "file", "value": { "content": "IyBBIGRyYWZ0", "path": "README.md", "encoding": "base64" } }),
            json!({ "key": "lfsFile", "value": { "path": "model.safetensors", "algo": "sha256", "oid": oid, "size": 5000 } }),
        ]
    );
    // The signed address gets no token.
    let put = server.requests().into_iter().find(|r| r.method == "PUT").unwrap();
    assert_eq!((put.header("authorization"), put.body.len()), (None, 5000));
    // What is stored already is not sent again.
    upload(&server, folder.path(), Some("hf_w")).unwrap();
    assert_eq!(server.requests().iter().filter(|r| r.method == "PUT").count(), 1);
}

#[test]
fn large_files_go_up_in_parts() {
    let server = start(Box::new(|request| {
        let host = request.header("host")?.to_owned();
        if request.path.ends_with("objects/batch") {
            let part = |n: u32| format!("http://{host}/part/{n}");
            let header = json!({ "chunk_size": "2000", "1": part(1), "2": part(2), "3": part(3) });
            let actions =
                json!({ "upload": { "href": format!("http://{host}/complete"), "header": header } });
            return Some(HttpResponse::new(200, json!({ "objects": [{ "actions": actions }] }).to_string()));
        }
        let number = request.path.strip_prefix("/part/");
        let part = number.map(|n| HttpResponse::new(200, "").with("ETag", &format!("\"etag-{n}\"")));
        part.or_else(|| (request.path == "/complete").then(|| HttpResponse::new(200, "")))
    }));
    let folder = tempdir();
    upload(&server, folder.path(), Some("hf_w")).unwrap();
    let puts: Vec<usize> =
        server.requests().iter().filter(|r| r.method == "PUT").map(|r| r.body.len()).collect();
    assert_eq!(puts, [2000, 2000, 1000]);
    let complete = server.requests().into_iter().find(|r| r.path == "/complete").unwrap().json();
    assert_eq!(complete["parts"][2], json!({ "partNumber": 3, "etag": "\"etag-3\"" }));
}

#[test]
fn a_part_that_fails_is_sent_again() {
    let failures = AtomicUsize::new(0);
    let server = start(Box::new(move |request| {
        let fails = request.method == "PUT" && failures.fetch_add(1, Ordering::Relaxed) < 2;
        fails.then(|| HttpResponse::new(503, ""))
    }));
    let folder = tempdir();
    upload(&server, folder.path(), Some("hf_w")).unwrap();
    assert_eq!(server.uploads().stored.values().map(Vec::len).collect::<Vec<_>>(), [5000]);
}

#[test]
fn uploads_that_may_not_be_say_why() {
    let folder = tempdir();
    let (server, message) =
        (start(Box::new(|_| None)), |r: specforge_remote::Result<String>| r.unwrap_err().to_string());
    assert!(message(upload(&server, folder.path(), None)).contains("needs HF_TOKEN"));
    assert!(server.requests().is_empty());
    let refusing = start(Box::new(|_| Some(HttpResponse::new(403, "{\"error\": \"read only\"}"))));
    let refused = message(upload(&refusing, folder.path(), Some("hf_r")));
    assert!(refused.contains("read only") && refused.contains("write permission for me"), "{refused}");
}
