//! From [`RunConfig`] to [`RunPlan`]: defaults that follow other keys, absolute paths, and every check of a value. All
//! problems are noted; the plan is made in any case, and thrown away if there are any.
//!
//! Every table is taken apart in full, so that a new key that nobody resolves does not compile.

mod parallel;

use std::path::{Component, Path, PathBuf};

use specforge_data::{MaskCompat, NamedTemplate, RowFormat, Source, TemplateOptions};
use specforge_methods::MethodConfig;
use specforge_nn::optimizer;
use specforge_store::Encoding;

use crate::error::Problem;
use crate::plan::{DataPlan, EvalPlan, ExportPlan, Length, RunPlan, StorePlan, TargetPlan, TrainPlan};
use crate::provenance::Provenance;
use crate::run::{
    CaptureConfig, CaptureDType, DataConfig, DataFormat, EvalConfig, ExportConfig, RunConfig, StoreConfig,
    TargetConfig, TrainConfig,
};

/// Tokens of a tree that SGLang verifies at once when nothing else is asked for.
const TREE_TOKENS: usize = 8;

/// Resolves what could be read. Relative paths start at `directory`. There is no plan without a method.
pub(crate) fn resolve(
    config: RunConfig,
    provenance: &Provenance,
    directory: &Path,
) -> (Option<RunPlan>, Vec<Problem>) {
    let mut check = Check { provenance, directory, problems: Vec::new() };
    let plan = run(config, &mut check);
    (plan, check.problems)
}

fn run(config: RunConfig, check: &mut Check<'_>) -> Option<RunPlan> {
    let RunConfig {
        name,
        output_dir,
        mode,
        device,
        seed,
        threads,
        target,
        data,
        capture,
        store,
        method,
        train,
        parallel,
        eval,
        export,
    } = config;
    let name = run_name(name, check);
    let output_dir = check.path(output_dir);
    let run_dir = output_dir.join(&name);
    check.at_most("threads", threads, 4096);
    check.at_most("seed", seed, i64::MAX as u64);
    let data = data_plan(data, &output_dir, check);
    let store = store_plan(store, &capture, &run_dir, check);
    let train = train_plan(train, data.max_length, check);
    let parallel = parallel::plan(parallel, (mode, train.on_oom), check);
    let eval = eval_plan(eval, data.eval_fraction, check);
    let export = export_plan(export, &run_dir, check);
    let target = target_plan(target, check);
    Some(RunPlan {
        name,
        run_dir,
        mode,
        device,
        seed,
        threads,
        target,
        data,
        capture,
        store,
        method: required_method(method, check)?,
        train,
        parallel,
        eval,
        export,
    })
}

