//! Every kernel source compiles for the oldest card that is supported, for Hopper and for Blackwell. It takes NVRTC and
//! no card.

use rayon::prelude::*;
use specforge_cuda::{Architecture, Compiler, Defines, Unit};

use crate::cuda::units;

/// The architectures that this compiler knows.
fn architectures(compiler: &Compiler) -> Vec<Architecture> {
    let names = ["sm_80", "sm_90a", "sm_100"];
    let known = names.iter().filter(|name| **name != "sm_100" || compiler.version() >= (12, 8));
    known.map(|name| Architecture::named(name)).collect()
}

fn compile(compiler: &Compiler, unit: &Unit, defines: Defines, architecture: &Architecture) {
    let cubin =
        compiler.compile(unit, defines, architecture).unwrap_or_else(|error| panic!("{defines:?} {error}"));
    assert!(cubin.starts_with(b"\x7fELF"), "{} for {} is no machine code", unit.name, architecture.name());
}

#[test]
fn every_kernel_compiles() {
    let compiler = match Compiler::new() {
        Ok(compiler) => compiler,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let tasks: Vec<_> = architectures(&compiler)
        .into_iter()
        .flat_map(|architecture| {
            let all = units(architecture.is_hopper(), None);
            all.into_iter().map(move |(unit, defines)| (unit, defines, architecture.clone()))
        })
        .collect();
    // One at a time per thread: the largest heads take as long as all the rest.
    tasks.par_iter().with_max_len(1).for_each(|(unit, defines, architecture)| {
        compile(&compiler, unit, defines, architecture);
    });
}
