//! The reference of all keys, made from the doc comments of the structs that read them, so that the manual cannot say
//! anything else than the code. [`page`] is `docs/reference/recipe.md`.

mod source;

use std::fmt::Write;

use serde_json::Value;
use specforge_methods::MethodConfig;

use crate::run::RunConfig;
use source::{Field, enumeration, structure};

/// A key of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The table it stands in, as `train.optimizer`; empty at the top level.
    pub table: &'static str,
    /// Its name.
    pub name: String,
    /// What kind of value it takes, as "whole number".
    pub kind: String,
    /// The default as TOML; `None` if nothing is set.
    pub default: Option<String>,
    /// What it does.
    pub meaning: String,
}

/// A table of a recipe and the struct that reads it.
struct Table {
    name: &'static str,
    source: &'static str,
    structure: &'static str,
}

const RUN: &str = include_str!("run.rs");
const PARALLEL: &str = include_str!("run/parallel.rs");
const TRAINING: &str = include_str!("run/training.rs");
const EVALUATION: &str = include_str!("run/evaluation.rs");
// The tables of other crates are documented where they are read.
const TEMPLATE: &str = include_str!("../../data/src/template.rs");
const NAMED: &str = include_str!("../../data/src/named.rs");
const COLUMNS: &str = include_str!("../../data/src/columns.rs");
const PREPARE: &str = include_str!("../../data/src/prepare.rs");
const STORE: &str = include_str!("../../store/src/schema.rs");
const EAGLE3: &str = include_str!("../../methods/src/eagle3/config.rs");
const OPTIMIZER: &str = include_str!("../../nn/src/optimizer/config.rs");
const SCHEDULE: &str = include_str!("../../nn/src/schedule.rs");

const TABLES: [Table; 15] = [
    Table { name: "", source: RUN, structure: "RunConfig" },
    Table { name: "target", source: RUN, structure: "TargetConfig" },
    Table { name: "data", source: RUN, structure: "DataConfig" },
    Table { name: "data.columns", source: COLUMNS, structure: "Columns" },
    Table { name: "data.template", source: TEMPLATE, structure: "TemplateOptions" },
    Table { name: "data.template.inline", source: NAMED, structure: "NamedTemplate" },
    Table { name: "capture", source: RUN, structure: "CaptureConfig" },
    Table { name: "store", source: RUN, structure: "StoreConfig" },
    Table { name: "method.eagle3", source: EAGLE3, structure: "Config" },
    Table { name: "train", source: TRAINING, structure: "TrainConfig" },
    Table { name: "train.optimizer", source: OPTIMIZER, structure: "AdamWConfig" },
    Table { name: "train.schedule", source: SCHEDULE, structure: "ScheduleConfig" },
    Table { name: "parallel", source: PARALLEL, structure: "ParallelConfig" },
    Table { name: "eval", source: EVALUATION, structure: "EvalConfig" },
    Table { name: "export", source: EVALUATION, structure: "ExportConfig" },
];

/// Files in which the enums of the keys are looked up.
const ENUMS: [&str; 7] = [RUN, TRAINING, PARALLEL, PREPARE, STORE, EAGLE3, SCHEDULE];

const HEAD: &str = "\
# Recipe reference

<!-- Generated from the doc comments by `cargo xtask gen`; edit those instead. -->

A recipe is one TOML file that says everything about a run.
An unknown key is an error that names the nearest known one; all problems of a recipe are reported at once.
`--set path=value` replaces a value, as `--set train.max-steps=100`; the value is TOML, and text needs no quotes.
Relative paths are relative to the current directory of the command, not to the recipe file.
A key without a default is absent unless it is set.
";

/// All keys, table by table.
pub fn keys() -> Vec<Key> {
    let defaults = defaults();
    TABLES.iter().flat_map(|table| table_keys(table, &defaults)).collect()
}

/// The reference page.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    let defaults = defaults();
    for table in &TABLES {
        let title =
            if table.name.is_empty() { "Top level".to_owned() } else { format!("`[{}]`", table.name) };
        let about = structure(table.source, table.structure).map(|found| found.doc).unwrap_or_default();
        let _ = write!(
            page,
            "\n## {title}\n\n{}\n\n| key | value | default | meaning |\n|---|---|---|---|\n",
            link_free(&about)
        );
        for Key { name, kind, default, meaning, .. } in table_keys(table, &defaults) {
            let default = default.map(|value| format!("`{value}`")).unwrap_or_default();
            let _ = writeln!(page, "| `{name}` | {kind} | {default} | {} |", meaning.replace('|', "\\|"));
        }
    }
    page
}

fn table_keys(table: &Table, defaults: &Value) -> Vec<Key> {
    let fields = structure(table.source, table.structure).map(|found| found.items).unwrap_or_default();
    let parts = table.name.split('.').filter(|part| !part.is_empty());
    let values = parts.fold(defaults, |value, part| &value[part]);
    let is_table = |field: &Field| {
        let path =
            if table.name.is_empty() { field.name.clone() } else { format!("{}.{}", table.name, field.name) };
        field.name == "method" || TABLES.iter().any(|other| other.name == path)
    };
    fields.into_iter().filter(|field| !is_table(field)).map(|field| key(table.name, field, values)).collect()
}

fn key(table: &'static str, field: Field, values: &Value) -> Key {
    let inner =
        field.kind.strip_prefix("Option<").and_then(|kind| kind.strip_suffix('>')).unwrap_or(&field.kind);
    let mut meaning = link_free(&field.doc);
    let kind = if let Some(choice) = ENUMS.iter().find_map(|source| enumeration(source, inner)) {
        let each: Vec<String> =
            choice.items.iter().map(|item| format!("`{}`: {}", item.name, link_free(&item.doc))).collect();
        meaning = format!("{meaning}<br>{}", each.join("<br>"));
        choice.items.iter().map(|item| format!("`\"{}\"`", item.name)).collect::<Vec<_>>().join(", ")
    } else {
        kind(inner).to_owned()
    };
    Key { table, default: toml(&values[&field.name]), name: field.name, kind, meaning }
}

fn kind(rust: &str) -> &'static str {
    match rust {
        "bool" => "true or false",
        "f64" | "f32" => "number",
        "usize" | "u64" | "u32" => "whole number",
        "PathBuf" => "path",
        "String" => "text",
        "Vec<Source>" => "list of paths or of `{ path, weight }`",
        "Vec<String>" => "list of texts",
        "Vec<usize>" => "list of whole numbers",
        "[f64; 2]" => "two numbers",
        "Map<String, serde_json::Value>" | "SpecforgeStrings" => "table",
        // A test holds every kind against this list.
        _ => "?",
    }
}

/// The defaults of everything, the methods' included.
fn defaults() -> Value {
    let eagle3 = MethodConfig::Eagle3(specforge_methods::eagle3::Config::default());
    let config = RunConfig { method: Some(eagle3), ..RunConfig::default() };
    serde_json::to_value(config).expect("defaults are plain data with text keys")
}

/// A default as TOML writes it.
fn toml(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Object(_) => Some("{}".to_owned()),
        // Exponents are easier to read than many zeros.
        Value::Number(number) if number.as_f64().is_some_and(|v| v != 0.0 && v.abs() < 1e-3) => {
            number.as_f64().map(|v| format!("{v:e}"))
        }
        other => Some(other.to_string().replace(',', ", ")),
    }
}

/// Links of rustdoc mean nothing on the page.
fn link_free(doc: &str) -> String {
    doc.replace("[`", "`").replace("`]", "`")
}
