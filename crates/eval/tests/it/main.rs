//! Speculative decoding with a tiny random target: the text is the target's own, and what is counted is what happened.

#[cfg(test)]
mod acceptance;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod lossless;
mod ranks;
#[cfg(test)]
mod sampled;
#[cfg(test)]
mod support;
