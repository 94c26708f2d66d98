//! The `specforge` command.
fn main() {}
