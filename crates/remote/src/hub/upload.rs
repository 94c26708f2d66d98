//! A folder up to the hub, as one commit.
//!
//! The hub says of each file whether it goes into the commit itself or, being large or not text, to the storage of large
//! files first, where what is there already is not sent again.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fs_err::File;
use ring::digest::{Context, SHA256};
use serde_json::{Value, json};

use super::file::hex;
use super::{Hub, RepoId, Watch};
use crate::http::{self, Http, Limits, expect_success, header};
use crate::{Error, Result};

/// What goes up.
#[derive(Debug)]
pub struct Upload<'a> {
    /// The repository; made if there is none.
    pub id: &'a RepoId,
    /// Whether a repository that is made is private.
    pub private: bool,
    /// One line about the commit.
    pub message: &'a str,
    /// The files.
    pub files: Vec<UploadFile>,
}

/// A file that goes up.
#[derive(Debug, Clone)]
pub enum UploadFile {
    /// A file on this machine, and its path in the repository.
    Local(PathBuf, String),
    /// A text, and its path in the repository.
    Text(String, String),
}

const LFS: &str = "application/vnd.git-lfs+json";

impl UploadFile {
    fn path(&self) -> &str {
        let (Self::Local(_, path) | Self::Text(_, path)) = self;
        path
    }

    fn size(&self) -> Result<u64> {
        match self {
            Self::Local(file, _) => Ok(fs_err::metadata(file)?.len()),
            Self::Text(text, _) => Ok(text.len() as u64),
        }
    }

    fn reader(&self) -> Result<Box<dyn ReadSeek + '_>> {
        match self {
            Self::Local(file, _) => Ok(Box::new(File::open(file)?)),
            Self::Text(text, _) => Ok(Box::new(std::io::Cursor::new(text.as_bytes()))),
        }
    }

    fn bytes(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader()?.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn sha256(&self) -> Result<String> {
        let (mut reader, mut hash, mut piece) = (self.reader()?, Context::new(&SHA256), vec![0; 1 << 20]);
        loop {
            let n = reader.read(&mut piece)?;
            if n == 0 {
                return Ok(hex(hash.finish().as_ref()));
            }
            hash.update(&piece[..n]);
        }
    }
}

trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

impl Hub {
    /// Uploads files as one commit to `main`: all of them or none. Returns the address of the repository.
    pub fn upload(&self, upload: &Upload<'_>, watch: Watch<'_>) -> Result<String> {
        let (id, what) = (upload.id, upload.id.to_string());
        if self.offline {
            return Err(Error::Repository {
                what,
                why: "HF_HUB_OFFLINE is set: unset it to upload".to_owned(),
            });
        }
        if !self.has_token {
            let why = "an upload needs HF_TOKEN, an access token with write permission (made in the settings of the hub)";
            return Err(Error::Repository { what, why: why.to_owned() });
        }
        self.retried(watch, || self.create(upload))?;
        let large = self.retried(watch, || self.modes(upload))?;
        let total: u64 = upload.files.iter().map(UploadFile::size).sum::<Result<u64>>()?;
        let done = AtomicU64::new(0);
        let mut operations =
            vec![json!({ "key": "header", "value": { "summary": upload.message, "description": "" } })];
        for (file, large) in upload.files.iter().zip(large) {
            if large {
                let (oid, size) = (file.sha256()?, file.size()?);
                let before = done.load(Ordering::Relaxed);
                self.retried(watch, || {
                    done.store(before, Ordering::Relaxed);
                    let sent = |n: u64| {
                        let all = done.fetch_add(n, Ordering::Relaxed) + n;
                        (watch.progress)(all, total);
                    };
                    self.store(id, file, (&oid, size), (watch, &sent))
                })?;
                done.store(before + size, Ordering::Relaxed);
                let value = json!({ "path": file.path(), "algo": "sha256", "oid": oid, "size": size });
                operations.push(json!({ "key": "lfsFile", "value": value }));
            } else {
                let content = BASE64.encode(file.bytes(u64::MAX)?);
                let value = json!({ "content": content, "path": file.path(), "encoding": "base64" });
                operations.push(json!({ "key": "file", "value": value }));
            }
        }
        // Not tried again: a commit that was made although its answer was lost would be made twice.
        self.commit(id, &operations)?;
        Ok(format!("{}/{}", self.endpoint, id.name()))
    }

    fn create(&self, upload: &Upload<'_>) -> Result<()> {
        let url = format!("{}/api/repos/create", self.endpoint);
        let (owner, name) = upload.id.name().split_once('/').unwrap_or_default();
        let body = json!({ "name": name, "organization": owner, "type": "model", "private": upload.private });
        let response = self.http.post_json(&url, &body)?;
        // It exists already.
        if response.status().as_u16() == 409 {
            return Ok(());
        }
        expect_success(&url, response).map(|_| ()).map_err(|error| explain_write(upload.id, error))
    }

