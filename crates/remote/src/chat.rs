//! Chat completions from one or many servers of the OpenAI interface (SGLang, vLLM, llama.cpp, ...).
//!
//! Every server takes so many requests at once; a request goes to the one that has least to do. A server that is
//! overloaded or gone rests for a while, longer each time, and its requests go to others meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::backoff::sleep;
use crate::http::{self, Http, Limits};
use crate::{Backoff, Error, Result};

/// Servers of the same model.
#[derive(Debug)]
pub struct Servers {
    http: Http,
    /// Up to and with `/v1`.
    urls: Vec<String>,
    at_once: usize,
    backoff: Backoff,
    state: Mutex<Vec<State>>,
    changed: Condvar,
}

/// One server.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    busy: usize,
    /// Since its last answer.
    failures: u32,
    rests_until: Option<Instant>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The text.
    pub content: String,
    /// What the model thought before it, where the server tells them apart.
    pub reasoning: Option<String>,
    /// `stop`, `length`, ...
    pub finish_reason: String,
    /// Generated tokens, if the server counts them.
    pub tokens: Option<u64>,
}

impl Servers {
    /// Servers at these addresses, each with up to `at_once` requests at a time that may take up to `limit`.
    pub fn new(
        urls: &[String],
        key: Option<String>,
        at_once: usize,
        backoff: Backoff,
        limit: Duration,
    ) -> Self {
        let urls: Vec<String> = urls.iter().map(|url| base(url)).collect();
        let state = Mutex::new(vec![State::default(); urls.len()]);
        let http = Http::new(key, Limits { answer: limit, body: limit });
        Self { http, urls, at_once, backoff, state, changed: Condvar::new() }
    }

    /// How many requests run at once.
    pub fn capacity(&self) -> usize {
        self.urls.len() * self.at_once
    }

    /// The names of the models that every server has; fails with the first server that does not answer.
    pub fn models(&self) -> Result<Vec<String>> {
        let mut common: Option<Vec<String>> = None;
        for url in &self.urls {
            let url = format!("{url}/models");
            let answer = http::json(&url, self.http.get(&url, &[])?)?;
            let list = answer["data"].as_array().ok_or_else(|| Error::Malformed {
                url: url.clone(),
                why: format!("expected a list of models in data, got {}", http::excerpt(&answer.to_string())),
            })?;
            let names: Vec<String> =
                list.iter().filter_map(|model| model["id"].as_str()).map(str::to_owned).collect();
            common = Some(match common {
                None => names,
                Some(before) => before.into_iter().filter(|name| names.contains(name)).collect(),
            });
        }
        Ok(common.unwrap_or_default())
    }

    /// Asks for one completion, as often as the backoff allows. `body` is the request as the interface has it.
    ///
    /// An error that is transient ([`Error::is_transient`]) stayed through all tries; others are not tried again.
    pub fn complete(&self, body: &Value, stop: &AtomicBool) -> Result<Completion> {
        let mut failure = 0;
        loop {
            let server = self.lease(stop)?;
            let (result, asked) = self.ask(server, body);
            let transient = result.as_ref().err().filter(|error| error.is_transient());
            let server_s = transient.is_some_and(is_the_server_s);
            failure += u32::from(transient.is_some());
            self.release(server, server_s, asked);
            let Some(error) = transient.filter(|_| failure <= self.backoff.retries) else { return result };
            // A failure of the server lets the server rest, one of the request this request.
            if !server_s {
                sleep(self.backoff.delay(failure, asked, salt(error)), stop)?;
            }
        }
    }

    /// One try: the answer, and how long the server asked to wait.
    fn ask(&self, server: usize, body: &Value) -> (Result<Completion>, Option<Duration>) {
        let url = format!("{}/chat/completions", self.urls[server]);
        match self.http.post_json(&url, body) {
            Err(error) => (Err(error), None),
            Ok(response) => {
                let asked = http::retry_after(response.headers());
                (http::json(&url, response).and_then(|answer| completion(&url, &answer)), asked)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        // The state is a few numbers, right after every line that changes them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a server with room, the one with least to do.
    fn lease(&self, stop: &AtomicBool) -> Result<usize> {
        let mut state = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            let now = Instant::now();
            let awake = |s: &State| s.rests_until.is_none_or(|until| until <= now);
            let free = state.iter().enumerate().filter(|(_, s)| s.busy < self.at_once && awake(s));
            if let Some(server) = free.min_by_key(|(_, s)| s.busy).map(|(server, _)| server) {
                state[server].busy += 1;
                return Ok(server);
            }
            let wait = Duration::from_millis(50);
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn release(&self, server: usize, failed: bool, asked: Option<Duration>) {
        let mut state = self.lock();
        let s = &mut state[server];
        s.busy -= 1;
        if failed {
            // Requests that were under way together fail together: that is one failure.
            if s.rests_until.is_none_or(|until| until <= Instant::now()) {
                s.failures += 1;
            }
            s.rests_until = Some(Instant::now() + self.backoff.delay(s.failures, asked, server as u64));
        } else {
            (s.failures, s.rests_until) = (0, None);
        }
        drop(state);
        self.changed.notify_one();
    }
}

/// Whether a failure says that the server has too much to do or is gone, and not just that this request went wrong.
fn is_the_server_s(error: &Error) -> bool {
    match error {
        Error::Status { status, .. } => matches!(status, 429 | 502..=504),
        Error::Unreachable { .. } => true,
        _ => false,
    }
}

fn salt(error: &Error) -> u64 {
    error.to_string().bytes().fold(Instant::now().elapsed().as_nanos() as u64, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    })
}

/// `http://host:port/v1` of an address with or without the ending.
fn base(url: &str) -> String {
    let url = url.trim_end_matches('/');
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    if url.ends_with("/v1") { url } else { url + "/v1" }
}

fn completion(url: &str, answer: &Value) -> Result<Completion> {
    let choice = &answer["choices"][0];
    let message = choice["message"].as_object();
    let content = message.and_then(|message| message.get("content"));
    let (Some(message), Some(content)) = (message, content) else {
        let why = format!("expected choices with a message, got {}", http::excerpt(&answer.to_string()));
        return Err(Error::Malformed { url: url.to_owned(), why });
    };
    let text = |key: &str| message.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok(Completion {
        content: content.as_str().unwrap_or_default().to_owned(),
        reasoning: text("reasoning_content").or_else(|| text("reasoning")),
        finish_reason: choice["finish_reason"].as_str().unwrap_or("unknown").to_owned(),
        tokens: answer["usage"]["completion_tokens"].as_u64(),
    })
}

#[cfg(test)]
mod tests {
    use super::base;

    #[test]
    fn addresses_are_completed() {
        for url in [
            "localhost:30000",
            "http://localhost:30000",
            "http://localhost:30000/",
            "http://localhost:30000/v1/",
        ] {
            assert_eq!(base(url), "http://localhost:30000/v1");
        }
        assert_eq!(base("https://host/path/v1"), "https://host/path/v1");
    }
}
