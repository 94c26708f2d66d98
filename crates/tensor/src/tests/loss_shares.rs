//! The loss on ranks that have different rows of its groups, against one that has all of them.

use specforge_testkit::assert_close_max;

use super::alone::beside;
use super::loss::{Case, OBJECTIVES, Outcome};
use super::matrix;
use crate::{GroupLoss, LossRanks, LossRows, Params, Tape};

impl Case {
    /// Each group's figures where nothing is trained.
    fn evaluated(&self, ranks: LossRanks<'_>) -> Vec<GroupLoss> {
        let mut params = Params::new();
        let head = params.add("head", self.head.clone(), true);
        let tape = Tape::inference(&params);
        self.loss(&tape, (&tape.input(self.x.clone()), head), ranks).unwrap().wait().unwrap().groups
    }

    /// The draft rows of these numbers, on a rank of its own.
    fn part(&self, kept: &[usize]) -> Self {
        let pick = |all: &[u32]| kept.iter().map(|&r| all[r]).collect();
        let width = self.x.rows_cols().1;
        let x = kept.iter().flat_map(|&r| self.x.f32s()[r * width..(r + 1) * width].to_vec()).collect();
        let rows = LossRows {
            teacher_row: pick(&self.rows.teacher_row),
            group: pick(&self.rows.group),
            weight: kept.iter().map(|&r| self.rows.weight[r]).collect(),
            ..self.rows.clone()
        };
        Self { x: matrix(x, &[kept.len(), width]), rows, ..self.clone() }
    }
}

/// What each group's figures come to over both ranks.
fn check_groups(name: &str, got: &[Outcome; 2], want: &Outcome) {
    for (g, want) in want.groups.iter().enumerate() {
        let sum = |of: &dyn Fn(&GroupLoss) -> f64| got.iter().map(|run| of(&run.groups[g])).sum::<f64>();
        let near = |sum: f64, want: f64| (sum - want).abs() <= 1e-6 * want.abs();
        assert!(near(sum(&|g| g.loss), want.loss), "{name}, group {g}");
        assert!(near(sum(&|g| g.acceptance), want.acceptance), "{name}, group {g}");
        assert_eq!(sum(&|g| g.count), want.count, "{name}, group {g}");
    }
}

/// The gradient of the head is a sum over both ranks, that of the rows `kept` by each is its own.
fn check_gradients(name: &str, got: &[Outcome; 2], kept: &[Vec<usize>; 2], want: &Outcome) {
    let [first, second] = got.each_ref().map(|run| run.dhead.as_ref().unwrap().to_f32());
    let dhead: Vec<f32> = first.iter().zip(second).map(|(a, b)| a + b).collect();
    assert_close_max(&format!("{name}, head"), &dhead, &want.dhead.as_ref().unwrap().to_f32(), 1e-6);
    let (dx, width) = (want.dx.as_ref().unwrap(), want.dx.as_ref().unwrap().rows_cols().1);
    let row = |&r: &usize| dx.f32s()[r * width..(r + 1) * width].to_vec();
    let wanted: Vec<f32> = kept.iter().flatten().flat_map(row).collect();
    let dx = got.each_ref().map(|run| run.dx.as_ref().unwrap().to_f32()).concat();
    assert_close_max(&format!("{name}, rows"), &dx, &wanted, 1e-6);
}

fn check(name: &str, case: &Case, is_first: &dyn Fn(usize) -> bool) {
    let (first, second): (Vec<usize>, Vec<usize>) = (0..case.rows.group.len()).partition(|&r| is_first(r));
    let kept = [first, second];
    let parts = kept.each_ref().map(|rows| case.part(rows));
    let accepted = |part: &Case| part.run().unwrap().groups.iter().map(|g| g.acceptance).collect();
    let others = [beside(accepted(&parts[1])), beside(accepted(&parts[0]))];
    let ranks = |i: usize| LossRanks { heads: None, rows: Some(&others[i]) };
    let got = [0, 1].map(|i| parts[i].run_as(ranks(i)).unwrap());
    let want = case.run().unwrap();
    check_groups(name, &got, &want);
    check_gradients(name, &got, &kept, &want);
    for (i, got) in got.iter().enumerate() {
        assert_eq!(parts[i].evaluated(ranks(i)), got.groups, "{name}: as where something is trained");
    }
}

#[test]
fn parallel_shares_of_rows_add_up_to_the_loss() {
    for objective in OBJECTIVES {
        let three = Case::new(40, 8, 30, 2, objective);
        // A group of nobody's rows has a loss too, the lambda objective's constant.
        let mut two = three.clone();
        two.rows.group.iter_mut().for_each(|g| *g %= 2);
        two.rows.group_rows = vec![27, 13, 0];
        for case in [three, two] {
            let name = format!("{objective:?}, {:?}", case.rows.group_rows);
            check(&format!("{name}, every fourth"), &case, &|r| r % 4 == 1);
            check(&format!("{name}, nine"), &case, &|r| r < 9);
            check(&format!("{name}, none"), &case, &|_| false);
        }
    }
}
