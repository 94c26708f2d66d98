//! Where a target folder keeps its chat templates.

use std::path::Path;

use crate::error::Result;
use crate::tokenizer::read_json;

/// Sources of a target's templates: the usual one, and one for tools.
#[derive(Debug, Default)]
pub(super) struct Sources {
    pub(super) usual: Option<String>,
    pub(super) tools: Option<String>,
    /// The file that they stand in.
    pub(super) file: String,
}

/// `file`, or the template sources of a target folder, in the order in which transformers looks for them.
pub(super) fn sources(folder: &Path, file: Option<&Path>) -> Result<Sources> {
    const ALONE: &str = "chat_template.jinja";
    let alone = |path: &Path| {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Sources { usual: Some(fs_err::read_to_string(path)?), tools: None, file: name })
    };
    let path = folder.join(ALONE);
    match file {
        Some(file) => return alone(file),
        None if path.is_file() => return alone(&path),
        None => {}
    }
    for file in ["chat_template.json", "tokenizer_config.json"] {
        let Some(config) = read_json(&folder.join(file))? else { continue };
        match config.get("chat_template") {
            Some(serde_json::Value::String(source)) => {
                return Ok(Sources { usual: Some(source.clone()), tools: None, file: file.to_owned() });
            }
            Some(serde_json::Value::Array(list)) => {
                let (default, tools) = (named_source(list, "default"), named_source(list, "tool_use"));
                return Ok(Sources {
                    usual: default.or_else(|| tools.clone()),
                    tools,
                    file: file.to_owned(),
                });
            }
            _ => {}
        }
    }
    Ok(Sources::default())
}

fn named_source(list: &[serde_json::Value], name: &str) -> Option<String> {
    let entry = list.iter().find(|entry| entry.get("name").is_some_and(|found| found == name))?;
    Some(entry.get("template")?.as_str()?.to_owned())
}
