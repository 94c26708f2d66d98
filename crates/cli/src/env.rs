//! Every environment variable that the program reads.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use specforge_parallel::launch::{VARIABLES, Variables};
use specforge_remote::Backoff;
use specforge_remote::hub::{ENDPOINT, HubSettings};

/// Whether colour is unwanted (`NO_COLOR`, see no-color.org).
#[expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]
pub(crate) fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

#[expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Folders that may hold CUDA's libraries: `CUDA_HOME`, `CUDA_PATH`, and pip's `nvidia` folders of the Python that is
/// active or first on the path.
pub(crate) fn cuda_folders() -> Vec<PathBuf> {
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(PathBuf::from);
    let toolkits = toolkits.flat_map(|home| [home.join("lib64"), home.join("targets/x86_64-linux/lib")]);
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).map(PathBuf::from);
    let path = variable("PATH").unwrap_or_default();
    let pythons = std::env::split_paths(&path).filter(|folder| folder.join("python3").exists());
    let pythons = pythons.filter_map(|folder| folder.parent().map(Path::to_owned)).collect::<Vec<_>>();
    let wheels = active.chain(pythons).flat_map(|prefix| wheel_folders(&prefix));
    toolkits.chain(wheels).filter(|folder| folder.is_dir()).collect()
}

/// `lib/python*/site-packages/nvidia/*/lib` below a prefix; distributions say dist-packages.
fn wheel_folders(prefix: &Path) -> Vec<PathBuf> {
    let inside = |folder: PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let pythons = inside(prefix.join("lib")).into_iter();
    let packages =
        pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name)));
    packages.flat_map(|packages| inside(packages.join("nvidia"))).map(|package| package.join("lib")).collect()
}

/// Set for ranks that this program has started itself.
pub(crate) const CHILD: &str = "SPECFORGE_CHILD";

/// Whether this process is one of them.
pub(crate) fn is_child() -> bool {
    variable(CHILD).is_some()
}

/// What a launcher of several processes says of this one.
pub(crate) fn launch() -> Variables {
    let value = |name: &str| variable(name)?.into_string().ok();
    VARIABLES.iter().filter_map(|name| Some(((*name).to_owned(), value(name)?))).collect()
}

/// Where compiled kernels are kept: `SPECFORGE_CACHE`, or `specforge` in the user's cache folder.
pub(crate) fn kernel_cache() -> Option<PathBuf> {
    let own = variable("SPECFORGE_CACHE").map(PathBuf::from);
    let user = || {
        let home = || variable("HOME").map(|home| PathBuf::from(home).join(".cache"));
        variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|cache| cache.join("specforge"))
    };
    own.or_else(user).map(|cache| cache.join("kernels"))
}

/// The key for servers of the OpenAI interface.
pub(crate) fn openai_key() -> Option<String> {
    variable("OPENAI_API_KEY").map(|key| key.to_string_lossy().into_owned())
}

/// What the variables of the Hugging Face hub say, all of them those of its own programs: `HF_ENDPOINT` (a mirror),
/// `HF_HUB_CACHE` or `HF_HOME` (where the cache is), `HF_TOKEN` or the token that its programs keep, `HF_HUB_OFFLINE`.
pub(crate) fn hub() -> HubSettings {
    let text = |name: &str| variable(name).map(|value| value.to_string_lossy().trim().to_owned());
    let user = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let user = user.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let home = variable("HF_HOME").map(PathBuf::from);
    let home = home.unwrap_or_else(|| user.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface"));
    let cache = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(variable);
    let kept = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    let kept = || std::fs::read_to_string(kept).ok().map(|token| token.trim().to_owned());
    let is_set = |name: &str| {
        text(name)
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()))
    };
    HubSettings {
        endpoint: text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
        cache: cache.map_or_else(|| home.join("hub"), PathBuf::from),
        token: text("HF_TOKEN").or_else(kept).filter(|token| !token.is_empty()),
        offline: is_set("HF_HUB_OFFLINE"),
        backoff: Backoff::default(),
    }
}
