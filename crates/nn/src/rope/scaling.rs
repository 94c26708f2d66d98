//! The ways to stretch rotary frequencies over longer sequences than the model was trained on.

use super::{Result, Settings};

/// What is done to the plain frequencies `theta^(-2j / dim)`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scaling {
    /// Nothing.
    Default,
    /// All divided by a factor.
    Linear { factor: f64 },
    /// NTK-aware: a larger base once the sequence is longer than the model was trained on.
    Dynamic { factor: f64, trained_len: f64 },
    /// Llama 3.1: long waves are stretched, short ones kept, those between interpolated.
    Llama3 { factor: f64, low: f64, high: f64, trained_len: f64 },
    /// YaRN (Peng et al., 2023): the same over a ramp of dimensions, and a temperature.
    Yarn { factor: f64, ramp: (f64, f64), attention_factor: f64 },
    /// LongRoPE (Ding et al., 2024): a searched factor per frequency, for short and for long sequences.
    LongRope { short: Vec<f32>, long: Vec<f32>, trained_len: f64, attention_factor: f64 },
}

impl Scaling {
    pub(super) fn read(settings: &Settings<'_>, rotary_dim: usize) -> Result<Self> {
        Ok(match settings.kind.as_str() {
            "linear" => Self::Linear { factor: settings.require("factor")? },
            "dynamic" => {
                let trained_len = settings.max_position_embeddings()?;
                Self::Dynamic { factor: settings.require("factor")?, trained_len }
            }
            "llama3" => Self::Llama3 {
                factor: settings.require("factor")?,
                low: settings.require("low_freq_factor")?,
                high: settings.require("high_freq_factor")?,
                trained_len: settings.require(TRAINED_LEN)?,
            },
            "yarn" => yarn(settings, rotary_dim)?,
            "longrope" | "su" => long_rope(settings, rotary_dim)?,
            _ => Self::Default,
        })
    }

    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        }
    }

    pub(super) fn frequencies(&self, theta: f64, dim: usize, sequence_len: usize) -> Vec<f32> {
        let len = sequence_len as f64;
        // The base is float32 in the references, the power is rounded once.
        let powers = |base: f64| {
            let base = f64::from(base as f32);
            (0..dim / 2).map(move |j| base.powf(f64::from((2 * j) as f32 / dim as f32)) as f32)
        };
        let plain = powers(theta).map(|p| 1.0 / p);
        match *self {
            Self::Default => plain.collect(),
            Self::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
            Self::Dynamic { factor, trained_len } => {
                let stretch = factor * len.max(trained_len) / trained_len - (factor - 1.0);
                let base = theta * stretch.powf(dim as f64 / (dim as f64 - 2.0).max(1.0));
                powers(base).map(|p| 1.0 / p).collect()
            }
            Self::Llama3 { factor, low, high, trained_len } => {
                plain.map(|f| llama3(f, factor, [low, high], trained_len)).collect()
            }
            Self::Yarn { factor, ramp: (low, high), .. } => {
                let kept = |j: usize| 1.0 - ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let blend = |(j, p): (usize, f32)| {
                    (1.0 / (factor as f32 * p)) * (1.0 - kept(j)) + (1.0 / p) * kept(j)
                };
                powers(theta).enumerate().map(blend).collect()
            }
            Self::LongRope { ref short, ref long, trained_len, .. } => {
                let factors = if len > trained_len { long } else { short };
                powers(theta).zip(factors).map(|(p, factor)| 1.0 / (factor * p)).collect()
            }
        }
    }
}

/// The key of the length that the model was trained on before its sequences were stretched.
const TRAINED_LEN: &str = "original_max_position_embeddings";

fn llama3(frequency: f32, factor: f64, [low, high]: [f64; 2], trained_len: f64) -> f32 {
    let wavelength = std::f32::consts::TAU / frequency;
    let stretched = frequency / factor as f32;
    if wavelength > (trained_len / low) as f32 {
        stretched
    } else if wavelength < (trained_len / high) as f32 || low == high {
        frequency
    } else {
        let smooth = (trained_len as f32 / wavelength - low as f32) / (high - low) as f32;
        (1.0 - smooth) * stretched + smooth * frequency
    }
}

fn yarn(settings: &Settings<'_>, dim: usize) -> Result<Scaling> {
    let trained_len = settings.require(TRAINED_LEN)?;
    let factor = match settings.number("factor")? {
        Some(factor) => factor,
        None => settings.max_position_embeddings()? / trained_len,
    };
    let attention_factor = match settings.number("attention_factor")? {
        Some(given) => given,
        None => yarn_attention_factor(settings, factor)?,
    };
    let beta = |key, default| Ok(settings.number(key)?.unwrap_or(default));
    let (fast, slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
    let theta = settings.number("rope_theta")?.unwrap_or(10_000.0);
    // The dimension whose wave turns so often within the trained length.
    let dimension = |turns: f64| dim as f64 * (trained_len / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dimension(fast), dimension(slow));
    if settings.flag("truncate")?.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    Ok(Scaling::Yarn { factor, ramp: (low, high), attention_factor })
}

/// `0.1 ln s + 1`, or the ratio of two such where both `mscale` and `mscale_all_dim` are given and not 0.
fn yarn_attention_factor(settings: &Settings<'_>, factor: f64) -> Result<f64> {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let (some, all) = (settings.number_or_zero("mscale")?, settings.number_or_zero("mscale_all_dim")?);
    Ok(if some > 0.0 && all > 0.0 { scale(some) / scale(all) } else { scale(1.0) })
}

fn long_rope(settings: &Settings<'_>, dim: usize) -> Result<Scaling> {
    let factors = |key| {
        let list = settings.list(key)?.unwrap_or_default();
        if list.len() == dim / 2 && list.iter().all(|&f| f > 0.0) {
            return Ok(list.iter().map(|&f| f as f32).collect());
        }
        Err(settings.wrong(key, format!("{} numbers above 0, one per frequency", dim / 2)))
    };
    let (short, long) = (factors("short_factor")?, factors("long_factor")?);
    let trained_len = settings.require(TRAINED_LEN)?;
    let factor = match settings.number("factor")? {
        Some(factor) => factor,
        None => settings.max_position_embeddings()? / trained_len,
    };
    let attention_factor = match settings.number("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / trained_len.ln()).sqrt(),
    };
    Ok(Scaling::LongRope { short, long, trained_len, attention_factor })
}
