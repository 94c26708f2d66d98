//! What stands around the decoder layers of a target, and what all of them share.

/// What an architecture has around its layers; the default is Llama's.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    /// The factor on the scores of the attention; absent: `head_dim^-0.5`.
    pub attention_scale: Option<f32>,
    /// The factor on embeddings as they enter the first layer.
    pub embedding_scale: f32,
    /// The factor on the logits.
    pub logit_scale: f32,
    /// What the weights of norms are stored minus.
    pub norm_offset: f32,
}

impl Default for Frame {
    fn default() -> Self {
        Self { attention_scale: None, embedding_scale: 1.0, logit_scale: 1.0, norm_offset: 0.0 }
    }
}