fn run_name(name: Option<String>, check: &mut Check<'_>) -> String {
    let Some(name) = name else {
        check.missing("name", "the run needs a name", "name = \"my-draft\"");
        return String::new();
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(legal) {
        let message =
            format!("`name` becomes a folder: expected letters, digits, `.`, `_`, `-`, got \"{name}\"");
        check.fail("name", message, None);
    }
    name
}

fn target_plan(target: TargetConfig, check: &mut Check<'_>) -> TargetPlan {
    let TargetConfig { path, dtype } = target;
    if path.is_none() {
        check.missing(
            "target.path",
            "there is no target",
            "[target] path = \"folder of a Hugging Face model\"",
        );
    }
    TargetPlan { path: check.path(path.unwrap_or_default()), dtype }
}

fn required_method(method: Option<MethodConfig>, check: &mut Check<'_>) -> Option<MethodConfig> {
    if let Some(method) = &method {
        check.method(method);
    } else {
        check.missing("method", "there is no draft method", "add a table [method.eagle3]; it may be empty");
    }
    method
}

fn data_plan(data: DataConfig, output_dir: &Path, check: &mut Check<'_>) -> DataPlan {
    let DataConfig {
        conversations,
        format,
        columns,
        mut template,
        mask_compat,
        max_length,
        min_supervised,
        last_turn_only,
        row_per_turn,
        deduplicate,
        on_error,
        max_rows,
        eval_fraction,
        cache_dir,
    } = data;
    if conversations.is_empty() {
        let hint = "[data] conversations = [\"file.jsonl\"]";
        check.missing("data.conversations", "there is nothing to train on", hint);
    }
    check.at_least("data.max-length", max_length, 2);
    check.at_most("data.max-length", max_length, 1 << 24);
    check.at_least("data.min-supervised", min_supervised, 1);
    check.at_most("data.min-supervised", min_supervised, max_length);
    check.at_least("data.max-rows", max_rows.unwrap_or(1), 1);
    if !(0.0..1.0).contains(&eval_fraction) {
        check.range("data.eval-fraction", "from 0 to below 1", eval_fraction);
    }
    template.table = template.table.map(|path| check.path(path));
    template.file = template.file.map(|path| check.path(path));
    check_template(&template, mask_compat, check);
    if columns.is_some() && !matches!(format, DataFormat::Auto | DataFormat::Instructions) {
        let message = "`data.columns` are for `data.format` = \"instructions\", but it is another".to_owned();
        check.fail("data.columns", message, Some("remove one of the two"));
    }
    DataPlan {
        conversations: conversations.into_iter().map(|source| check.source(source)).collect(),
        format: row_format(format),
        columns,
        template,
        mask_compat,
        max_length,
        min_supervised,
        last_turn_only,
        row_per_turn,
        deduplicate,
        on_error,
        max_rows,
        eval_fraction,
        cache_dir: cache_dir.map_or_else(|| output_dir.join("cache"), |path| check.path(path)),
    }
}

fn check_template(template: &TemplateOptions, mask_compat: MaskCompat, check: &mut Check<'_>) {
    if template.name.is_some() && template.inline.is_some() {
        let message = "`data.template.name` and `data.template.inline` are both set: one alone can say how turns are found";
        check.fail("data.template.name", message.to_owned(), Some("remove one of the two"));
    }
    if let Some(problem) = template.inline.as_ref().and_then(NamedTemplate::incomplete) {
        check.fail("data.template.inline", format!("`data.template.inline` {problem}"), None);
    }
    if mask_compat == MaskCompat::Specforge && template.name.is_none() && template.inline.is_none() {
        let message = "`data.mask-compat` is \"specforge\", which knows named templates alone".to_owned();
        check.fail("data.mask-compat", message, Some("set data.template.name"));
    }
}

fn row_format(format: DataFormat) -> Option<RowFormat> {
    match format {
        DataFormat::Auto => None,
        DataFormat::Conversations => Some(RowFormat::Conversations),
        DataFormat::Instructions => Some(RowFormat::Instructions),
        DataFormat::Text => Some(RowFormat::Text),
        DataFormat::Tokens => Some(RowFormat::Tokens),
    }
}

fn store_plan(
    store: StoreConfig,
    capture: &CaptureConfig,
    run_dir: &Path,
    check: &mut Check<'_>,
) -> StorePlan {
    let StoreConfig { path, encoding, shard_mib } = store;
    let CaptureConfig { dtype } = capture;
    check.at_least("store.shard-mib", shard_mib, 1);
    check.at_most("store.shard-mib", shard_mib, 1 << 20);
    if *dtype == CaptureDType::F32 && encoding != Encoding::Bf16 {
        let message = "`store.encoding` is for bf16 states, but `capture.dtype` is f32".to_owned();
        check.fail("store.encoding", message, Some("remove one of the two"));
    }
    StorePlan {
        path: path.map_or_else(|| run_dir.join("features"), |path| check.path(path)),
        encoding,
        shard_bytes: shard_mib << 20,
    }
}

fn train_plan(train: TrainConfig, max_length: usize, check: &mut Check<'_>) -> TrainPlan {
    let TrainConfig {
        epochs,
        max_steps,
        tokens_per_batch,
        accumulation,
        on_oom,
        log_every,
        eval_every,
        save_every,
        keep,
        auto_resume,
        warm_start,
        optimizer,
        schedule,
    } = train;
    if tokens_per_batch < max_length {
        let message = format!(
            "`train.tokens-per-batch` is {tokens_per_batch}: a row of `data.max-length` = {max_length} tokens would not fit"
        );
        check.fail("train.tokens-per-batch", message, Some("raise it or lower data.max-length"));
    }
    check.at_least("train.accumulation", accumulation, 1);
    check.at_least("train.log-every", log_every, 1);
    check.at_least("train.keep", keep, 1);
    check.component("train.optimizer", optimizer.check());
    check.component("train.schedule", schedule.check());
    TrainPlan {
        length: length(epochs, max_steps, check),
        tokens_per_batch,
        accumulation,
        on_oom,
        log_every,
        eval_every: (eval_every > 0).then_some(eval_every),
        save_every: (save_every > 0).then_some(save_every),
        keep,
        auto_resume,
        warm_start: warm_start.map(|path| check.path(path)),
        optimizer,
        schedule,
    }
}

fn length(epochs: Option<u64>, max_steps: Option<u64>, check: &mut Check<'_>) -> Length {
    check.at_least("train.epochs", epochs.unwrap_or(1), 1);
    check.at_least("train.max-steps", max_steps.unwrap_or(1), 1);
    match (epochs, max_steps) {
        (Some(_), Some(steps)) => {
            let message =
                "`train.epochs` and `train.max-steps` are both set: one alone can say how long".to_owned();
            check.fail("train.max-steps", message, Some("remove one of the two"));
            Length::MaxSteps(steps)
        }
        (None, Some(steps)) => Length::MaxSteps(steps),
        (epochs, None) => Length::Epochs(epochs.unwrap_or(1)),
    }
}

fn eval_plan(eval: EvalConfig, eval_fraction: f64, check: &mut Check<'_>) -> EvalPlan {
    let EvalConfig {
        prompts,
        max_prompts,
        training_prompts,
        max_new_tokens,
        draft_steps,
        topk,
        draft_tokens,
        temperature,
    } = eval;
    if prompts.is_none() && eval_fraction == 0.0 {
        let hint = "set eval.prompts, or data.eval-fraction above 0";
        check.missing("eval.prompts", "there are no prompts: nothing is held out and no file is named", hint);
    }
    check.at_least("eval.max-prompts", max_prompts, 1);
    check.at_least("eval.max-new-tokens", max_new_tokens, 1);
    check.at_least("eval.draft-steps", draft_steps, 1);
    check.at_most("eval.draft-steps", draft_steps, 64);
    check.at_least("eval.topk", topk, 1);
    check.at_most("eval.topk", topk, 64);
    if !(0.0..=100.0).contains(&temperature) {
        check.range("eval.temperature", "from 0 to 100", temperature);
    }
    EvalPlan {
        prompts: prompts.map(|path| check.path(path)),
        max_prompts,
        training_prompts,
        max_new_tokens,
        draft_steps,
        topk,
        draft_tokens: draft_token_count(draft_steps.clamp(1, 64), topk.clamp(1, 64), draft_tokens, check),
        temperature,
    }
}

/// A chain verifies all of its tokens and the one before. A tree offers `topk` tokens in its first step and `topk` for
/// each of `topk` in every further one (Li et al., 2024, arXiv 2406.16858), of which the best are verified.
fn draft_token_count(steps: usize, topk: usize, asked: Option<usize>, check: &mut Check<'_>) -> usize {
    let most = 1 + topk + (steps - 1) * topk * topk;
    let Some(asked) = asked else { return if topk == 1 { most } else { most.min(TREE_TOKENS) } };
    if topk == 1 && asked != most {
        check.range("eval.draft-tokens", &format!("{most} for a chain of {steps}, or nothing"), asked);
    } else if !(2..=most).contains(&asked) {
        let expected = format!("2 to {most} for a tree of {steps} steps with topk {topk}");
        check.range("eval.draft-tokens", &expected, asked);
    }
    asked
}

fn export_plan(export: ExportConfig, run_dir: &Path, check: &mut Check<'_>) -> ExportPlan {
    let ExportConfig { path, embeddings } = export;
    ExportPlan { path: path.map_or_else(|| run_dir.join("export"), |path| check.path(path)), embeddings }
}

/// The problems found so far, and what it takes to note one.
struct Check<'a> {
    provenance: &'a Provenance,
    directory: &'a Path,
    problems: Vec<Problem>,
}

