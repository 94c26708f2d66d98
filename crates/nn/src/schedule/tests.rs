use specforge_testkit::{case_json, golden_case};

use super::*;

fn read(text: &str) -> ScheduleConfig {
    serde_json::from_str(text).unwrap()
}

/// The first steps beyond the horizon included.
fn factors(text: &str, total: u64) -> Vec<f64> {
    let config = read(text);
    config.check().unwrap();
    (0..total + 2).map(|step| config.lr_factor(step, total)).collect()
}

#[test]
fn golden_lr_schedule() {
    let Some(dir) = golden_case("lr_schedule") else { return };
    let schedules = case_json(dir.join("lr_schedule.json"))["schedules"].as_array().unwrap().clone();
    assert!(!schedules.is_empty());
    for schedule in schedules {
        let (base, total) =
            (schedule["base_lr"].as_f64().unwrap(), schedule["total_steps"].as_u64().unwrap());
        let settings = |compat| ScheduleConfig {
            kind: serde_json::from_value(schedule["scheduler"].clone()).unwrap(),
            warmup_ratio: schedule["warmup_ratio"].as_f64(),
            compat,
            ..ScheduleConfig::default()
        };
        for (compat, key) in [(None, "textbook_lr_at_step"), (Some(Compat::Specforge), "lr_used_at_step")] {
            let config = settings(compat);
            config.check().unwrap();
            for (step, expected) in schedule[key].as_array().unwrap().iter().enumerate() {
                let got = base * config.lr_factor(step as u64, total);
                // The textbook has no value beyond the horizon; ours is the floor.
                let expected = expected.as_f64().unwrap_or(0.0);
                assert!(
                    (got - expected).abs() <= 1e-12 * base,
                    "{key}[{step}] of {total}: {got}, want {expected}"
                );
            }
        }
    }
}

#[test]
fn every_kind_warms_up_and_ends_at_its_floor() {
    let third = 1.0 / 3.0;
    let check = |text: &str, total, expected: &[f64]| {
        let got = factors(text, total);
        assert_eq!(got.len(), expected.len(), "{text}");
        for (got, want) in got.iter().zip(expected) {
            assert!((got - want).abs() < 1e-12, "{text}: {got}, want {want}");
        }
    };
    check(r#"{"kind": "constant", "warmup-steps": 2}"#, 3, &[0.5, 1.0, 1.0, 1.0, 1.0]);
    check(r#"{"kind": "linear", "warmup-steps": 1}"#, 4, &[1.0, 1.0, 2.0 * third, third, 0.0, 0.0]);
    check(r#"{"kind": "linear", "warmup-ratio": 0, "min-lr-ratio": 0.5}"#, 2, &[1.0, 0.75, 0.5, 0.5]);
    check(r#"{"kind": "cosine", "warmup-ratio": 0.5}"#, 4, &[0.5, 1.0, 1.0, 0.5, 0.0, 0.0]);
    check(r#"{"warmup-steps": 0, "min-lr-ratio": 0.1}"#, 2, &[1.0, 0.55, 0.1, 0.1]);
    check(
        r#"{"kind": "wsd", "warmup-steps": 2, "decay-ratio": 0.4, "min-lr-ratio": 0.2}"#,
        5,
        &[0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2],
    );
    // A decay that would begin during warm-up begins after it.
    check(r#"{"kind": "wsd", "warmup-steps": 2, "decay-ratio": 1}"#, 4, &[0.5, 1.0, 1.0, 0.5, 0.0, 0.0]);
    check(r#"{"kind": "wsd", "warmup-steps": 0, "decay-ratio": 0}"#, 2, &[1.0, 1.0, 0.0, 0.0]);
}

#[test]
fn the_default_is_a_cosine_with_a_short_warmup() {
    let default = read("{}");
    assert_eq!(default, ScheduleConfig::default());
    assert_eq!(default.kind, ScheduleKind::Cosine);
    assert_eq!(default.lr_factor(0, 1000), 1.0 / 15.0);
    assert_eq!(default.lr_factor(14, 1000), 1.0);
    // Too short a run for warm-up: it starts with the largest rate.
    assert_eq!(default.lr_factor(0, 10), 1.0);
    assert_eq!(default.lr_factor(0, 0), 0.0);
    let text = serde_json::to_string(&default).unwrap();
    assert_eq!(text, r#"{"kind":"cosine","min-lr-ratio":0.0}"#);
    assert_eq!(read(&text), default);
}

#[test]
fn the_reproduced_defect_exceeds_the_textbook_and_is_finite() {
    let broken = read(r#"{"compat": "specforge", "warmup-steps": 0}"#);
    assert!(broken.lr_factor(0, 2) > 1.99);
    assert_eq!(broken.lr_factor(0, 1), 1.0);
    assert_eq!(broken.lr_factor(0, 0), 0.0);
    assert!((0..50).all(|step| broken.lr_factor(step, 1).is_finite()));
}

#[test]
fn wrong_settings_say_what_to_do() {
    for (text, message) in [
        (
            r#"{"warmup-ratio": 0.1, "warmup-steps": 5}"#,
            "warmup-ratio = 0.1: warmup-steps is given too; keep one of the two",
        ),
        (r#"{"warmup-ratio": 1.5}"#, "warmup-ratio = 1.5: a share of the horizon is between 0 and 1"),
        (r#"{"min-lr-ratio": -0.1}"#, "min-lr-ratio = -0.1: a share of the largest rate is between 0 and 1"),
        (
            r#"{"kind": "constant", "min-lr-ratio": 0.1}"#,
            "min-lr-ratio = 0.1: a constant schedule has no floor; remove it or change kind",
        ),
        (r#"{"decay-ratio": 0.1}"#, "decay-ratio = 0.1: only kind = \"wsd\" decays at the end; remove it"),
        (
            r#"{"kind": "wsd", "decay-ratio": 2}"#,
            "decay-ratio = 2: a share of the horizon is between 0 and 1",
        ),
        (
            r#"{"kind": "linear", "compat": "specforge"}"#,
            "compat = specforge: it knows only kind = \"cosine\" and \"constant\", without min-lr-ratio",
        ),
    ] {
        assert_eq!(read(text).check().unwrap_err().to_string(), message);
    }
    let unknown = serde_json::from_str::<ScheduleConfig>(r#"{"kind": "step"}"#).unwrap_err().to_string();
    assert!(
        unknown.contains("unknown variant `step`, expected one of `constant`, `linear`, `cosine`, `wsd`")
    );
    let unknown = serde_json::from_str::<ScheduleConfig>(r#"{"warmup_ratio": 0.1}"#).unwrap_err().to_string();
    assert!(unknown.contains("unknown field `warmup_ratio`"), "{unknown}");
}
