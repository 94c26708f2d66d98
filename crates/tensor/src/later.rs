//! Results that a device hands over when it gets to them.

use std::fmt;

use crate::Result;

/// A value that may still be computed. Reading it waits; not reading it costs nothing.
pub struct Later<T>(State<T>);

enum State<T> {
    Ready(T),
    Waiting(Box<dyn FnOnce() -> Result<T> + Send>),
}

impl<T: Send + 'static> Later<T> {
    /// A value that is there.
    pub fn ready(value: T) -> Self {
        Self(State::Ready(value))
    }

    /// A value that `wait` waits for.
    pub fn new(wait: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        Self(State::Waiting(Box::new(wait)))
    }

    /// The value; waits for the device if it has to.
    pub fn wait(self) -> Result<T> {
        match self.0 {
            State::Ready(value) => Ok(value),
            State::Waiting(wait) => wait(),
        }
    }

    /// The value, if no device has to be waited for.
    pub fn peek(&self) -> Option<&T> {
        match &self.0 {
            State::Ready(value) => Some(value),
            State::Waiting(_) => None,
        }
    }

    /// What `f` makes of the value, once it is there.
    pub fn map<U: Send + 'static>(self, f: impl FnOnce(T) -> U + Send + 'static) -> Later<U> {
        match self.0 {
            State::Ready(value) => Later::ready(f(value)),
            State::Waiting(wait) => Later::new(move || wait().map(f)),
        }
    }
}

impl<T> fmt::Debug for Later<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self.0, State::Ready(_)) { "Later(ready)" } else { "Later(waiting)" })
    }
}