impl Check<'_> {
    /// The absolute path, without `.`; links are left as they are.
    fn path(&self, path: PathBuf) -> PathBuf {
        let absolute = self.directory.join(path);
        absolute.components().filter(|part| *part != Component::CurDir).collect()
    }

    fn source(&mut self, Source { path, weight }: Source) -> Source {
        if !(0.0..=1000.0).contains(&weight) || weight == 0.0 {
            let message =
                format!("weight of {}: expected more than 0, at most 1000, got {weight}", path.display());
            self.fail("data.conversations", message, None);
        }
        Source { path: self.path(path), weight }
    }

    fn fail(&mut self, key: &str, message: String, hint: Option<&str>) {
        let place = self.provenance.place(key).cloned();
        self.problems.push(Problem { key: key.to_owned(), place, message, hint: hint.map(str::to_owned) });
    }

    fn missing(&mut self, key: &str, why: &str, example: &str) {
        self.fail(key, format!("`{key}` is missing: {why}"), Some(example));
    }

    fn range(&mut self, key: &str, expected: &str, got: impl std::fmt::Display) {
        self.fail(key, format!("`{key}`: expected {expected}, got {got}"), None);
    }

    fn at_least<T: Copy + PartialOrd + std::fmt::Display>(&mut self, key: &str, got: T, least: T) {
        if got < least {
            self.range(key, &format!("at least {least}"), got);
        }
    }

    fn at_most<T: Copy + PartialOrd + std::fmt::Display>(&mut self, key: &str, got: T, most: T) {
        if got > most {
            self.range(key, &format!("at most {most}"), got);
        }
    }

    /// What the method says about its values.
    fn method(&mut self, method: &MethodConfig) {
        match method.check() {
            Ok(()) => {}
            Err(specforge_methods::Error::Config { method, key, got, reason }) => {
                let key = format!("method.{method}.{key}");
                self.fail(&key, format!("`{key}` = {got}: {reason}"), None);
            }
            Err(other) => self.fail("method", other.to_string(), None),
        }
    }

    /// What the owner of a table says about its values.
    fn component(&mut self, table: &str, result: optimizer::Result<()>) {
        match result {
            Ok(()) => {}
            Err(optimizer::Error::Setting { key, got, why }) => {
                // An element of a list stands where the list stands.
                let key = format!("{table}.{}", key.split('[').next().unwrap_or(key));
                self.fail(&key, format!("`{key}` = {got}: {why}"), None);
            }
            Err(other) => self.fail(table, other.to_string(), None),
        }
    }
}
