//! Cached decoding: continuations, trees, and taking back.

use serde_json::json;
use specforge_models::{Captured, KvCache, Target};

use crate::folder::{all, close, kinds, target, tokens};

const NONE: u32 = u32::MAX;

fn last(captured: Captured) -> Vec<f32> {
    captured.last_hidden.expect("asked for").to_f32()
}

/// The rows of the last hidden state of a sequence that is run at once, without a cache.
fn at_once(target: &Target, tokens: &[u32]) -> Vec<f32> {
    last(target.forward(&[tokens], &all(target)).unwrap())
}

#[test]
fn a_cached_continuation_equals_the_whole_sequence() {
    for (architecture, extra) in kinds() {
        // Frequencies that change with the length change the keys of the rows before, which a cache cannot.
        let rope_is_fixed = extra.get("rope_scaling").is_none();
        let target = target(architecture, &extra);
        let n = if rope_is_fixed { 30 } else { 12 };
        let (tokens, h) = (tokens(1, n), target.info().hidden_size);
        let mut cache = KvCache::new(&target, 4).unwrap();
        let mut got = Vec::new();
        for part in [&tokens[..5], &tokens[5..6], &tokens[6..9], &tokens[9..]] {
            let captured = target.extend(&mut cache, part, None, &all(&target)).unwrap();
            assert_eq!(captured.hidden_states.shape(), [part.len(), 3 * h]);
            got.extend(last(captured));
        }
        assert_eq!(cache.len(), n);
        close(architecture, &got, &at_once(&target, &tokens));
    }
}

#[test]
fn every_branch_of_a_tree_equals_its_chain() {
    // 0 - 1 - 3 - 5      4 - 6
    //   \ 2
    let parents = [NONE, 0, 0, 1, NONE, 3, 4];
    let branches: [&[usize]; 4] = [&[0, 1, 3, 5], &[0, 2], &[4, 6], &[0, 1]];
    for (architecture, extra) in kinds() {
        let target = target(architecture, &extra);
        let h = target.info().hidden_size;
        for prompt in [&tokens(2, 6)[..], &[]] {
            let nodes = tokens(3, parents.len());
            let mut cache = KvCache::new(&target, 20).unwrap();
            if !prompt.is_empty() {
                target.extend(&mut cache, prompt, None, &all(&target)).unwrap();
            }
            let n = cache.len();
            let tree = last(target.extend(&mut cache, &nodes, Some(&parents), &all(&target)).unwrap());
            for branch in branches {
                let chain: Vec<u32> = branch.iter().map(|&node| nodes[node]).collect();
                let whole = at_once(&target, &[prompt, &chain].concat());
                let got: Vec<f32> = branch.iter().flat_map(|&node| tree[node * h..][..h].to_vec()).collect();
                close(&format!("{architecture} {branch:?} on {n}"), &got, &whole[n * h..]);
                // What is kept is that chain's cache.
                let mut kept = cache.clone();
                kept.keep(n, branch).unwrap();
                assert_eq!(kept.len(), n + branch.len());
                let next = last(target.extend(&mut kept, &[9], None, &all(&target)).unwrap());
                let whole = at_once(&target, &[prompt, &chain, &[9]].concat());
                close(&format!("{architecture} after {branch:?}"), &next, &whole[whole.len() - h..]);
            }
        }
    }
}

#[test]
fn a_chain_given_by_parents_is_a_continuation() {
    let target = target("LlamaForCausalLM", &json!({}));
    let nodes = tokens(4, 5);
    let run = |parents: Option<&[u32]>| {
        let mut cache = KvCache::new(&target, 16).unwrap();
        target.extend(&mut cache, &tokens(5, 4), None, &all(&target)).unwrap();
        let got = last(target.extend(&mut cache, &nodes, parents, &all(&target)).unwrap());
        // A chain needs no settling, but may be cut to what was accepted.
        cache.keep(4, &[0, 1]).unwrap();
        assert_eq!(cache.len(), 6);
        (got, last(target.extend(&mut cache, &[3], None, &all(&target)).unwrap()))
    };
    assert_eq!(run(None), run(Some(&[NONE, 0, 1, 2, 3])));
}

