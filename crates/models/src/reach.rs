//! How far back a query sees.

/// Which keys before a query it sees, by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// All.
    All,
    /// The last so many, itself included.
    Window(usize),
    /// Those in its own chunk; chunks of this size follow each other from position 0.
    Chunk(usize),
}

impl Reach {
    /// The first position that a query at position `at` sees.
    pub(crate) fn start(self, at: usize) -> usize {
        match self {
            Self::All => 0,
            Self::Window(window) => (at + 1).saturating_sub(window),
            Self::Chunk(size) => at / size * size,
        }
    }
}

impl From<Option<usize>> for Reach {
    fn from(window: Option<usize>) -> Self {
        window.map_or(Self::All, Self::Window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_slide_and_chunks_stay() {
        let starts = |reach: Reach| [0, 3, 4, 9].map(|at| reach.start(at));
        assert_eq!(starts(Reach::All), [0; 4]);
        assert_eq!(starts(Some(3).into()), [0, 1, 2, 7]);
        assert_eq!(starts(Reach::Chunk(4)), [0, 0, 4, 8]);
    }
}
