//! Every environment variable that the program reads.

/// Whether colour is unwanted (`NO_COLOR`, see no-color.org).
#[expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]
pub(crate) fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}
