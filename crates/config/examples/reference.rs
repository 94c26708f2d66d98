//! Prints the recipe reference; `cargo xtask gen` writes it to `docs/reference/recipe.md`.
#![expect(clippy::print_stdout, reason = "the page is what it is run for")]

fn main() {
    print!("{}", specforge_config::reference::page());
}
