//! What stands around the decoder layers of a target, and what all of them share.

use specforge_nn::rope::RopeConfig;

/// What an architecture has around its layers; the default is Llama's.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    /// What the names of all weights begin with.
    pub prefix: &'static str,
    /// The part with embedding, layers and last norm, below the prefix.
    pub body: &'static str,
    /// The norm after the last layer.
    pub norm: &'static str,
    /// What the weights of norms are stored minus.
    pub norm_offset: f32,
    /// The factor on embeddings as they enter the first layer.
    pub embedding_scale: f32,
    /// The factor on the scores of the attention; absent: `head_dim^-0.5`.
    pub attention_scale: Option<f32>,
    /// Scores s become `cap · tanh(s / cap)`.
    pub attention_cap: Option<f32>,
    /// The rotary embedding of layers that have one of their own.
    pub local_rope: Option<RopeConfig>,
    /// The factor on the logits.
    pub logit_scale: f32,
    /// Logits z become `cap · tanh(z / cap)`.
    pub logit_cap: Option<f32>,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            prefix: "",
            body: "model",
            norm: "norm",
            norm_offset: 0.0,
            embedding_scale: 1.0,
            attention_scale: None,
            attention_cap: None,
            local_rope: None,
            logit_scale: 1.0,
            logit_cap: None,
        }
    }
}
