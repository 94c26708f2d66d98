//! Comparing computed with expected numbers, with a message that leads to the wrong element.

/// Asserts `|got - want| <= atol + rtol * |want|` for every element.
///
/// Two NaN at the same place, and two equal infinities, count as equal. The message names the worst
/// element, its index, both values and how many elements are off.
pub fn assert_close(name: &str, got: &[f32], want: &[f32], atol: f32, rtol: f32) {
    let limit = |want: f64| f64::from(atol) + f64::from(rtol) * want.abs();
    check(name, got, want, limit, &format!("atol {atol:e} + rtol {rtol:e} * |want|"));
}

/// Asserts `|got - want| <= rel_to_max * max |want|` for every element.
///
/// The right measure for gradients and logits, whose small elements carry the rounding of the large ones.
pub fn assert_close_max(name: &str, got: &[f32], want: &[f32], rel_to_max: f32) {
    let max = want.iter().filter(|v| v.is_finite()).fold(0.0f64, |max, &v| max.max(f64::from(v).abs()));
    let limit = f64::from(rel_to_max) * max;
    check(name, got, want, |_| limit, &format!("{rel_to_max:e} * max |want| = {limit:e}"));
}

fn check(name: &str, got: &[f32], want: &[f32], limit: impl Fn(f64) -> f64, rule: &str) {
    assert_eq!(got.len(), want.len(), "{name}: {} elements, expected {}", got.len(), want.len());
    let mut off = 0;
    let mut worst = (0.0f64, 0);
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let difference = difference(got, want);
        let limit = limit(f64::from(want));
        // A difference of NaN (NaN on one side only) is as wrong as an infinite one.
        if difference == 0.0 || difference <= limit && limit.is_finite() {
            continue;
        }
        off += 1;
        let excess =
            if difference.is_nan() || !limit.is_finite() { f64::INFINITY } else { difference - limit };
        if excess > worst.0 {
            worst = (excess, index);
        }
    }
    let (_, at) = worst;
    assert!(
        off == 0,
        "{name}: {off} of {} elements differ by more than {rule}; worst at [{at}]: got {:e}, want {:e}, difference {:e}",
        got.len(),
        got[at],
        want[at],
        difference(got[at], want[at]),
    );
}

fn difference(got: f32, want: f32) -> f64 {
    if got == want || (got.is_nan() && want.is_nan()) {
        0.0
    } else {
        (f64::from(got) - f64::from(want)).abs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(f: impl Fn() + std::panic::UnwindSafe) -> Option<String> {
        std::panic::catch_unwind(f).err().map(|panic| panic.downcast_ref::<String>().unwrap().clone())
    }

    #[test]
    fn close_values_pass() {
        assert_close("x", &[1.0, f32::NAN, f32::INFINITY], &[1.000_01, f32::NAN, f32::INFINITY], 0.0, 1e-4);
        assert_close_max("x", &[0.01, 100.0], &[0.0, 100.0], 1e-3);
        assert_close("empty", &[], &[], 0.0, 0.0);
    }

    #[test]
    fn the_worst_element_is_named() {
        let message = fails(|| assert_close("y", &[1.0, 2.5, 3.1], &[1.0, 2.0, 3.0], 1e-3, 0.0)).unwrap();
        assert!(message.starts_with("y: 2 of 3 elements differ"), "{message}");
        assert!(message.contains("worst at [1]: got 2.5e0, want 2e0, difference 5e-1"), "{message}");
    }

    #[test]
    fn wrong_things_fail() {
        assert!(fails(|| assert_close("n", &[f32::NAN], &[1.0], 1e9, 1e9)).unwrap().contains("got NaN"));
        assert!(fails(|| assert_close("n", &[1.0], &[f32::NAN], 1e9, 1e9)).is_some());
        assert!(fails(|| assert_close("n", &[f32::INFINITY], &[1.0], 1e9, 0.0)).is_some());
        assert!(fails(|| assert_close_max("n", &[0.2, 100.0], &[0.0, 100.0], 1e-3)).is_some());
        assert!(fails(|| assert_close_max("n", &[1.0], &[0.0], 1e-3)).is_some());
        assert!(
            fails(|| assert_close("n", &[1.0], &[1.0, 2.0], 1.0, 0.0))
                .unwrap()
                .contains("1 elements, expected 2")
        );
    }
}
