//! Golden exports byte for byte, folders written and read back, and every kind of damage named.

mod check;
mod draft;
mod folders;
mod golden;
mod write;
