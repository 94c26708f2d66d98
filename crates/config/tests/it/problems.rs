//! Every kind of mistake: named with its place and its way out, all of them at once.

use crate::{LEAST, parse, problems};

/// One mistake, and everything printed about it.
#[track_caller]
fn check(text: &str, expected: &str) {
    let found = problems(text, &[]);
    let printed: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(printed.join("\n---\n"), expected);
}

#[test]
fn unknown_keys_at_each_level_name_line_column_and_nearest_key() {
    check(
        &LEAST.replace("name = ", "treads = 2\nname = "),
        "recipe.toml:1:1: unknown key `treads`\n  1 | treads = 2\n    | ^^^^^^\n  hint: did you mean `threads`?",
    );
    check(
        &format!("{LEAST}[train]\n  epoch = 3\n"),
        "recipe.toml:8:3: unknown key `epoch` in [train]\n  8 |   epoch = 3\n    |   ^^^^^\n  hint: did you mean `epochs`?",
    );
    check(
        &format!("{LEAST}[train.optimizer]\nwieght-decay = 0.1\n"),
        "recipe.toml:8:1: unknown key `wieght-decay` in [train.optimizer]\n  8 | wieght-decay = 0.1\n    | ^^^^^^^^^^^^\n  hint: did you mean `weight-decay`?",
    );
    check(
        &format!("{LEAST}ttt-step = 3\n"),
        "recipe.toml:7:1: unknown key `ttt-step` in [method.eagle3]\n  7 | ttt-step = 3\n    | ^^^^^^^^\n  hint: did you mean `ttt-steps`?",
    );
    check(
        &format!("{LEAST}[evl]\ntopk = 1\n"),
        "recipe.toml:7:2: unknown key `evl`\n  7 | [evl]\n    |  ^^^\n  hint: did you mean `eval`?",
    );
    check(
        &format!("{LEAST}[data.template]\nnam = \"x\"\n"),
        "recipe.toml:8:1: unknown key `nam` in [data.template]\n  8 | nam = \"x\"\n    | ^^^\n  hint: did you mean `name`?",
    );
}

#[test]
fn a_key_in_the_wrong_table_is_sent_to_the_right_one() {
    check(
        &LEAST.replace("name = ", "max-length = 9\nname = "),
        "recipe.toml:1:1: unknown key `max-length`\n  1 | max-length = 9\n    | ^^^^^^^^^^\n  hint: `max-length` is a key of [data]",
    );
}

#[test]
fn an_unknown_method_lists_those_known() {
    check(
        &LEAST.replace("method.eagle3", "method.eagle4"),
        "recipe.toml:6:9: `method` has no `eagle4`; expected one of `eagle3`\n  6 | [method.eagle4]\n    |         ^^^^^^\n  hint: did you mean `eagle3`?",
    );
}

#[test]
fn there_is_one_method() {
    let cases = [
        ("[method.eagle3]\n[method.eagle4]", "`method`: expected one table in it, got several"),
        ("[method]", "`method`: expected one table in it, as [method.eagle3]"),
        ("[method]\neagle3 = 3", "`method`: expected a table, got integer `3`"),
    ];
    for (table, message) in cases {
        let found = problems(&LEAST.replace("[method.eagle3]", table), &[]);
        let messages: Vec<&str> = found.iter().map(|problem| &*problem.message).collect();
        assert_eq!(messages, [message], "{table}");
    }
    let text = format!("method = \"eagle3\"\n{}", LEAST.replace("[method.eagle3]", ""));
    let messages: Vec<String> = problems(&text, &[]).into_iter().map(|problem| problem.message).collect();
    assert_eq!(messages, ["`method`: expected a table, as [method.eagle3], got text"]);
}

