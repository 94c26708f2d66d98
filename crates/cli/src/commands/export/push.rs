//! An exported folder up to the hub, with a card that says what it is and how to serve it.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use specforge_config::RunPlan;
use specforge_data::Prepared;
use specforge_remote::hub::{Hub, RepoId, Upload, UploadFile};

use crate::setup::RecipeArgs;
use crate::{env, hub};

/// Where to.
pub(super) fn repository(text: &str) -> Result<RepoId> {
    let id = RepoId::parse(text).filter(|id| text == id.name());
    id.with_context(|| format!("--push {text}: expected owner/name, a repository of the hub"))
}

/// Uploads all files of the folder and the card as one commit; returns the repository's address.
pub(super) fn push(id: &RepoId, private: bool, folder: &Path, card: &str) -> Result<String> {
    let mut files = vec![UploadFile::Text(card.to_owned(), "README.md".to_owned())];
    let mut names = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    files.extend(names.into_iter().map(|name| UploadFile::Local(folder.join(&name), name)));
    let message = concat!("Draft trained with specforge ", env!("CARGO_PKG_VERSION"));
    let hub = Hub::new(env::hub());
    let upload = Upload { id, private, message, files };
    Ok(hub::watched("upload", |watch| hub.upload(&upload, watch))?)
}

/// The model card. Figures are those of the run's summary, if the exported checkpoint is the one that was measured.
pub(super) fn card(
    id: &RepoId,
    recipe: &RecipeArgs,
    plan: &RunPlan,
    data: &Prepared,
    measured: bool,
) -> Result<String> {
    let target = hub::name(&plan.target.path);
    let summary = if measured { summary(plan) } else { Value::Null };
    let method = plan.method.name();
    let base = if target.contains('/') { format!("base_model: {target}\n") } else { String::new() };
    let sources: Vec<String> = plan.data.conversations.iter().map(|source| hub::name(&source.path)).collect();
    let mut facts = vec![
        ("target", target.clone()),
        ("method", method.to_owned()),
        (
            "conversations",
            format!("{}: {} rows, {} tokens", sources.join(", "), data.len(), data.report().tokens),
        ),
    ];
    if let Some(steps) = summary["steps"].as_u64() {
        facts.push(("trained", format!("{steps} steps, {} tokens", summary["tokens"])));
    }
    if let Some(length) = summary["acceptance_length"].as_f64() {
        let eval = &plan.eval;
        let how = format!(
            "{} draft steps, top-k {}, temperature {}",
            eval.draft_steps, eval.topk, eval.temperature
        );
        facts.push((
            "acceptance length",
            format!("{length:.2} ({how}; generated tokens per call of the target)"),
        ));
    }
    let facts: Vec<String> =
        facts.into_iter().map(|(name, value)| format!("| {name} | {value} |\n")).collect();
    let text = fs_err::read_to_string(&recipe.recipe)?;
    let sets: Vec<String> = recipe.sets.iter().map(|set| format!("# --set {set}\n")).collect();
    let (facts, sets) = (facts.concat(), sets.concat());
    let eval = &plan.eval;
    Ok(format!(
        "---\n{base}tags:\n- speculative-decoding\n- {method}\n- sglang\n---\n\n# {}\n\nA draft model for speculative \
         decoding: it proposes tokens, the target verifies them, and the output is the target's own.\n\n| | |\n| --- | --- \
         |\n{facts}\n## Serve\n\n```sh\npython -m sglang.launch_server --model {target} --speculative-algorithm EAGLE3 \\\n    \
         --speculative-draft-model-path {} --speculative-num-steps {} \\\n    --speculative-eagle-topk {} \
         --speculative-num-draft-tokens {}\n```\n\n## Recipe\n\nTrained with specforge {}:\n\n```toml\n{sets}{}\n```\n",
        id.name(),
        id.name(),
        eval.draft_steps,
        eval.topk,
        eval.draft_tokens,
        env!("CARGO_PKG_VERSION"),
        text.trim_end(),
    ))
}

fn summary(plan: &RunPlan) -> Value {
    let text = fs_err::read(plan.run_dir.join("summary.json"));
    text.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}