#[test]
fn taking_back_restores_the_cache() {
    let target = target("Qwen3ForCausalLM", &json!({}));
    let mut cache = KvCache::new(&target, 16).unwrap();
    target.extend(&mut cache, &tokens(6, 8), None, &all(&target)).unwrap();
    let before = cache.clone();
    target.extend(&mut cache, &[1, 2, 3], Some(&[NONE, NONE, 1]), &all(&target)).unwrap();
    cache.truncate(8);
    let again = |cache: &KvCache| last(target.extend(&mut cache.clone(), &[5], None, &all(&target)).unwrap());
    assert_eq!(again(&cache), again(&before));
    // Nothing accepted is a truncation too, and an empty cache starts anew.
    target.extend(&mut cache, &[1, 2], Some(&[NONE, NONE]), &all(&target)).unwrap();
    cache.keep(8, &[]).unwrap();
    assert_eq!(again(&cache), again(&before));
    cache.truncate(0);
    assert!(cache.is_empty());
    assert_eq!(again(&cache), at_once(&target, &[5]));
}

/// Whatever was tried and taken back, a cache goes on like one that holds the same tokens and never knew others.
#[test]
fn a_cache_forgets_what_is_taken_back() {
    for (architecture, extra) in kinds() {
        let target = target(architecture, &extra);
        if extra.get("rope_scaling").is_some() {
            continue; // A longer attempt changes the keys before it.
        }
        let extend = |cache: &mut KvCache, part: &[u32], parents: Option<&[u32]>| {
            last(target.extend(cache, part, parents, &all(&target)).unwrap())
        };
        let (kept, tried) = (tokens(8, 12), tokens(9, 12));
        let mut cache = KvCache::new(&target, 30).unwrap();
        extend(&mut cache, &kept[..5], None);
        // Tokens of a chain, from its middle; all of one; and of a tree.
        extend(&mut cache, &[&kept[5..7], &tried[..4]].concat(), None);
        cache.keep(5, &[0, 1]).unwrap();
        extend(&mut cache, &tried[..3], None);
        cache.truncate(7);
        extend(&mut cache, &[tried[0], kept[7], tried[1], kept[8]], Some(&[NONE, NONE, 0, 1]));
        cache.keep(7, &[1, 3]).unwrap();
        // Far back, and the same tokens again.
        extend(&mut cache, &tried[..2], None);
        cache.truncate(3);
        extend(&mut cache, &kept[3..9], None);
        let next = extend(&mut cache, &kept[9..], None);
        let whole = at_once(&target, &kept);
        close(architecture, &next, &whole[9 * target.info().hidden_size..]);
    }
}

#[test]
fn wrong_uses_of_the_cache_are_refused_and_change_nothing() {
    let target = target("LlamaForCausalLM", &json!({}));
    let mut cache = KvCache::new(&target, 16).unwrap();
    target.extend(&mut cache, &tokens(7, 5), None, &all(&target)).unwrap();
    let check = |cache: &mut KvCache, tokens: &[u32], parents: Option<&[u32]>, expected: &str| {
        let len = cache.len();
        let message = target.extend(cache, tokens, parents, &all(&target)).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(cache.len(), len, "{message}");
    };
    check(&mut cache, &[1, 2], Some(&[NONE]), "1 parents for 2 tokens");
    check(&mut cache, &[1, 2], Some(&[NONE, 5]), "parent 5 of node 1 is not an earlier node");
    check(&mut cache, &[1, 99], None, "document 0: token 99 at 1 is outside the vocabulary of 50");
    check(&mut cache, &[], None, "has 0 tokens");
    check(&mut cache, &[1; 60], None, "has 65 tokens, expected 1 to 64");
    target.extend(&mut cache, &[1, 2, 3], Some(&[NONE, NONE, 1]), &all(&target)).unwrap();
    check(&mut cache, &[1], None, "ends with a tree of 3 nodes: keep() or truncate() comes first");
    let keep =
        |cache: &KvCache, n, accepted: &[usize]| cache.clone().keep(n, accepted).unwrap_err().to_string();
    assert!(keep(&cache, 4, &[0]).contains("keep after row 4, but the last extension started at row 5"));
    assert!(keep(&cache, 5, &[2]).contains("[2] are not a path of the tree"));
    assert!(keep(&cache, 5, &[0, 1]).contains("not a path"));
    assert!(keep(&cache, 5, &[3]).contains("not a path"));
    let other = crate::folder::target("LlamaForCausalLM", &json!({ "num_key_value_heads": 4 }));
    let message = other
        .extend(&mut KvCache::new(&target, 1).unwrap(), &[1], None, &all(&other))
        .unwrap_err()
        .to_string();
    assert!(message.contains("made for another target"), "{message}");
}