#[test]
fn values_of_the_wrong_kind_say_what_is_expected() {
    let cases = [
        (
            "[train]\nepochs = \"three\"",
            "8:10",
            "`train.epochs`: expected a whole number, at least 0, got string \"three\"",
        ),
        (
            "[train]\nepochs = -1",
            "8:10",
            "`train.epochs`: expected a whole number, at least 0, got integer `-1`",
        ),
        ("[train]\nauto-resume = 1", "8:15", "`train.auto-resume`: expected true or false, got integer `1`"),
        (
            "[train.optimizer]\nlr = \"1e-4\"",
            "8:6",
            "`train.optimizer.lr`: expected a number, got string \"1e-4\"",
        ),
        ("[export]\npath = 3", "8:8", "`export.path`: expected text in quotes, got integer `3`"),
        (
            "[store]\nencoding = \"fp9\"",
            "8:12",
            "`store.encoding` has no `fp9`; expected one of `bf16`, `fp8`, `lossless`",
        ),
    ];
    for (lines, at, message) in cases {
        let found = problems(&format!("{LEAST}{lines}\n"), &[]);
        assert_eq!(found.len(), 1, "{lines}: {found:#?}");
        let place = found[0].place.as_ref().map(ToString::to_string);
        assert_eq!(
            (place.as_deref(), &*found[0].message),
            (Some(&*format!("recipe.toml:{at}")), message),
            "{lines}"
        );
    }
}

#[test]
fn values_out_of_range_name_the_range() {
    let cases = [
        ("ttt-steps = 0", "`method.eagle3.ttt-steps` = 0: expected 1 to 32"),
        (
            "draft-vocab-size = 0",
            "`method.eagle3.draft-vocab-size` = 0: expected 1 or more; leave it out to follow the target",
        ),
        ("[train]\nkeep = 0", "`train.keep`: expected at least 1, got 0"),
        ("[train]\nlog-every = 0", "`train.log-every`: expected at least 1, got 0"),
        ("[train]\nepochs = 0", "`train.epochs`: expected at least 1, got 0"),
        (
            "[train]\nepochs = 1\nmax-steps = 2",
            "`train.epochs` and `train.max-steps` are both set: one alone can say how long",
        ),
        (
            "[train]\ntokens-per-batch = 1000",
            "`train.tokens-per-batch` is 1000: a row of `data.max-length` = 2048 tokens would not fit",
        ),
        (
            "[train.optimizer]\nbetas = [0.9, 1.0]",
            "`train.optimizer.betas` = 1: a decay is at least 0 and below 1",
        ),
        (
            "[train.schedule]\nmin-lr-ratio = 2.0",
            "`train.schedule.min-lr-ratio` = 2: a share of the largest rate is between 0 and 1",
        ),
        ("[eval]\ntemperature = -1.0", "`eval.temperature`: expected from 0 to 100, got -1"),
        ("[eval]\ntopk = 0", "`eval.topk`: expected at least 1, got 0"),
        ("[eval]\ndraft-tokens = 4", "`eval.draft-tokens`: expected 6 for a chain of 5, or nothing, got 4"),
        (
            "[eval]\ntopk = 2\ndraft-tokens = 99",
            "`eval.draft-tokens`: expected 2 to 19 for a tree of 5 steps with topk 2, got 99",
        ),
        ("[store]\nshard-mib = 0", "`store.shard-mib`: expected at least 1, got 0"),
        (
            "[store]\nencoding = \"fp8\"\n[capture]\ndtype = \"f32\"",
            "`store.encoding` is for bf16 states, but `capture.dtype` is f32",
        ),
    ];
    for (lines, message) in cases {
        let found = problems(&format!("{LEAST}{lines}\n"), &[]);
        let messages: Vec<&str> = found.iter().map(|problem| &*problem.message).collect();
        assert_eq!(messages, [message]);
        assert!(found[0].place.is_some(), "{lines}: no place");
    }
    for (key, value) in
        [("max-length", "1"), ("min-supervised", "0"), ("eval-fraction", "1.0"), ("max-rows", "0")]
    {
        let text = LEAST.replace("[method", &format!("{key} = {value}\n[method"));
        assert_eq!(problems(&text, &[])[0].key, format!("data.{key}"));
    }
    assert_eq!(problems(&LEAST.replace("tiny", "a/b"), &[])[0].key, "name");
    assert_eq!(problems(&LEAST.replace("[target]", "device = \"tpu\"\n[target]"), &[])[0].key, "device");
}

