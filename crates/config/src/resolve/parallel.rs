//! The `[parallel]` table.

use super::Check;
use crate::run::{OnOom, ParallelConfig};

pub(super) fn plan(parallel: ParallelConfig, on_oom: OnOom, check: &mut Check<'_>) -> ParallelConfig {
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
    ParallelConfig { rendezvous: parallel.rendezvous.map(|path| check.path(path)), ..parallel }
}

fn shard_count(shards: Option<usize>, data: Option<usize>, check: &mut Check<'_>) {
    let Some(shards) = shards else { return };
    check.at_least("parallel.shards", shards, 1);
    if let Some(data) = data.filter(|data| shards == 0 || data % shards != 0) {
        check.range("parallel.shards", &format!("a divisor of `data`, which is {data}"), shards);
    }
}
