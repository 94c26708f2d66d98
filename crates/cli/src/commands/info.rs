//! `specforge info`: what a folder is, or what this machine has.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use specforge_data::Prepared;
use specforge_models::TargetInfo;
use specforge_nn::weights::Weights;
use specforge_store::{Reader, Report};
use specforge_train::Checkpoint;

use crate::show::{Progress, bytes, print, table};
use crate::{gpu, hub, machine};

/// Tell what a folder is: a target, a feature store, a checkpoint, a draft, a prepared set; without one, this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder, or owner/name on the hub.
    path: Option<PathBuf>,
    /// For a store: read every byte and name what is damaged.
    #[arg(long, requires = "path")]
    verify: bool,
    /// Compile all GPU kernels for this machine's card now, so that no run has to.
    #[arg(long, conflicts_with_all = ["path", "verify"])]
    warm: bool,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.warm {
        gpu::warm()?;
    }
    let path = match &args.path {
        Some(written) => Some(hub::folder(written)?.unwrap_or_else(|| written.clone())),
        None => None,
    };
    let mut facts = match &path {
        None => this_machine(),
        Some(path) => of(path)?,
    };
    let found = match (&path, args.verify) {
        (Some(path), true) => Some((path, verify(path)?)),
        _ => None,
    };
    if args.json {
        if let Some((_, found)) = &found {
            facts["verified"] = json!({
                "records": found.records, "bytes": found.bytes, "damaged": found.damaged
            });
        }
        print(serde_json::to_string_pretty(&facts)?)?;
    } else {
        let shown = facts.as_object().into_iter().flatten();
        let rows: Vec<(&str, String)> = shown.map(|(key, value)| (key.as_str(), plain(key, value))).collect();
        print(table(&rows))?;
    }
    found.map_or(Ok(()), |(path, found)| conclude(path, &found, args.json))
}

fn plain(key: &str, value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Number(n) if key.ends_with("bytes") => bytes(n.as_u64().unwrap_or(0)),
        other => other.to_string(),
    }
}

fn this_machine() -> Value {
    let mut facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "threads": machine::threads(),
        "memory_available_bytes": machine::available_memory(),
    });
    if let (Value::Object(all), Value::Object(gpu)) = (&mut facts, gpu::facts()) {
        all.extend(gpu);
    }
    facts
}

fn of(path: &Path) -> Result<Value> {
    if !path.is_dir() {
        bail!("{}: there is no such folder", path.display());
    }
    if path.join("state.json").exists() {
        return checkpoint(path);
    }
    if path.join("index.bin").exists() && path.join("rows.bin").exists() {
        return prepared(path);
    }
    if path.join("manifest.json").exists() {
        return store(path);
    }
    if path.join("config.json").exists() {
        return model(path);
    }
    bail!(
        "{}: not a target, store, checkpoint, draft or prepared set (none of config.json, manifest.json, state.json is in it)",
        path.display()
    )
}

fn checkpoint(path: &Path) -> Result<Value> {
    let checkpoint = Checkpoint::open(path)?;
    let weights = Weights::open(checkpoint.draft())?;
    let state = &checkpoint.state;
    Ok(json!({
        "kind": "checkpoint",
        "step": state.position.step,
        "epoch": state.position.epoch,
        "tokens": state.tokens,
        "best_step": state.best.map(|b| b.step),
        "best_acceptance_length": state.best.map(|b| b.acceptance_length),
        "tensors": weights.names().count(),
    }))
}

fn prepared(path: &Path) -> Result<Value> {
    let data = Prepared::open(path)?;
    let report = data.report();
    Ok(json!({
        "kind": "prepared set",
        "rows": data.len(),
        "tokens": report.tokens,
        "supervised_share": report.supervised_share(),
        "dropped": report.rows_dropped(),
        "hash": data.hash(),
    }))
}

fn store(path: &Path) -> Result<Value> {
    let summary = serde_json::to_value(Reader::open(path)?.summary())?;
    let mut facts = json!({ "kind": "feature store" });
    if let (Some(facts), Value::Object(summary)) = (facts.as_object_mut(), summary) {
        facts.extend(summary);
    }
    Ok(facts)
}

fn model(path: &Path) -> Result<Value> {
    let config: Value = serde_json::from_slice(&fs_err::read(path.join("config.json"))?)?;
    if config["architectures"][0].as_str().is_some_and(|a| a.contains("Eagle3")) {
        let report = specforge_export::check(path, None);
        return Ok(json!({
            "kind": "EAGLE3 draft",
            "hidden_size": config["hidden_size"],
            "draft_vocab_size": config["draft_vocab_size"],
            "tensors": report.tensors,
            "values": report.elements,
            "servable": report.is_servable(),
            "problems": report.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }));
    }
    let info = TargetInfo::read(path)?;
    let weights = Weights::open(path)?;
    let size: usize = weights.names().filter_map(|n| weights.get(n)).map(|v| v.bytes.len()).sum();
    Ok(json!({
        "kind": "target",
        "architecture": info.architecture,
        "layers": info.n_layers,
        "hidden_size": info.hidden_size,
        "vocab_size": info.vocab_size,
        "heads": format!("{} / {} of {}", info.n_heads, info.n_kv_heads, info.head_dim),
        "max_position_embeddings": info.max_position_embeddings,
        "dtype": info.dtype,
        "weights_bytes": size,
        "fingerprint": weights.fingerprint(),
    }))
}

/// Reads every byte of a store.
fn verify(path: &Path) -> Result<Report> {
    let reader = Reader::open(path)?;
    let progress = Progress::new("verify", true);
    let report = reader.verify(&|done, total| progress.set(done, total));
    progress.done();
    Ok(report?)
}

/// Says what was found, and fails if that is damage.
fn conclude(path: &Path, found: &Report, as_json: bool) -> Result<()> {
    if !as_json {
        let damaged = |damage| print(format_args!("damaged: {}", serde_json::to_string(damage)?));
        found.damaged.iter().try_for_each(damaged)?;
    }
    if !found.damaged.is_empty() {
        bail!(
            "{}: {} of {} records are damaged; delete the shards named above and the manifest-*.json of their writer, then run the capture again",
            path.display(),
            found.damaged.len(),
            found.records
        );
    }
    if as_json {
        return Ok(());
    }
    print(format_args!("verified: {} records, {}", found.records, bytes(found.bytes)))
}