#[test]
fn keys_of_the_data_that_contradict_each_other() {
    let inline = "[data.template.inline]\nassistant-header = \"A:\"\nend-of-turn = [\"B\"]";
    let cases = [
        (
            "[data.template]\nname = \"qwen\"\n[data.template.inline]\nassistant-header = \"A:\"\nstop = [\"B\"]",
            "`data.template.name` and `data.template.inline` are both set: one alone can say how turns are found",
        ),
        (
            "[data.template.inline]\nassistant-header = \"A:\"",
            "`data.template.inline` needs an assistant-header and at least one end-of-turn or stop, none empty",
        ),
        ("[data.columns]\nquestion = \"q\"", "`data.columns`: missing field `answer`"),
        (
            "[data.columns]\nquestion = \"q\"\nanswer = \"a\"\nanser = \"b\"",
            "unknown key `anser` in [data.columns]",
        ),
    ];
    for (lines, message) in cases {
        let found = problems(&format!("{LEAST}{lines}\n"), &[]);
        let messages: Vec<&str> = found.iter().map(|problem| &*problem.message).collect();
        assert_eq!(messages, [message]);
        assert!(found[0].place.is_some(), "{lines}: no place");
    }
    parse(&format!("{LEAST}{inline}\n"), &["data.mask-compat=specforge"]).unwrap();
    let found = problems(LEAST, &["data.mask-compat=specforge"]);
    assert_eq!(found[0].message, "`data.mask-compat` is \"specforge\", which knows named templates alone");
    let columns = format!("{LEAST}[data.columns]\nquestion = \"q\"\nanswer = \"a\"\n");
    let found = problems(&columns, &["data.format=text"]);
    assert!(found[0].message.starts_with("`data.columns` are for `data.format`"), "{}", found[0].message);
}

#[test]
fn all_problems_come_at_once_in_the_order_of_the_file() {
    let text = r#"nam = "x"
mode = "onlin"
seed = "no"
[train]
epoch = 3
keep = 0
[train.schedule]
kind = "cosin"
[method.eagle3]
ttt-stepz = 7
loss-mask = 5
"#;
    let found = problems(text, &[]);
    let keys: Vec<&str> = found.iter().map(|problem| &*problem.key).collect();
    // `name` was meant by `nam`, so that it is missing is not said too.
    let expected = [
        "nam",
        "mode",
        "seed",
        "train.epoch",
        "train.keep",
        "train.schedule.kind",
        "method.eagle3.ttt-stepz",
        "method.eagle3.loss-mask",
        "data.conversations",
        "target.path",
    ];
    assert_eq!(keys, expected);
}

#[test]
fn an_empty_recipe_says_what_is_needed() {
    let found = problems("", &[]);
    let mut keys: Vec<&str> = found.iter().map(|problem| &*problem.key).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["data.conversations", "method", "name", "target.path"]);
}

#[test]
fn what_is_not_toml_is_placed() {
    let found = problems("name = \n[train\n", &[]);
    assert!(found.len() >= 2, "{found:#?}");
    assert!(found[0].to_string().starts_with("recipe.toml:1:"), "{}", found[0]);
    let twice = problems(&format!("{LEAST}ttt-steps = 3\nttt-steps = 4\n"), &[]);
    assert!(twice[0].to_string().starts_with("recipe.toml:8:1: not TOML: duplicate key"), "{}", twice[0]);
}

#[test]
fn columns_count_characters() {
    let found = problems(
        &LEAST
            .replace("\"model\"", "\"mödel\", pth = 1")
            .replace("[target]\npath = ", "target = { path = ")
            .replace("1\n", "1 }\n"),
        &[],
    );
    assert!(
        found[0].to_string().starts_with("recipe.toml:2:28: unknown key `pth` in [target]"),
        "{}",
        found[0]
    );
}

#[test]
fn the_error_counts_and_lists() {
    let error = parse("nam = 1", &[]).unwrap_err().to_string();
    assert!(error.starts_with("recipe.toml: 4 problems\n\nrecipe.toml:1:1: unknown key `nam`"), "{error}");
}
