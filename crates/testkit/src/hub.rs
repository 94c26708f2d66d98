//! A model hub for tests: the routes that downloads and uploads use, over files in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

use crate::{HttpRequest, HttpResponse, HttpServer};

/// The commit of every repository of a [`TestHub`].
pub const COMMIT: &str = "00112233445566778899aabbccddeeff00112233";

/// Answers in place of the hub's, where the closure gives one.
pub type Fault = Box<dyn Fn(&HttpRequest) -> Option<HttpResponse> + Send + Sync>;

/// A hub with one repository to download, and what was uploaded.
#[derive(Debug)]
pub struct TestHub {
    server: HttpServer,
    uploads: Arc<Mutex<Uploads>>,
}

/// What came up.
#[derive(Debug, Default, Clone)]
pub struct Uploads {
    /// Large files by their SHA-256.
    pub stored: BTreeMap<String, Vec<u8>>,
    /// The lines of the last commit.
    pub commit: Vec<Value>,
    /// The body of the last request to make a repository.
    pub created: Option<Value>,
}

impl TestHub {
    /// A hub whose repository `id` has these files. Safetensors are stored elsewhere, as large files are.
    pub fn start(id: &str, files: &[(&str, Vec<u8>)], fault: Fault) -> Self {
        let uploads = Arc::new(Mutex::new(Uploads::default()));
        let (id, seen) = (id.to_owned(), uploads.clone());
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(name, content)| ((*name).to_owned(), content.clone())).collect();
        let server = HttpServer::start(move |request| {
            fault(request).unwrap_or_else(|| {
                download(&id, &files, request)
                    .or_else(|| upload(request, &mut seen.lock().unwrap_or_else(|e| panic!("{e}"))))
                    .unwrap_or_else(|| missing("RepoNotFound"))
            })
        });
        Self { server, uploads }
    }

    /// Its address.
    pub fn url(&self) -> &str {
        self.server.url()
    }

    /// Everything that was asked for.
    pub fn requests(&self) -> Vec<HttpRequest> {
        self.server.requests()
    }

    /// What was uploaded.
    pub fn uploads(&self) -> Uploads {
        self.uploads.lock().unwrap_or_else(|error| panic!("{error}")).clone()
    }
}

fn missing(code: &str) -> HttpResponse {
    HttpResponse::new(404, json!({ "error": "not found" }).to_string()).with("X-Error-Code", code)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

fn sha256(content: &[u8]) -> String {
    hex(digest(&SHA256, content).as_ref())
}

fn download(id: &str, files: &BTreeMap<String, Vec<u8>>, request: &HttpRequest) -> Option<HttpResponse> {
    if let Some(oid) = request.path.strip_prefix("/storage/") {
        let content = files.values().find(|content| sha256(content) == oid)?;
        return Some(ranged(request, content));
    }
    let api = if id.starts_with("datasets/") { format!("/api/{id}") } else { format!("/api/models/{id}") };
    if let Some(revision) = request.path.strip_prefix(&format!("{api}/revision/")) {
        if !matches!(revision, "main" | COMMIT) {
            return Some(missing("RevisionNotFound"));
        }
        let siblings: Vec<_> = files.keys().map(|name| json!({ "rfilename": name })).collect();
        return Some(HttpResponse::new(
            200,
            json!({ "id": id, "sha": COMMIT, "siblings": siblings }).to_string(),
        ));
    }
    // The hub keeps some small files at another place of its own.
    let moved = format!("/{id}/resolve/{COMMIT}/tokenizer.json");
    if request.path == moved {
        return Some(HttpResponse::new(307, "Moved").with("Location", "/kept/tokenizer.json"));
    }
    let name = request.path.strip_prefix(&format!("/{id}/resolve/{COMMIT}/"));
    let name = name.or_else(|| request.path.strip_prefix("/kept/"))?;
    let Some(content) = files.get(name) else { return Some(missing("EntryNotFound")) };
    let size = content.len().to_string();
    if name.ends_with(".safetensors") {
        let oid = sha256(content);
        let redirect = HttpResponse::new(302, "")
            .with("Location", &format!("/storage/{oid}"))
            .with("X-Linked-Etag", &format!("\"{oid}\""))
            .with("X-Linked-Size", &size)
            .with("ETag", "\"of-the-redirect\"");
        return Some(redirect.with("X-Repo-Commit", COMMIT));
    }
    let blob = [format!("blob {size}\0").as_bytes(), content].concat();
    let etag = hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref());
    let response =
        ranged(request, content).with("ETag", &format!("\"{etag}\"")).with("X-Repo-Commit", COMMIT);
    Some(if request.method == "HEAD" { response.with("Content-Length", &size) } else { response })
}

fn ranged(request: &HttpRequest, content: &[u8]) -> HttpResponse {
    let start = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match start {
        Some(start) if start < content.len() => HttpResponse::new(206, &content[start..]),
        Some(_) => HttpResponse::new(416, ""),
        None => HttpResponse::new(200, content),
    }
}

fn upload(request: &HttpRequest, uploads: &mut Uploads) -> Option<HttpResponse> {
    let ok = |value: Value| Some(HttpResponse::new(200, value.to_string()));
    if request.path == "/api/repos/create" {
        uploads.created = Some(request.json());
        return ok(json!({ "url": "" }));
    }
    if request.path.contains("/preupload/") {
        let files = request.json()["files"].as_array()?.clone();
        let mode = |file: &Value| {
            let large = file["path"].as_str().is_some_and(|path| path.ends_with(".safetensors"));
            json!({ "path": file["path"], "uploadMode": if large { "lfs" } else { "regular" } })
        };
        return ok(json!({ "files": files.iter().map(mode).collect::<Vec<_>>() }));
    }
    if request.path.ends_with(".git/info/lfs/objects/batch") {
        let object = request.json()["objects"][0].clone();
        let oid = object["oid"].as_str()?.to_owned();
        if uploads.stored.contains_key(&oid) {
            return ok(json!({ "objects": [object] }));
        }
        let host = request.header("host")?;
        let action = json!({ "upload": { "href": format!("http://{host}/put/{oid}") } });
        return ok(json!({ "objects": [{ "oid": oid, "size": object["size"], "actions": action }] }));
    }
    if let Some(oid) = request.path.strip_prefix("/put/") {
        uploads.stored.insert(oid.to_owned(), request.body.clone());
        return Some(HttpResponse::new(200, "").with("ETag", "\"part\""));
    }
    if request.path.contains("/commit/") {
        let lines = String::from_utf8_lossy(&request.body).into_owned();
        uploads.commit = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        return ok(json!({ "commitOid": COMMIT }));
    }
    None
}
