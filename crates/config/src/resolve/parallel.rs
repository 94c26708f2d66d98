//! The `[parallel]` table.

use super::Check;
use crate::run::{Mode, OnOom, ParallelConfig};

pub(super) fn plan(
    parallel: ParallelConfig,
    (mode, on_oom): (Mode, OnOom),
    check: &mut Check<'_>,
) -> ParallelConfig {
    let ParallelConfig { data, shards, sequence, tensor, timeout, ranks_in_process, .. } = parallel;
    check.at_least("parallel.data", data.unwrap_or(1), 1);
    check.at_most("parallel.data", data.unwrap_or(1), 1 << 16);
    check.at_least("parallel.timeout", timeout, 1);
    check.at_most("parallel.timeout", timeout, 7 * 24 * 3600);
    shard_count(shards, data, check);
    check.at_least("parallel.sequence", sequence, 1);
    check.at_most("parallel.sequence", sequence, 1 << 10);
    check.at_least("parallel.tensor", tensor, 1);
    check.at_most("parallel.tensor", tensor, 1 << 10);
    if on_oom == OnOom::Shrink && sequence.max(tensor) > 1 {
        let message =
            "`train.on-oom` is \"shrink\": ranks that share a batch have to take it in the same portions";
        let help = "set it to \"error\", or parallel.sequence and parallel.tensor to 1";
        check.fail("train.on-oom", message.to_owned(), Some(help));
    }
    if ranks_in_process && data.is_none() {
        check.missing("parallel.data", "`ranks-in-process` starts that many threads", "[parallel] data = 2");
    }
    target(&parallel, mode, check);
    ParallelConfig { rendezvous: parallel.rendezvous.map(|path| check.path(path)), ..parallel }
}

fn shard_count(shards: Option<usize>, data: Option<usize>, check: &mut Check<'_>) {
    let Some(shards) = shards else { return };
    check.at_least("parallel.shards", shards, 1);
    if let Some(data) = data.filter(|data| shards == 0 || data % shards != 0) {
        check.range("parallel.shards", &format!("a divisor of `data`, which is {data}"), shards);
    }
}

/// Where the target lies.
fn target(parallel: &ParallelConfig, mode: Mode, check: &mut Check<'_>) {
    check.at_least("parallel.target-tensor", parallel.target_tensor.unwrap_or(1), 1);
    check.at_most("parallel.target-tensor", parallel.target_tensor.unwrap_or(1), 1 << 10);
    check.at_most("parallel.target-ranks", parallel.target_ranks, 1 << 16);
    let (of_target, of_batch) = (parallel.of_target(), parallel.of_batch());
    if of_target == 0 || of_batch == 0 {
        return;
    }
    if parallel.target_ranks > 0 {
        return target_apart(parallel, mode, check);
    }
    if !of_target.is_multiple_of(of_batch) && !of_batch.is_multiple_of(of_target) {
        let expected = format!("a multiple or a divisor of `sequence` x `tensor`, which is {of_batch}");
        check.range("parallel.target-tensor", &expected, of_target);
    }
    if let Some(ranks) = parallel.data.map(|data| data * of_batch).filter(|n| !n.is_multiple_of(of_target)) {
        let expected = format!("a divisor of the {ranks} ranks of `data` x `sequence` x `tensor`");
        check.range("parallel.target-tensor", &expected, of_target);
    }
}

/// The target on ranks of its own.
fn target_apart(parallel: &ParallelConfig, mode: Mode, check: &mut Check<'_>) {
    let (ranks, of_target) = (parallel.target_ranks, parallel.of_target());
    if mode != Mode::Online {
        let why =
            "ranks of the target's own compute features while others train, which is `mode` = \"online\"";
        check.fail("parallel.target-ranks", format!("`parallel.target-ranks` is {ranks}: {why}"), None);
    }
    if !ranks.is_multiple_of(of_target) {
        let expected = format!("a multiple of `target-tensor`, which is {of_target}");
        return check.range("parallel.target-ranks", &expected, ranks);
    }
    let copies = ranks / of_target;
    if let Some(data) = parallel.data.filter(|data| !data.is_multiple_of(copies)) {
        let message = format!(
            "`parallel.target-ranks` = {ranks} are {copies} copies of the target, each for as many of the batches that are \
             trained on at once: expected a divisor of `data` = {data}"
        );
        check.fail(
            "parallel.target-ranks",
            message,
            Some("share a copy among more ranks with parallel.target-tensor"),
        );
    }
}
