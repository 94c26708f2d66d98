//! The loss mask: supervised bytes of a text to supervised tokens, through the tokenizer's offsets.
//!
//! One rule: a token belongs to the span in which its first byte lies. A token that begins in the header and ends
//! in the answer is part of the prompt at inference, so it is not supervised; one that begins in the answer is,
//! even if it runs over the end. The one exception is a token that takes nothing but spaces from the header
//! (` Hello` after `Assistant: `): the prompt at inference has no such space, so the answer begins with that token.

use std::ops::Range;

use crate::named::Spans;

/// One byte per token, 1 where supervised. `offsets` are the tokens' bytes in `text`; with `last_turn_only` the
/// turns before the last one are left out.
pub fn loss_mask(text: &str, offsets: &[Range<usize>], spans: &Spans, last_turn_only: bool) -> Vec<u8> {
    let turns = match spans.turns.split_last() {
        Some((last, _)) if last_turn_only => std::slice::from_ref(last),
        _ => spans.turns.as_slice(),
    };
    offsets.iter().map(|token| u8::from(is_supervised(text, token, turns, &spans.ignored))).collect()
}

/// Number of supervised tokens.
pub(crate) fn supervised(loss_mask: &[u8]) -> usize {
    loss_mask.iter().map(|&bit| usize::from(bit)).sum()
}

fn is_supervised(text: &str, token: &Range<usize>, turns: &[Range<usize>], ignored: &[Range<usize>]) -> bool {
    let next = turns.partition_point(|turn| turn.start <= token.start);
    let inside = next > 0 && token.start < turns[next - 1].end;
    let inside = inside || turns.get(next).is_some_and(|turn| takes_only_spaces(text, token, turn));
    inside && !ignored.iter().any(|range| range.contains(&token.start))
}

/// Whether a token that begins before the turn has only spaces there, and more than spaces in the turn.
fn takes_only_spaces(text: &str, token: &Range<usize>, turn: &Range<usize>) -> bool {
    let (Some(before), Some(within)) = (text.get(token.start..turn.start), text.get(turn.start..token.end))
    else {
        return false;
    };
    turn.start < token.end && before.bytes().all(|byte| byte == b' ') && !within.trim().is_empty()
}
