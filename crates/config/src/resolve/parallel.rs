//! The `[parallel]` table.

use super::Check;
use crate::run::ParallelConfig;

pub(super) fn plan(parallel: ParallelConfig, check: &mut Check<'_>) -> ParallelConfig {
    let ParallelConfig { data, shards, sequence, tensor, timeout, ranks_in_process, .. } = parallel;
    check.at_least("parallel.data", data.unwrap_or(1), 1);
    check.at_most("parallel.data", data.unwrap_or(1), 1 << 16);
    check.at_least("parallel.timeout", timeout, 1);
    check.at_most("parallel.timeout", timeout, 7 * 24 * 3600);
    shard_count(shards, data, check);
    check.at_least("parallel.sequence", sequence, 1);
    check.at_most("parallel.sequence", sequence, 1 << 10);
    if tensor != 1 {
        let expected =
            "1 (this version deals rows and their tokens to ranks, but trains with whole matrices)";
        check.range("parallel.tensor", expected, tensor);
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
