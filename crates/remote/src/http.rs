//! One request and its answer.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::{Body, RequestBuilder, SendBody};

use crate::{Error, Result};

/// The most of an answer that is read into memory.
pub(crate) const MOST_JSON: u64 = 256 << 20;

/// Requests with the same settings.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    agent: Agent,
    bearer: Option<String>,
}

/// Time limits of requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// To the first byte of the answer.
    pub(crate) answer: Duration,
    /// For the body.
    pub(crate) body: Duration,
}

impl Http {
    pub(crate) fn new(bearer: Option<String>, limits: Limits) -> Self {
        let agent = Agent::config_builder()
            .user_agent(concat!("specforge/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(limits.answer))
            .timeout_recv_body(Some(limits.body))
            // A repository that was renamed leads to its new place on the same host; storage is elsewhere, and its
            // addresses are signed.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .build()
            .into();
        Self { agent, bearer }
    }

    pub(crate) fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response<Body>> {
        self.with(self.agent.get(url), headers).call().map_err(|error| connection(url, &error))
    }

    /// The headers of a file, not of where it is stored.
    pub(crate) fn head(&self, url: &str) -> Result<Response<Body>> {
        let request = self.with(self.agent.head(url), &[("Accept-Encoding", "identity")]);
        let request = request.config().max_redirects(0).max_redirects_will_error(false).build();
        request.call().map_err(|error| connection(url, &error))
    }

    pub(crate) fn post(&self, url: &str, content_type: &str, body: &[u8]) -> Result<Response<Body>> {
        let request = self.with(self.agent.post(url), &[("Content-Type", content_type)]);
        request.send(body).map_err(|error| connection(url, &error))
    }

    pub(crate) fn post_json(&self, url: &str, body: &Value) -> Result<Response<Body>> {
        self.post(url, "application/json", body.to_string().as_bytes())
    }

    /// Sends `length` bytes of a reader.
    pub(crate) fn put(&self, url: &str, body: &mut dyn std::io::Read, length: u64) -> Result<Response<Body>> {
        let request = self.with(self.agent.put(url), &[("Content-Length", &length.to_string())]);
        request.send(SendBody::from_reader(body)).map_err(|error| connection(url, &error))
    }

    fn with<T>(&self, mut request: RequestBuilder<T>, headers: &[(&str, &str)]) -> RequestBuilder<T> {
        if let Some(bearer) = &self.bearer {
            request = request.header("Authorization", format!("Bearer {bearer}"));
        }
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))
    }
}

/// The body as text, whatever the status.
pub(crate) fn text(url: &str, response: Response<Body>) -> Result<String> {
    let bytes = response.into_body().into_with_config().limit(MOST_JSON).read_to_vec();
    let bytes = bytes.map_err(|error| connection(url, &error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The JSON of an answer that says yes.
pub(crate) fn json(url: &str, response: Response<Body>) -> Result<Value> {
    let response = expect_success(url, response)?;
    let text = text(url, response)?;
    serde_json::from_str(&text).map_err(|error| Error::Malformed {
        url: url.to_owned(),
        why: format!("the answer is not JSON ({error}): {}", excerpt(&text)),
    })
}

/// An answer that says yes.
pub(crate) fn expect_success(url: &str, response: Response<Body>) -> Result<Response<Body>> {
    let status = response.status().as_u16();
    if response.status().is_success() {
        return Ok(response);
    }
    let text = text(url, response).unwrap_or_default();
    Err(Error::Status { url: url.to_owned(), status, message: message_of(&text) })
}

/// What a server says about a failure: OpenAI's and the hub's forms, else the beginning of the text.
pub(crate) fn message_of(text: &str) -> String {
    let json: Option<Value> = serde_json::from_str(text).ok();
    let said = json.as_ref().and_then(|json| {
        let error = &json["error"];
        [&error["message"], error, &json["message"], &json["detail"]].into_iter().find_map(Value::as_str)
    });
    said.map_or_else(|| excerpt(text), str::to_owned)
}

/// The beginning of a text, on one line.
pub(crate) fn excerpt(text: &str) -> String {
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = line.chars().take(200).collect();
    if short.len() < line.len() { short + "..." } else { short }
}

/// A header as text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Seconds that the server asks to wait.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    header(headers, "retry-after")?.trim().parse().ok().map(Duration::from_secs)
}

pub(crate) fn connection(url: &str, error: &ureq::Error) -> Error {
    let host = url.split('/').nth(2).unwrap_or(url);
    let url = url.to_owned();
    match error {
        ureq::Error::HostNotFound => {
            let why = format!("there is no host {host}; is the address right, is there a network?");
            Error::Unreachable { url, why }
        }
        ureq::Error::Io(io) if io.kind() == std::io::ErrorKind::ConnectionRefused => {
            Error::Unreachable { url, why: format!("nothing listens at {host}; is the server running?") }
        }
        ureq::Error::Timeout(limit) => Error::Connection { url, why: format!("no answer in time ({limit})") },
        other => Error::Connection { url, why: other.to_string() },
    }
}
