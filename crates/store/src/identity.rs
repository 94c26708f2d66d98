//! What a store was captured from, and the differences between two such descriptions.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Encoding, Schema};

/// Everything that a store is made for: what its records hold, how, and captured from what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// How bf16 fields are written.
    pub encoding: Encoding,
    /// The fields of every record.
    pub schema: Schema,
    /// What the features were captured from.
    pub identity: Identity,
}

/// What the features of a store were captured from. Hashes are compared as text, never computed here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The target.
    pub target: TargetIdentity,
    /// What was recorded from it.
    pub capture: CaptureSpec,
    /// Hash of the tokenizer.
    pub tokenizer_hash: String,
    /// Hash of the chat template.
    pub template_hash: String,
    /// Hash of the prepared set whose rows are the records.
    pub prepared_hash: String,
    /// Rows of the prepared set: a finished store holds so many records.
    pub prepared_rows: u64,
    /// Tokens at which rows were cut.
    pub max_length: u64,
}

/// The target that features were captured from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetIdentity {
    /// The path as it was given. For people only: never compared, so that targets may be moved.
    pub path: String,
    /// `architectures[0]` of its `config.json`.
    pub architecture: String,
    /// Hash of its `config.json`.
    pub config_hash: String,
    /// Hash or fingerprint of its weights.
    pub weights_hash: String,
    /// Dtype it ran in.
    pub dtype: String,
}

/// What was recorded from the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureSpec {
    /// The layers, in the order in which they are concatenated.
    pub layers: Vec<u32>,
    /// Whether the last hidden state was recorded too.
    pub last_hidden: bool,
}

/// One difference between a store and what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What differs, as `target.weights_hash` or `schema.hidden_states`.
    pub key: String,
    /// What the store has.
    pub store: String,
    /// What was asked for.
    pub wanted: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: store has {}, asked for {}", self.key, self.store, self.wanted)
    }
}

/// The key that is shown and never compared.
const INFORMATIVE: &str = "target.path";
const ABSENT: &str = "nothing";

impl Spec {
    /// Ties shards to their store: crc32 of the compact JSON of the spec, the target's path left empty.
    pub(crate) fn id(&self) -> u32 {
        let mut compared = self.clone();
        compared.identity.target.path.clear();
        let json = serde_json::to_vec(&compared).expect("a spec holds strings, numbers and lists only");
        crc32fast::hash(&json)
    }

    /// Every difference of the spec of a store to the one a writer was asked to go on with.
    pub(crate) fn differences(&self, wanted: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        push(&mut found, "encoding", self.encoding.to_string(), wanted.encoding.to_string());
        let names = |schema: &Schema| schema.fields().iter().map(|f| f.name.clone()).collect::<Vec<_>>();
        let (store, asked) = (names(&self.schema), names(&wanted.schema));
        push(&mut found, "schema", store.join(", "), asked.join(", "));
        found.extend(schema_differences(&self.schema, &wanted.schema));
        found.extend(identity_differences(&self.identity, &wanted.identity));
        found
    }
}

/// Fields of `wanted` that the store lacks or has otherwise. What it has beyond them does no harm.
pub(crate) fn schema_differences(store: &Schema, wanted: &Schema) -> Vec<Difference> {
    let mut found = Vec::new();
    for field in wanted.fields() {
        let has = store.fields().iter().find(|f| f.name == field.name);
        let has = has.map_or_else(|| ABSENT.into(), ToString::to_string);
        push(&mut found, &format!("schema.{}", field.name), has, field.to_string());
    }
    found
}

/// Every compared key whose value differs.
pub(crate) fn identity_differences(store: &Identity, wanted: &Identity) -> Vec<Difference> {
    let (store, wanted) = (leaves(store), leaves(wanted));
    let mut found = Vec::new();
    for ((key, has), (_, asked)) in store.into_iter().zip(wanted) {
        if key != INFORMATIVE {
            push(&mut found, &key, has, asked);
        }
    }
    found
}

fn push(found: &mut Vec<Difference>, key: &str, store: String, wanted: String) {
    if store != wanted {
        found.push(Difference { key: key.into(), store, wanted });
    }
}

/// The identity as dotted keys and JSON values. Both sides have the same keys, in the same order.
fn leaves(identity: &Identity) -> Vec<(String, String)> {
    fn walk(prefix: &str, value: &Value, into: &mut Vec<(String, String)>) {
        let Value::Object(members) = value else {
            return into.push((prefix.into(), value.to_string()));
        };
        for (name, member) in members {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            walk(&key, member, into);
        }
    }
    let value = serde_json::to_value(identity).expect("an identity holds strings, numbers and lists only");
    let mut into = Vec::new();
    walk("", &value, &mut into);
    into
}
