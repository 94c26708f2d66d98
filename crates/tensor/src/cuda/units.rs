//! The kernel sources of the engine: one module each, with the headers they include.

use specforge_cuda::{Defines, Unit};

const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("kernels/common.cuh")),
    ("row_stats.cuh", include_str!("kernels/row_stats.cuh")),
    ("attention.cuh", include_str!("kernels/attention.cuh")),
    ("attention_forward.cuh", include_str!("kernels/attention_forward.cuh")),
    ("attention_backward.cuh", include_str!("kernels/attention_backward.cuh")),
    ("tensor_core.cuh", include_str!("kernels/tensor_core.cuh")),
    ("tensor_core_backward.cuh", include_str!("kernels/tensor_core_backward.cuh")),
    ("grouped.cuh", include_str!("kernels/grouped.cuh")),
    ("warpgroup.cuh", include_str!("kernels/warpgroup.cuh")),
    ("wgmma_backward.cuh", include_str!("kernels/wgmma_backward.cuh")),
];

macro_rules! units {
    ($($name:ident = $file:literal),* $(,)?) => {
        $(pub(crate) static $name: Unit =
            Unit { name: $file, source: include_str!(concat!("kernels/", $file, ".cu")), headers: HEADERS };)*
    };
}

units! {
    NORM = "norm",
    ROPE = "rope",
    MLP = "mlp",
    ROWS = "rows",
    LOSS = "loss",
    LOSS_SHARED = "loss_shared",
    ADAM = "adam",
    SKINNY = "skinny",
    FP8 = "fp8",
    MIXTURE = "mixture",
    GROUPED = "grouped",
    GROUPED_WGMMA = "grouped_wgmma",
    DELTA = "delta",
    ATTENTION_FORWARD = "attention_forward",
    ATTENTION_FORWARD_WGMMA = "attention_forward_wgmma",
    ATTENTION_BACKWARD = "attention_backward",
    ATTENTION_BACKWARD_WGMMA = "attention_backward_wgmma",
}

/// Macros of the sources that have none.
pub(crate) const PLAIN: Defines = &[];

macro_rules! head_dims {
    ($($dim:literal),*) => {
        /// Head sizes that attention takes: each is compiled by itself.
        pub(crate) static HEAD_DIMS: &[(usize, Defines)] = &[$(($dim, &[("HEAD_DIM", $dim)])),*];
        /// The same for the forward of targets that cap their scores.
        static CAPPED_HEAD_DIMS: &[(usize, Defines)] = &[$(($dim, &[("HEAD_DIM", $dim), ("CAPPED", 1)])),*];
    };
}

head_dims!(16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256);

/// Widths of queries and keys that the gated delta rule takes.
pub(crate) static DELTA_DIMS: &[(usize, Defines)] =
    &[(16, &[("KEY_DIM", 16)]), (64, &[("KEY_DIM", 64)]), (128, &[("KEY_DIM", 128)])];

/// The macros of a head size, if there are kernels for it.
pub(crate) fn head_dim(dim: usize) -> Option<Defines> {
    HEAD_DIMS.iter().find(|(known, _)| *known == dim).map(|(_, defines)| *defines)
}

/// The macros of a head size whose scores are capped.
pub(crate) fn capped_head_dim(dim: usize) -> Option<Defines> {
    CAPPED_HEAD_DIMS.iter().find(|(known, _)| *known == dim).map(|(_, defines)| *defines)
}

/// Heads of 256 on cards that give a block little shared memory (8.6, 8.9, 12.0): smaller tiles in the backward.
pub(crate) static SMALL_SHARED_256: Defines = &[("HEAD_DIM", 256), ("SMALL_SHARED", 1)];

/// Whether Hopper's attention kernels exist for a head size: forward, backward.
pub(crate) fn on_warpgroups(dim: usize) -> [bool; 2] {
    [matches!(dim, 64 | 128 | 256), matches!(dim, 64 | 128)]
}

/// Every source with its macros that an architecture uses, for compiling ahead of time: those of all head sizes that
/// models have, or of one.
pub fn units(hopper: bool, only: Option<usize>) -> Vec<(&'static Unit, Defines)> {
    let mut all: Vec<(&Unit, Defines)> =
        [&NORM, &ROPE, &MLP, &ROWS, &LOSS, &LOSS_SHARED, &ADAM, &SKINNY, &FP8, &MIXTURE]
            .map(|unit| (unit, PLAIN))
            .to_vec();
    all.push((if hopper { &GROUPED_WGMMA } else { &GROUPED }, PLAIN));
    all.extend(DELTA_DIMS.iter().map(|(_, defines)| (&DELTA, *defines)));
    if !hopper && only.is_none_or(|only| only == 256) {
        all.push((&ATTENTION_BACKWARD, SMALL_SHARED_256));
    }
    for &(dim, defines) in HEAD_DIMS.iter().filter(|(dim, _)| only.is_none_or(|only| only == *dim)) {
        let [forward, backward] = on_warpgroups(dim).map(|exists| exists && hopper);
        let forward = if forward { &ATTENTION_FORWARD_WGMMA } else { &ATTENTION_FORWARD };
        all.push((forward, defines));
        // The sizes of Gemma 2.
        all.extend(capped_head_dim(dim).filter(|_| matches!(dim, 128 | 256)).map(|capped| (forward, capped)));
        // Its smaller kernels serve the warpgroup ones too.
        all.push((&ATTENTION_BACKWARD, defines));
        if backward {
            all.push((&ATTENTION_BACKWARD_WGMMA, defines));
        }
    }
    all
}
