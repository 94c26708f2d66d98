//! What is done over HTTP: models from and to the Hugging Face hub ([`hub`]), and answers from servers of the OpenAI
//! interface ([`chat`]).
//!
//! One crate, because both are the same requests, time limits, retries and errors. It knows addresses, files and JSON;
//! no model, no recipe, and no environment: whoever calls says where the cache is and what the token.

mod backoff;
pub mod chat;
mod error;
mod http;
pub mod hub;

pub use backoff::Backoff;
pub use error::{Error, Result};
