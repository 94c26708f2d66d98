//! One file per command: its arguments on top, what it does below.

pub(crate) mod bench;
pub(crate) mod capture;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod info;
pub(crate) mod plan;
pub(crate) mod prepare;
pub(crate) mod regenerate;
pub(crate) mod train;
