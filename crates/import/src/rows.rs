//! Finding the rows that a file has the features of.
//!
//! Files are matched by their tokens: names and numbers are those of another program's batches. A target reads from
//! left to right, so that a file has the features of every row that its tokens begin with: of the row itself, with
//! padding behind it or cut off later.

/// Rows by their tokens.
#[derive(Debug)]
pub struct RowIndex<'a> {
    /// Ascending by tokens.
    rows: Vec<(&'a [u32], usize)>,
}

impl<'a> RowIndex<'a> {
    /// Of rows and their numbers.
    pub fn new(rows: impl IntoIterator<Item = (&'a [u32], usize)>) -> Self {
        let mut rows: Vec<_> = rows.into_iter().collect();
        rows.sort_unstable();
        Self { rows }
    }

    /// The numbers of all rows that `tokens` begin with, ascending.
    pub fn begun_by(&self, tokens: &[u32]) -> Vec<usize> {
        let (mut found, mut rest) = (Vec::new(), tokens);
        while !rest.is_empty() {
            // Whatever begins `rest` sorts before it, and the nearest row before it shares the most with it.
            let end = self.rows.partition_point(|(row, _)| *row <= rest);
            let Some(&(nearest, _)) = end.checked_sub(1).and_then(|last| self.rows.get(last)) else { break };
            let common = nearest.iter().zip(rest).take_while(|(a, b)| a == b).count();
            if common < nearest.len() {
                rest = &rest[..common];
                continue;
            }
            let start = self.rows.partition_point(|(row, _)| *row < nearest);
            found.extend(self.rows[start..end].iter().map(|(_, number)| *number));
            rest = &rest[..common.saturating_sub(1)];
        }
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use specforge_testkit::Lcg;

    use super::*;

    #[test]
    fn every_row_that_begins_a_file_is_found() {
        let mut lcg = Lcg::new(5);
        for _ in 0..200 {
            let mut draw = |most| (0..=lcg.below(most)).map(|_| lcg.below(2) as u32).collect::<Vec<u32>>();
            let rows: Vec<Vec<u32>> = (0..12).map(|_| draw(5)).collect();
            let file = draw(8);
            let index = RowIndex::new(rows.iter().enumerate().map(|(i, row)| (row.as_slice(), i)));
            let expected: Vec<usize> = (0..rows.len()).filter(|&i| file.starts_with(&rows[i])).collect();
            assert_eq!(index.begun_by(&file), expected, "{file:?} of {rows:?}");
        }
    }
}
