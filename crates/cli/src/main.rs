//! The `specforge` command: argv, dispatch, and what an error looks like.

#[cfg(not(test))]
mod allocator;
mod commands;
mod env;
mod gpu;
#[cfg(test)]
mod heap;
mod hub;
mod launch;
mod lock;
mod machine;
mod ranks;
mod setup;
mod show;
mod warm_start;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::show::note;

// Tests count the heap instead.
#[cfg(not(test))]
#[global_allocator]
static ALLOCATOR: allocator::BySize = allocator::BySize;

/// Train draft models for speculative decoding, and hand them to SGLang as they are.
///
/// A recipe (a TOML file) says what to train on what: `specforge train recipes/quickstart.toml`. Results go to
/// stdout, everything else to stderr. Exit code 0: done; 1: something in the input; 2: a failure of ours.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Plan(commands::plan::Args),
    Prepare(commands::prepare::Args),
    Regenerate(commands::regenerate::Args),
    Capture(commands::capture::Args),
    Import(commands::import::Args),
    Train(commands::train::Args),
    Eval(commands::eval::Args),
    Export(commands::export::Args),
    Info(commands::info::Args),
    Bench(commands::bench::Args),
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(message) => {
            // Help goes to stdout, a wrong argument to stderr.
            let _ = message.print();
            return if message.use_stderr() { ExitCode::from(1) } else { ExitCode::SUCCESS };
        }
    };
    #[cfg(not(test))]
    allocator::configure();
    gpu::configure();
    let run = || match args.command {
        Command::Plan(args) => commands::plan::run(&args),
        Command::Prepare(args) => commands::prepare::run(&args),
        Command::Regenerate(args) => commands::regenerate::run(&args),
        Command::Capture(args) => commands::capture::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Info(args) => commands::info::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
    };
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    // A failure is told by whoever has it.
    show::quiet(false);
    match ran {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            note!("error: {error:#}");
            ExitCode::from(1)
        }
        Err(payload) if payload.is::<specforge_tensor::Error>() => {
            let error = payload.downcast::<specforge_tensor::Error>().map(|e| e.to_string());
            note!("error: {}", error.unwrap_or_default());
            ExitCode::from(1)
        }
        Err(_) => {
            note!(
                "error: this is a failure of specforge, not of your input; please report it with the lines above"
            );
            ExitCode::from(2)
        }
    }
}

/// Whether whoever read our output has had enough, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
