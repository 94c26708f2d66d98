//! Where the end-to-end tests compute.

/// `SPECFORGE_TEST_DEVICE` (`cuda` on a machine with a GPU), else `cpu`: what a test expects must not depend on what
/// the machine happens to have.
#[expect(
    clippy::disallowed_methods,
    reason = "tests have no command line: the environment is the only way to run them on another device"
)]
pub fn test_device() -> String {
    std::env::var("SPECFORGE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}
