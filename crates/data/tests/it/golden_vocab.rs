//! The draft vocabulary of the golden cases.

use serde_json::Value;
use specforge_data::{Error, RowRef, TokenCounts, Unseen, VocabMap};
use specforge_testkit::golden_case;

#[test]
fn golden_vocab_mapping() {
    let Some(path) = golden_case("vocab_mapping/vocab_mapping.json") else { return };
    let cases: Value = serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap();
    for case in cases["cases"].as_array().unwrap() {
        check(case);
    }
}

fn check(case: &Value) {
    let name = case["name"].as_str().unwrap();
    let size = |key: &str| case[key].as_u64().map(|size| size as usize);
    let max_length = size("max_length").unwrap_or(usize::MAX);
    let mut counts = TokenCounts::new(size("target_vocab_size").unwrap());
    for sample in case["samples"].as_array().unwrap() {
        let ids: Vec<u32> = numbers(&sample["input_ids"]).map(|id| id as u32).take(max_length).collect();
        let loss_mask: Vec<u8> =
            numbers(&sample["loss_mask"]).map(|bit| bit as u8).take(max_length).collect();
        counts.add(RowRef { ids: &ids, loss_mask: &loss_mask }).unwrap();
    }
    let seen: Vec<(i64, i64)> = counts.iter().map(|(id, count)| (i64::from(id), count as i64)).collect();
    let expected = case["counts_in_first_seen_order"].as_array().unwrap();
    let expected: Vec<(i64, i64)> =
        expected.iter().map(|pair| (pair[0].as_i64().unwrap(), pair[1].as_i64().unwrap())).collect();
    assert_eq!(seen, expected, "{name}: counts");

    let draft = size("draft_vocab_size").unwrap();
    let map = VocabMap::build(&counts, draft, Unseen::Fill).unwrap();
    assert_eq!(map.d2t, numbers(&case["d2t"]).collect::<Vec<_>>(), "{name}: d2t");
    let t2d: Vec<i64> = map.t2d.iter().map(|taken| i64::from(*taken)).collect();
    assert_eq!(t2d, numbers(&case["t2d"]).collect::<Vec<_>>(), "{name}: t2d");
    let ids: Vec<i64> = map.target_ids().map(i64::from).collect();
    assert_eq!(ids, numbers(&case["selected_target_ids"]).collect::<Vec<_>>(), "{name}: ids");
    assert_eq!(VocabMap::from_tables(map.d2t.clone(), map.t2d.clone()).unwrap(), map);

    let refused = VocabMap::build(&counts, draft, Unseen::Refuse);
    if draft > counts.distinct() {
        assert!(matches!(refused, Err(Error::DraftVocabularyUnseen { .. })), "{name}: {refused:?}");
    } else {
        assert_eq!(refused.unwrap(), map, "{name}");
    }
}

fn numbers(value: &Value) -> impl Iterator<Item = i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap())
}
