//! `--set path=value`.

use specforge_config::{Mode, Origin};

use crate::{LEAST, parse, problems};

#[test]
fn arguments_replace_the_file_and_later_ones_earlier_ones() {
    let text = format!("{LEAST}ttt-steps = 3\n[train]\nmax-steps = 5\n");
    let recipe =
        parse(&text, &["train.max-steps=7", "seed = 3", "train.max-steps=9", "mode=offline"]).unwrap();
    assert_eq!(recipe.config.train.max_steps, Some(9));
    assert_eq!((recipe.plan.seed, recipe.plan.mode), (3, Mode::Offline));
    assert_eq!(recipe.provenance.origin("train.max-steps"), Origin::Set);
    assert_eq!(recipe.provenance.origin("method.eagle3.ttt-steps"), Origin::Line(7));
    assert_eq!(recipe.provenance.origin("train.keep"), Origin::Default);
}

#[test]
fn values_are_toml_or_text() {
    let sets = [
        "name=other",
        "data.conversations=[\"a.jsonl\", \"b.jsonl\"]",
        "target.path='x y'",
        "export.path=out/a=b",
    ];
    let recipe = parse(LEAST, &sets).unwrap();
    assert_eq!(recipe.plan.name, "other");
    assert_eq!(recipe.plan.data.conversations.len(), 2);
    assert_eq!(recipe.config.target.path.unwrap().to_str(), Some("x y"));
    assert_eq!(recipe.config.export.path.unwrap().to_str(), Some("out/a=b"));
}

#[test]
fn problems_name_the_argument() {
    let cases = [
        (
            "train.epoch=3",
            "--set train.epoch=3: unknown key `epoch` in [train]\n  hint: did you mean `epochs`?",
        ),
        (
            "train.epochs=many",
            "--set train.epochs=many: `train.epochs`: expected a whole number, at least 0, got string \"many\"",
        ),
        ("train.keep=0", "--set train.keep=0: `train.keep`: expected at least 1, got 0"),
        (
            "mode=nowhere",
            "--set mode=nowhere: `mode` has no `nowhere`; expected one of `online`, `offline`, `cache`",
        ),
        (
            "seed",
            "--set seed: expected path=value with a TOML value\n  hint: write it as --set train.max-steps=100 or --set mode=offline",
        ),
    ];
    for (argument, expected) in cases {
        let found = problems(LEAST, &["seed=1", argument]);
        let printed: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(printed, [expected]);
    }
    for argument in ["seed=", "data.conversations=[\"a\"", "name=\"a", "=3"] {
        assert_eq!(problems(LEAST, &[argument]).len(), 1, "{argument}");
    }
}

#[test]
fn an_argument_can_mend_the_file() {
    assert_eq!(
        parse(&format!("{LEAST}[train]\nkeep = \"x\"\n"), &["train.keep=2"]).unwrap().plan.train.keep,
        2
    );
}