    /// For each file, whether it goes to the storage of large files.
    fn modes(&self, upload: &Upload<'_>) -> Result<Vec<bool>> {
        let url = format!("{}/api/models/{}/preupload/main", self.endpoint, upload.id.name());
        let file = |file: &UploadFile| -> Result<Value> {
            let sample = BASE64.encode(file.bytes(512)?);
            Ok(json!({ "path": file.path(), "sample": sample, "size": file.size()? }))
        };
        let files = upload.files.iter().map(file).collect::<Result<Vec<_>>>()?;
        let answer = http::json(&url, self.http.post_json(&url, &json!({ "files": files }))?)
            .map_err(|error| explain_write(upload.id, error))?;
        let mode = |file: &UploadFile| {
            let modes = answer["files"].as_array()?;
            let mode = modes.iter().find(|mode| mode["path"] == file.path())?;
            Some(mode["uploadMode"].as_str()? == "lfs")
        };
        let modes: Option<Vec<bool>> = upload.files.iter().map(mode).collect();
        modes.ok_or_else(|| malformed(&url, "uploadMode of every file", &answer))
    }

    /// Puts a file into the storage of large files, unless it is there.
    fn store(
        &self,
        id: &RepoId,
        file: &UploadFile,
        (oid, size): (&str, u64),
        (watch, sent): (Watch<'_>, &dyn Fn(u64)),
    ) -> Result<()> {
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.endpoint, id.name());
        let object = json!({ "oid": oid, "size": size });
        let body = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "objects": [object], "hash_algo": "sha256",
        });
        let response = self.http.post(&url, LFS, body.to_string().as_bytes())?;
        let answer = http::json(&url, response).map_err(|error| explain_write(id, error))?;
        let object = &answer["objects"][0];
        if let Some(message) = object["error"]["message"].as_str() {
            return Err(Error::Repository {
                what: id.to_string(),
                why: format!("{}: {message}", file.path()),
            });
        }
        let Some(actions) = object.get("actions").filter(|actions| !actions.is_null()) else { return Ok(()) };
        let target = actions["upload"]["href"].as_str();
        let target = target.ok_or_else(|| malformed(&url, "an address to upload to", &answer))?;
        let headers = actions["upload"]["header"].as_object();
        let parts = headers.and_then(|headers| headers.get("chunk_size"));
        match parts.and_then(|size| size.as_str().map_or_else(|| size.as_u64(), |size| size.parse().ok())) {
            None => {
                put(target, file, (0, size), (watch, sent))?;
            }
            Some(0) => return Err(malformed(&url, "a chunk_size above 0", &answer)),
            Some(part) => {
                let mut keys: Vec<(u64, &str)> = headers
                    .into_iter()
                    .flatten()
                    .filter_map(|(key, value)| Some((key.parse().ok()?, value.as_str()?)))
                    .collect();
                keys.sort_unstable();
                if keys.len() as u64 != size.div_ceil(part) {
                    return Err(malformed(&url, &format!("{} parts", size.div_ceil(part)), &answer));
                }
                let mut etags = Vec::new();
                for (i, (number, address)) in keys.into_iter().enumerate() {
                    let start = i as u64 * part;
                    let etag = put(address, file, (start, part.min(size - start)), (watch, sent))?;
                    etags.push(json!({ "partNumber": number, "etag": etag }));
                }
                let body = json!({ "oid": oid, "parts": etags }).to_string();
                expect_success(target, self.http.post(target, LFS, body.as_bytes())?)?;
            }
        }
        if let Some(verify) = actions["verify"]["href"].as_str() {
            let body = json!({ "oid": oid, "size": size }).to_string();
            expect_success(verify, self.http.post(verify, LFS, body.as_bytes())?)?;
        }
        Ok(())
    }

    fn commit(&self, id: &RepoId, operations: &[Value]) -> Result<()> {
        let url = format!("{}/api/models/{}/commit/main", self.endpoint, id.name());
        let lines = operations.iter().map(|operation| format!("{operation}\n")).collect::<Vec<_>>().concat();
        let response = self.http.post(&url, "application/x-ndjson", lines.as_bytes())?;
        http::json(&url, response).map(|_| ()).map_err(|error| explain_write(id, error))
    }
}

/// Sends a part of a file to an address that is signed; returns the ETag.
fn put(
    url: &str,
    file: &UploadFile,
    (start, length): (u64, u64),
    (watch, sent): (Watch<'_>, &dyn Fn(u64)),
) -> Result<String> {
    let mut reader = file.reader()?;
    reader.seek(SeekFrom::Start(start))?;
    let limits = Limits { answer: Duration::from_mins(10), body: Duration::from_mins(10) };
    let mut body = Counted { inner: reader.take(length), sent, stop: watch.stop };
    let response = Http::new(None, limits).put(url, &mut body, length)?;
    let etag = header(response.headers(), "etag").unwrap_or_default().to_owned();
    expect_success(url, response)?;
    Ok(etag)
}

fn explain_write(id: &RepoId, error: Error) -> Error {
    match error {
        Error::Status { status: status @ (401 | 403), message, .. } => {
            let why = format!(
                "the token in HF_TOKEN may not write there (status {status}: {message}); make one with write \
                 permission for {}",
                id.name().split('/').next().unwrap_or_default()
            );
            Error::Repository { what: id.to_string(), why }
        }
        other => other,
    }
}

fn malformed(url: &str, expected: &str, answer: &Value) -> Error {
    let why = format!("expected {expected}, got {}", http::excerpt(&answer.to_string()));
    Error::Malformed { url: url.to_owned(), why }
}

/// Counts what is read, and ends when it is to stop.
struct Counted<'a, R> {
    inner: R,
    sent: &'a dyn Fn(u64),
    stop: &'a std::sync::atomic::AtomicBool,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("stopped"));
        }
        let n = self.inner.read(buffer)?;
        (self.sent)(n as u64);
        Ok(n)
    }
}
