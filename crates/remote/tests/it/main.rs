//! Over real connections to servers that the tests start.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod chat;
mod download;
mod upload;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use specforge_remote::Backoff;
use specforge_remote::hub::{Hub, HubSettings, Watch};

/// Quick, so that tests are.
fn backoff(retries: u32) -> Backoff {
    Backoff { retries, first: Duration::from_millis(4), most: Duration::from_millis(40) }
}

static NEVER: AtomicBool = AtomicBool::new(false);

fn watch() -> Watch<'static> {
    Watch { progress: &|_, _| {}, stop: &NEVER }
}

fn settings(url: &str, cache: &Path) -> HubSettings {
    HubSettings {
        endpoint: url.to_owned(),
        cache: cache.to_path_buf(),
        token: None,
        offline: false,
        backoff: backoff(3),
    }
}

fn hub(url: &str, cache: &Path) -> Hub {
    Hub::new(settings(url, cache))
}
