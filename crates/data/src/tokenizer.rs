//! The target's tokenizer: text to ids with byte offsets in one pass, and ids back to text.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{PostProcessor, PostProcessorWrapper};

use crate::error::{Error, Result};
use crate::special::SpecialTokens;

/// Tokenizer of a target folder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Kept apart from `inner`: it may shorten offsets, which the loss mask needs exact, and adds the
    /// special tokens that a rendered chat already contains.
    post_processor: Option<PostProcessorWrapper>,
    special: SpecialTokens,
    path: PathBuf,
    vocab_size: usize,
    hash: String,
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the bytes of the text it stands for. Tokens that share one multi-byte character all
    /// have the whole character.
    pub offsets: Vec<Range<usize>>,
}

/// Turns ids into text one at a time; holds back a character until all its tokens are there.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens of the last piece handed out: some decoders treat the first token of a text differently.
    context: Vec<u32>,
    pending: Vec<u32>,
}

impl Tokenizer {
    /// Opens `tokenizer.json` of a target folder, with the special tokens named in `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` and `config.json` where those exist.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = read_tokenizer(&path)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| Error::Target {
            path: path.clone(),
            message: format!("not a tokenizer this version can read: {error}"),
        })?;
        // Neither belongs to a rendered chat; both would change lengths behind our back.
        let no_truncation = inner.with_truncation(None).map(|_| ());
        no_truncation.map_err(|error| Error::Target { path: path.clone(), message: error.to_string() })?;
        inner.with_padding(None);
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let lookup = |token: &str| inner.token_to_id(token);
        let special = SpecialTokens::open(folder, &lookup)?;
        let ids = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self {
            vocab_size: model_vocab_size(folder)?.unwrap_or(ids),
            hash: identity(&bytes, &special),
            post_processor,
            special,
            path,
            inner,
        })
    }

    /// Encodes a rendered chat: no special token is added, since the template wrote them into the text.
    pub fn encode(&self, text: &str) -> Result<Encoded> {
        let encoding = self.inner.encode(text, false).map_err(|error| self.failed(error.as_ref()))?;
        let offsets: Vec<_> = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        // Without them nobody knows which tokens a span of text became.
        if 2 * covered(&offsets) < text.len() {
            let message = "it does not say which bytes of the text its tokens stand for (their offsets cover less than half \
                           of it), and without that there is no loss mask; its normalizer seems to replace the text"
                .to_owned();
            return Err(Error::Tokenizer { path: self.path.clone(), message });
        }
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets })
    }

    /// Number of tokens of a rendered chat.
    pub(crate) fn count(&self, text: &str) -> Result<usize> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| self.failed(error.as_ref()))?;
        Ok(encoding.get_ids().len())
    }

    /// Encodes plain text as the target expects a prompt without a chat template: with its begin-of-sequence
    /// token, if the tokenizer adds one.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut encoding =
            self.inner.encode_fast(text, false).map_err(|error| self.failed(error.as_ref()))?;
        if let Some(post_processor) = &self.post_processor {
            encoding =
                post_processor.process(encoding, None, true).map_err(|error| self.failed(error.as_ref()))?;
        }
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens included; bytes that are no text become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|error| self.failed(error.as_ref()))
    }

    /// A decoder that takes one id at a time.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, context: Vec::new(), pending: Vec::new() }
    }

    /// The token's own string as it stands in the vocabulary (byte-level alphabets included).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Id of a token by its own string.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Begin, end and padding tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Number of ids that the target has an embedding for (`vocab_size` of `config.json`), else the number of
    /// ids of the tokenizer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Content identity: blake3 (hex) of `tokenizer.json` and the special tokens.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    fn failed(&self, error: &dyn std::error::Error) -> Error {
        Error::Tokenizer { path: self.path.clone(), message: error.to_string() }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

impl TextStream<'_> {
    /// A UTF-8 character has at most four bytes, hence at most four tokens; more pending tokens than this are
    /// broken bytes and not the beginning of a character.
    const LONGEST_WAIT: usize = 8;

    /// Takes the next id; gives the text that is complete with it, which is empty inside a character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.pending.push(id);
        let text = self.pending_text()?;
        if text.ends_with('\u{FFFD}') && self.pending.len() < Self::LONGEST_WAIT {
            return Ok(String::new());
        }
        self.context = std::mem::take(&mut self.pending);
        Ok(text)
    }

    /// The text of the ids held back at the end.
    pub fn finish(mut self) -> Result<String> {
        let text = self.pending_text()?;
        self.pending.clear();
        Ok(text)
    }

    fn pending_text(&self) -> Result<String> {
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        let before = self.tokenizer.decode(&self.context)?;
        let both = self.tokenizer.decode(&[self.context.as_slice(), self.pending.as_slice()].concat())?;
        match both.strip_prefix(&before) {
            Some(new) => Ok(new.to_owned()),
            // Broken bytes at the seam merged into one replacement character.
            None => self.tokenizer.decode(&self.pending),
        }
    }
}

/// Bytes that tokens in order stand for.
fn covered(offsets: &[Range<usize>]) -> usize {
    let (mut covered, mut end) = (0, 0);
    for token in offsets {
        covered += token.end.saturating_sub(token.start.max(end));
        end = end.max(token.end);
    }
    covered
}

fn read_tokenizer(path: &Path) -> Result<Vec<u8>> {
    let others = ["tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model"];
    let found = |folder: &Path| others.into_iter().find(|name| folder.join(name).is_file());
    match (fs_err::read(path), path.parent().and_then(found)) {
        (Err(error), Some(other)) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::Target {
            path: path.to_path_buf(),
            message: format!(
                "not there, only {other}; write it with transformers: \
                 AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
            ),
        }),
        (bytes, _) => Ok(bytes?),
    }
}

/// `vocab_size` of the model, which is the number of embedding rows; text models nested in `text_config`.
fn model_vocab_size(folder: &Path) -> Result<Option<usize>> {
    let Some(config) = read_json(&folder.join("config.json"))? else { return Ok(None) };
    let size = config.get("vocab_size").or_else(|| config.get("text_config")?.get("vocab_size"));
    Ok(size.and_then(Value::as_u64).map(|size| size as usize))
}

fn identity(tokenizer_json: &[u8], special: &SpecialTokens) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(tokenizer_json.len() as u64).to_le_bytes());
    hasher.update(tokenizer_json);
    hasher.update(format!("{special:?}").as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// A JSON file of the target folder, `None` when it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let bytes = match fs_err::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|error| Error::Target {
        path: path.to_path_buf(),
        message: format!("not valid JSON: {error}"),
    })
}
