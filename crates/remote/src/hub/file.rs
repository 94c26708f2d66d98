//! One file: what the hub says about it, its bytes, and whether they are the right ones.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use fs_err::File;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::{Hub, RepoId, Watch};
use crate::http::{connection, expect_success, header};
use crate::{Error, Result, backoff};

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) file: String,
    pub(super) url: String,
    /// The content's hash: SHA-256 of large files, git's blob hash of others; of mirrors perhaps neither.
    pub(super) etag: String,
    pub(super) size: u64,
}

/// Bytes between two looks at whether to stop.
const PIECE: usize = 1 << 20;

impl Hub {
    /// What the hub says about a file.
    pub(super) fn remote(&self, id: &RepoId, commit: &str, file: &str) -> Result<Remote> {
        let url = format!("{}/{}/resolve/{commit}/{file}", self.endpoint, id.page_path());
        let mut response = self.http.head(&url)?;
        // Small files may be elsewhere on the same host; storage on another one says nothing of hash and size, but then
        // the hub itself does.
        let linked =
            ["x-linked-etag", "x-linked-size"].map(|name| header(response.headers(), name).is_some());
        if response.status().is_redirection() && linked != [true, true] {
            let to = header(response.headers(), "location").unwrap_or_default();
            let to = if to.starts_with('/') { format!("{}{to}", self.endpoint) } else { to.to_owned() };
            if to.starts_with(&format!("{}/", self.endpoint)) {
                response = self.http.head(&to)?;
            }
        }
        let headers = response.headers().clone();
        let code = header(&headers, "x-error-code").map(str::to_owned);
        let is_redirection = response.status().is_redirection();
        if !is_redirection {
            expect_success(&url, response).map_err(|error| self.explain(id, error, code.as_deref()))?;
        }
        let etag = header(&headers, "x-linked-etag").or_else(|| header(&headers, "etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let legal = |etag: &String| {
            !etag.is_empty()
                && etag.len() <= 128
                && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        // The length of a redirection is that of its own page.
        let own_size = || (!is_redirection).then(|| header(&headers, "content-length")).flatten();
        let size = header(&headers, "x-linked-size").or_else(own_size);
        let (Some(etag), Some(size)) = (etag.filter(legal), size.and_then(|size| size.parse().ok())) else {
            let why = "expected an ETag and a size; is HF_ENDPOINT a hub?".to_owned();
            return Err(Error::Malformed { url, why });
        };
        Ok(Remote { file: file.to_owned(), url, etag, size })
    }

    /// Downloads a file to `blob`, from where an earlier try stopped. Every try that brings something new is followed
    /// by another one at once.
    pub(super) fn fetch_blob(
        &self,
        id: &RepoId,
        remote: &Remote,
        blob: &Path,
        (watch, more): (Watch<'_>, &dyn Fn(i64)),
    ) -> Result<()> {
        fs_err::create_dir_all(blob.parent().unwrap_or(blob))?;
        let path = blob.with_added_extension("incomplete");
        let mut file = File::options().create(true).read(true).write(true).truncate(false).open(&path)?;
        // Another process that downloads the same file goes first.
        file.file().lock()?;
        if blob.metadata().is_ok_and(|found| found.len() == remote.size) {
            more(remote.size as i64);
            return Ok(());
        }
        let mut failure = 0;
        let mut have = file.metadata()?.len().min(remote.size);
        more(have as i64);
        while have < remote.size {
            let before = have;
            match self.fetch_from(id, remote, &mut file, &mut have, (watch, more)) {
                Ok(()) => {}
                Err(error) if error.is_transient() && failure < self.backoff.retries => {
                    failure = if have > before { 1 } else { failure + 1 };
                    backoff::sleep(self.backoff.delay(failure, None, have), watch.stop)?;
                }
                Err(error) => {
                    if matches!(error, Error::Damaged { .. }) {
                        fs_err::remove_file(&path)?;
                    }
                    return Err(error);
                }
            }
        }
        file.file().set_len(remote.size)?;
        if let Err(error) = verify(remote, &mut file) {
            fs_err::remove_file(&path)?;
            return Err(error);
        }
        file.file().sync_all()?;
        Ok(fs_err::rename(&path, blob)?)
    }

    /// One request for what is missing.
    fn fetch_from(
        &self,
        id: &RepoId,
        remote: &Remote,
        file: &mut File,
        have: &mut u64,
        (watch, more): (Watch<'_>, &dyn Fn(i64)),
    ) -> Result<()> {
        let range = format!("bytes={have}-");
        let headers = [("Accept-Encoding", "identity"), ("Range", range.as_str())];
        let headers = if *have > 0 { &headers[..] } else { &headers[..1] };
        let response = self.http.get(&remote.url, headers)?;
        if response.status().as_u16() == 416 {
            // There is nothing behind what came: the file is shorter than announced.
            let (expected, got) = (format!("{} bytes", remote.size), format!("{have} bytes"));
            return Err(Error::Damaged { file: remote.url.clone(), expected, got });
        }
        let code = header(response.headers(), "x-error-code").map(str::to_owned);
        let response = expect_success(&remote.url, response)
            .map_err(|error| self.explain(id, error, code.as_deref()))?;
        // A server that knows no ranges sends everything again.
        if response.status().as_u16() != 206 && *have > 0 {
            more(-(*have as i64));
            *have = 0;
        }
        file.seek(SeekFrom::Start(*have))?;
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            if watch.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            let n =
                body.read(&mut piece).map_err(|error| connection(&remote.url, &ureq::Error::from(error)))?;
            if n == 0 {
                break;
            }
            if *have + n as u64 > remote.size {
                let why = format!("it sends more than the {} bytes that it announced", remote.size);
                return Err(Error::Malformed { url: remote.url.clone(), why });
            }
            file.write_all(&piece[..n])?;
            *have += n as u64;
            more(n as i64);
        }
        if *have < remote.size {
            let why = format!("the connection was cut off after {have} of {} bytes", remote.size);
            return Err(Error::Connection { url: remote.url.clone(), why });
        }
        Ok(())
    }
}

/// Compares the content with the hash that the hub gave.
fn verify(remote: &Remote, file: &mut File) -> Result<()> {
    let is_hash = |length| remote.etag.len() == length && remote.etag.bytes().all(|b| b.is_ascii_hexdigit());
    let mut hash = if is_hash(64) {
        Context::new(&SHA256)
    } else if is_hash(40) {
        let mut git = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
        git.update(format!("blob {}\0", remote.size).as_bytes());
        git
    } else {
        return Ok(());
    };
    file.seek(SeekFrom::Start(0))?;
    let mut piece = vec![0; PIECE];
    loop {
        let n = file.read(&mut piece)?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
    }
    let got = hex(hash.finish().as_ref());
    if got == remote.etag.to_ascii_lowercase() {
        return Ok(());
    }
    let (file, expected) = (remote.url.clone(), format!("hash {}", remote.etag));
    Err(Error::Damaged { file, expected, got })
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}
