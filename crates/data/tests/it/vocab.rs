//! Limits of the vocabulary map.

use specforge_data::{Error, RowRef, TokenCounts, Unseen, VocabMap};

fn counts(vocab_size: usize) -> TokenCounts {
    let row = RowRef { ids: &[5, 5, 2, 7, 1], loss_mask: &[1, 1, 1, 1, 0] };
    TokenCounts::of(vocab_size, [row]).unwrap()
}

#[test]
fn coverage_is_the_share_of_supervised_tokens() {
    let counts = counts(10);
    let map = VocabMap::build(&counts, 2, Unseen::Refuse).unwrap();
    assert_eq!(map.target_ids().collect::<Vec<_>>(), [2, 5]);
    assert_eq!(map.coverage(&counts), 0.75);
    assert_eq!((map.draft_vocab_size(), map.target_vocab_size()), (2, 10));
}

#[test]
fn too_large_a_draft_vocabulary_is_refused() {
    let error = VocabMap::build(&counts(10), 11, Unseen::Fill).unwrap_err();
    assert!(error.to_string().contains("larger than the target's vocabulary of 10"), "{error}");
    let error = VocabMap::build(&counts(10), 4, Unseen::Refuse).unwrap_err();
    assert!(matches!(error, Error::DraftVocabularyUnseen { draft: 4, seen: 3 }), "{error}");
}

#[test]
fn an_id_beyond_the_vocabulary_is_refused() {
    let row = RowRef { ids: &[5, 10], loss_mask: &[1, 1] };
    let error = TokenCounts::of(10, [row]).unwrap_err();
    assert!(matches!(error, Error::OutsideVocabulary { id: 10, row: 0, vocabulary: 10 }), "{error}");
}

#[test]
fn tables_must_agree() {
    let map = VocabMap::build(&counts(10), 3, Unseen::Fill).unwrap();
    let mut d2t = map.d2t.clone();
    d2t[1] += 1;
    assert!(matches!(VocabMap::from_tables(d2t, map.t2d), Err(Error::VocabMap { .. })));
}
