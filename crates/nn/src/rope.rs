//! Rotary position embeddings: every kind that Hugging Face configurations name, as cos and sin tables.

use std::sync::RwLock;

use serde_json::Value;
use specforge_tensor::{Device, Tensor};

/// What can be wrong with a configuration's rotary settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A kind that is not known.
    #[error("config: rope type {got:?} is not known; known are {}", KINDS.join(", "))]
    Kind {
        /// The kind.
        got: String,
    },
    /// A missing or impossible value.
    #[error("config: rope {kind}: {key}: {reason}")]
    Value {
        /// The kind.
        kind: String,
        /// The key.
        key: &'static str,
        /// What was expected, and what was found.
        reason: String,
    },
}

const KINDS: [&str; 7] = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "mrope"];

/// A kind of frequency scaling.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Default,
    /// Positions divided by a factor (Chen et al., 2023).
    Linear {
        factor: f64,
    },
    /// NTK-aware base that grows with the sequence once it passes the trained length.
    Dynamic {
        factor: f64,
    },
    /// Llama 3.1: low frequencies scaled, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        attention: f64,
    },
    /// LongRoPE (Ding et al., 2024): one factor per frequency, for short and for long sequences.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original: f64,
        attention: f64,
    },
    /// Three position axes, each with a section of the frequencies; text has all three alike.
    Mrope {
        sections: Vec<usize>,
    },
}

/// The rotary settings of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    theta: f64,
    /// Rotated elements of a head; the rest passes.
    rotary_dim: usize,
    max_position_embeddings: usize,
    kind: Kind,
}

/// One number of a configuration, with the kind it belongs to for messages.
struct Settings<'a> {
    kind: &'a str,
    scaling: &'a Value,
}

impl Settings<'_> {
    fn error(&self, key: &'static str, reason: String) -> Error {
        Error::Value { kind: self.kind.to_owned(), key, reason }
    }

    fn required(&self, key: &'static str) -> Result<f64, Error> {
        let value = self.scaling[key].as_f64().filter(|v| *v > 0.0 && v.is_finite());
        value.ok_or_else(|| self.error(key, format!("expected a positive number, got {}", self.scaling[key])))
    }

    /// A number that may be missing or null, but not of another type.
    fn or(&self, key: &'static str, default: f64) -> Result<f64, Error> {
        number(self.kind, self.scaling, key).map(|found| found.unwrap_or(default))
    }

    fn list(&self, key: &'static str, len: usize) -> Result<Vec<f64>, Error> {
        let list: Option<Vec<f64>> =
            self.scaling[key].as_array().and_then(|a| a.iter().map(Value::as_f64).collect());
        let got = list.as_ref().map_or(0, Vec::len);
        list.filter(|l| l.len() == len)
            .ok_or_else(|| self.error(key, format!("expected {len} numbers, got {got}")))
    }
}

/// The number under `key`, if it is there.
fn number(kind: &str, table: &Value, key: &'static str) -> Result<Option<f64>, Error> {
    let value = &table[key];
    let found = value.as_f64().filter(|v| *v >= 0.0 && v.is_finite());
    if found.is_none() && !value.is_null() {
        let reason = format!("expected a number, got {value}");
        return Err(Error::Value { kind: kind.to_owned(), key, reason });
    }
    Ok(found)
}

impl RopeConfig {
    /// Reads `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
    pub fn from_json(config: &Value, head_dim: usize) -> Result<Self, Error> {
        let modern = &config["rope_parameters"];
        let scaling = if modern.is_object() { modern } else { &config["rope_scaling"] };
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()).unwrap_or("default");
        if let Some((layers, _)) =
            scaling.as_object().into_iter().flatten().find(|(_, value)| value.is_object())
        {
            let reason = format!("settings per kind of layer ({layers}) are not supported");
            return Err(Error::Value { kind: kind.to_owned(), key: "rope_parameters", reason });
        }
        let either = |key| Ok::<_, Error>(number(kind, scaling, key)?.or(number(kind, config, key)?));
        let partial = either("partial_rotary_factor")?.unwrap_or(1.0);
        let theta = either("rope_theta")?.unwrap_or(10_000.0);
        let max = config["max_position_embeddings"].as_u64().unwrap_or(2048) as usize;
        // Sections without a type of their own are older Qwen-VL configurations.
        let kind = if kind == "default" && scaling["mrope_section"].is_array() { "mrope" } else { kind };
        let settings = Settings { kind, scaling };
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if partial > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let reason = format!(
                "expected a share of head_dim = {head_dim} with an even number of elements, got {partial}"
            );
            return Err(settings.error("partial_rotary_factor", reason));
        }
        // As transformers has it: beside the table it counts before one in it (Phi-3 writes it there).
        let trained = "original_max_position_embeddings";
        let original = match number(kind, config, trained)? {
            Some(beside) => beside,
            None => settings.or(trained, max as f64)?,
        };
        let kind = parse(&settings, original, max as f64, rotary_dim)?;
        Ok(Self { theta, rotary_dim, max_position_embeddings: max, kind })
    }

    /// Half the rotated elements of a head: the width of the tables.
    pub fn half(&self) -> usize {
        self.rotary_dim / 2
    }

    /// The frequencies for sequences of up to `seq_len` tokens.
    pub fn inverse_frequencies(&self, seq_len: usize) -> Vec<f32> {
        let (d, theta) = (self.rotary_dim, self.base(seq_len));
        let plain = (0..self.half()).map(|j| 1.0 / (theta as f32).powf((2 * j) as f32 / d as f32));
        match &self.kind {
            Kind::Default | Kind::Dynamic { .. } | Kind::Mrope { .. } => plain.collect(),
            Kind::Linear { factor } => plain.map(|f| f / *factor as f32).collect(),
            Kind::Llama3 { factor, low, high, original } => {
                plain.map(|f| llama3(f64::from(f), *factor, *low, *high, *original) as f32).collect()
            }
            Kind::Yarn { factor, .. } => {
                let ramp = self.yarn_ramp();
                plain.zip(ramp).map(|(f, r)| f / *factor as f32 * r + f * (1.0 - r)).collect()
            }
            Kind::LongRope { short, long, original, .. } => {
                let factors = if seq_len as f64 > *original { long } else { short };
                plain.zip(factors).map(|(f, factor)| f / *factor as f32).collect()
            }
        }
    }

    /// The base: NTK-aware scaling raises it for sequences beyond the trained length.
    fn base(&self, seq_len: usize) -> f64 {
        let (d, trained) = (self.rotary_dim as f64, self.max_position_embeddings as f64);
        match self.kind {
            Kind::Dynamic { factor } if seq_len as f64 > trained => {
                self.theta * (factor * seq_len as f64 / trained - (factor - 1.0)).powf(d / (d - 2.0))
            }
            _ => self.theta,
        }
    }

    /// Share of interpolation per frequency.
    fn yarn_ramp(&self) -> Vec<f32> {
        let Kind::Yarn { original, beta_fast, beta_slow, truncate, .. } = self.kind else {
            return Vec::new();
        };
        let d = self.rotary_dim as f64;
        let dim =
            |turns: f64| d * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln());
        let (low, high) = (dim(beta_fast), dim(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(d - 1.0));
        let high = if low == high { high + 0.001 } else { high };
        (0..self.half()).map(|j| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32).collect()
    }

    /// Factor on cos and sin.
    fn attention_factor(&self) -> f32 {
        match self.kind {
            Kind::Yarn { attention, .. } | Kind::LongRope { attention, .. } => attention as f32,
            _ => 1.0,
        }
    }

    /// Cos and sin for positions 0 to `n_positions`, each `[n_positions, half]`, as a sequence of `seq_len` tokens
    /// has them (the kinds `dynamic` and `longrope` depend on it).
    pub fn tables(&self, device: Device, n_positions: usize, seq_len: usize) -> (Tensor, Tensor) {
        let freq = self.inverse_frequencies(seq_len);
        let angles =
            (0..n_positions).flat_map(|p| freq.iter().map(move |f| p as f32 * f)).collect::<Vec<f32>>();
        self.cos_sin(device, &angles, n_positions)
    }

    /// Cos and sin of rows that each have a position on three axes: `[rows, half]`. Kinds other than `mrope` take the
    /// first axis.
    pub fn tables_of_axes(&self, device: Device, positions: &[[u32; 3]]) -> (Tensor, Tensor) {
        let freq = self.inverse_frequencies(0);
        let axis = |j: usize| {
            let Kind::Mrope { sections } = &self.kind else { return 0 };
            let mut end = 0;
            sections.iter().position(|n| (end += n, j < end).1).unwrap_or(0).min(2)
        };
        let angle = |p: &[u32; 3]| -> Vec<f32> {
            freq.iter().enumerate().map(|(j, f)| p[axis(j)] as f32 * f).collect()
        };
        self.cos_sin(device, &positions.iter().flat_map(angle).collect::<Vec<f32>>(), positions.len())
    }

    fn cos_sin(&self, device: Device, angles: &[f32], rows: usize) -> (Tensor, Tensor) {
        let scale = self.attention_factor();
        let table = |f: fn(f32) -> f32| {
            let values = angles.iter().map(|&a| f(a) * scale).collect();
            Tensor::from_f32(device, values, &[rows, self.half()]).expect("one angle per row and frequency")
        };
        (table(f32::cos), table(f32::sin))
    }
}

/// A configuration whose heads are rotated whole, which is how drafts are trained and served whatever their target does.
/// Factors per frequency, which fit the target's part of a head, then give way to plain frequencies; a trained length
/// that stands beside the table goes into it.
pub fn whole_heads(config: &Value) -> Value {
    let mut config = config.clone();
    let top = config.as_object_mut();
    let mut is_partial = false;
    let mut remove = |table: &mut serde_json::Map<String, Value>| {
        let share = table.remove("partial_rotary_factor").and_then(|share| share.as_f64());
        is_partial |= share.is_some_and(|share| share < 1.0);
    };
    let Some(top) = top else { return config };
    remove(top);
    let tables = ["rope_parameters", "rope_scaling"];
    tables
        .iter()
        .for_each(|key| top.get_mut(*key).and_then(Value::as_object_mut).into_iter().for_each(&mut remove));
    let trained = top.get("original_max_position_embeddings").cloned();
    for table in tables {
        let Some(table) = top.get_mut(table).and_then(Value::as_object_mut) else { continue };
        if is_partial && table.contains_key("short_factor") {
            table.retain(|key, _| key == "rope_theta");
        } else if let Some(trained) = trained.clone().filter(|_| table.contains_key("short_factor")) {
            table.insert("original_max_position_embeddings".to_owned(), trained);
        }
    }
    config
}

fn parse(s: &Settings<'_>, original: f64, max: f64, rotary_dim: usize) -> Result<Kind, Error> {
    Ok(match s.kind {
        "default" => Kind::Default,
        "linear" => Kind::Linear { factor: s.required("factor")? },
        "dynamic" => Kind::Dynamic { factor: s.required("factor")? },
        "llama3" => Kind::Llama3 {
            factor: s.required("factor")?,
            low: s.required("low_freq_factor")?,
            high: s.required("high_freq_factor")?,
            original,
        },
        "yarn" => {
            let factor = if s.scaling["factor"].is_null() { max / original } else { s.required("factor")? };
            let attention = s.or("attention_factor", yarn_attention(s, factor)?)?;
            let (beta_fast, beta_slow) = (s.or("beta_fast", 32.0)?, s.or("beta_slow", 1.0)?);
            let truncate = s.scaling["truncate"].as_bool().unwrap_or(true);
            Kind::Yarn { factor, original, beta_fast, beta_slow, truncate, attention }
        }
        "longrope" | "su" => {
            let factor = s.or("factor", max / original)?;
            let plain = if factor > 1.0 { (1.0 + factor.ln() / original.ln()).sqrt() } else { 1.0 };
            Kind::LongRope {
                short: s.list("short_factor", rotary_dim / 2)?,
                long: s.list("long_factor", rotary_dim / 2)?,
                original,
                attention: s.or("attention_factor", plain)?,
            }
        }
        "mrope" => {
            let sections = s.list("mrope_section", 3)?;
            let (sum, half) = (sections.iter().sum::<f64>(), rotary_dim as f64 / 2.0);
            if sum != half {
                return Err(s.error("mrope_section", format!("expected the sum {half}, got {sum}")));
            }
            Kind::Mrope { sections: sections.into_iter().map(|n| n as usize).collect() }
        }
        other => return Err(Error::Kind { got: other.to_owned() }),
    })
}

/// `m(mscale) / m(mscale_all_dim)` with `m(x) = 0.1 x ln(factor) + 1`, or `m(1)` unless both are given.
fn yarn_attention(s: &Settings<'_>, factor: f64) -> Result<f64, Error> {
    let m = |scale: f64| if factor > 1.0 { 0.1 * scale * factor.ln() + 1.0 } else { 1.0 };
    let (mscale, all) = (s.or("mscale", 0.0)?, s.or("mscale_all_dim", 0.0)?);
    Ok(if mscale != 0.0 && all != 0.0 { m(mscale) / m(all) } else { m(1.0) })
}

fn llama3(freq: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / freq;
    if wavelength < original / high {
        freq
    } else if wavelength > original / low {
        freq / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

/// Tables that grow with the longest position asked for, so that a long context costs nothing until it is used.
#[derive(Debug)]
pub struct RopeTables {
    config: RopeConfig,
    device: Device,
    tables: RwLock<(Tensor, Tensor)>,
}

impl RopeTables {
    /// No rows yet.
    pub fn new(config: RopeConfig, device: Device) -> Self {
        let tables = RwLock::new(config.tables(device, 0, 0));
        Self { config, device, tables }
    }

    /// Cos and sin of at least `n_positions` rows, with the frequencies of the longest sequence: what a row holds
    /// must not depend on what was asked for before.
    pub fn up_to(&self, n_positions: usize) -> (Tensor, Tensor) {
        let read = || self.tables.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let tables = read();
        if tables.0.rows_cols().0 >= n_positions {
            return tables;
        }
        let rows = n_positions.next_power_of_two();
        let grown = self.config.tables(self.device, rows, self.config.max_position_embeddings);
        *self.tables.write().unwrap_or_else(std::sync::PoisonError::into_inner) = grown.clone();
        grown
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use specforge_tensor::Rope;
    use specforge_testkit::{Tensors, assert_close, case_json, golden_case};

    use super::*;

    fn config(case: &Value) -> RopeConfig {
        let mut config = case.clone();
        config["max_position_embeddings"] = case.get("max_position_embeddings").cloned().unwrap_or(json!(64));
        RopeConfig::from_json(&config, case["head_dim"].as_u64().expect("head_dim") as usize)
            .expect("a known kind")
    }

    /// The stored tables repeat each frequency for both halves of the head.
    fn first_half(values: &[f32], half: usize) -> Vec<f32> {
        values.chunks_exact(2 * half).flat_map(|row| row[..half].to_vec()).collect()
    }

    #[test]
    fn golden_rope_tables() {
        let Some(dir) = golden_case("rope_tables") else { return };
        let outputs = Tensors::read(dir.join("outputs.safetensors"));
        for case in case_json(&dir)["cases"].as_array().expect("cases") {
            let name = case["name"].as_str().expect("a name");
            let rope = config(case);
            if name.ends_with("mrope") {
                check_mrope(&rope, &outputs, name);
                continue;
            }
            // The reference's tables are 20 rows longer than the trained length, so its `dynamic` is always active.
            let max = case["max_position_embeddings"].as_u64().expect("a length") as usize;
            let seq_len = if name.starts_with("eagle3") { max + 20 } else { max };
            let (cos, sin) = rope.tables(Device::Cpu, 48, seq_len);
            for (what, got) in [("cos", cos), ("sin", sin)] {
                let want = outputs.f32(&format!("{name}.{what}")).1;
                assert_close(
                    &format!("{name}.{what}"),
                    &got.to_f32(),
                    &first_half(&want, rope.half()),
                    2e-6,
                    0.0,
                );
            }
        }
    }

    fn check_mrope(rope: &RopeConfig, outputs: &Tensors, name: &str) {
        let (shape, ids) = outputs.i64(&format!("{name}.position_ids"));
        let n = shape[2];
        let rows: Vec<[u32; 3]> = (0..n).map(|i| [0, 1, 2].map(|axis| ids[axis * n + i] as u32)).collect();
        let (cos, sin) = rope.tables_of_axes(Device::Cpu, &rows);
        for what in ["q", "k"] {
            let (shape, x) = outputs.f32(&format!("{name}.{what}"));
            let (heads, d) = (shape[1], shape[3]);
            // [1, heads, n, d] to rows of all heads and back.
            let rows: Vec<f32> = (0..n)
                .flat_map(|t| (0..heads).flat_map(move |h| (0..d).map(move |i| (h * n + t) * d + i)))
                .map(|i| x[i])
                .collect();
            let params = specforge_tensor::Params::new();
            let tape = specforge_tensor::Tape::inference(&params);
            let x = tape.input(Tensor::from_f32(Device::Cpu, rows, &[n, heads * d]).expect("rows"));
            let positions = Tensor::from_u32(Device::Cpu, (0..n as u32).collect());
            let rope = Rope { n_heads: heads, head_dim: d, cos: cos.clone(), sin: sin.clone(), positions };
            let y = tape.rope(&x, &rope).expect("rotated").value().to_f32();
            let want = outputs.f32(&format!("{name}.{what}_rotated")).1;
            let got: Vec<f32> = (0..heads)
                .flat_map(|h| (0..n).flat_map(move |t| (0..d).map(move |i| (t * heads + h) * d + i)))
                .map(|i| y[i])
                .collect();
            assert_close(&format!("{name}.{what}"), &got, &want, 5e-6, 0.0);
        }
    }

    #[test]
    fn both_config_layouts_give_the_same_tables() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let v4 = json!({"rope_theta": 5e5, "rope_scaling": scaling});
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        let v5 = json!({"rope_parameters": parameters});
        let read = |v: &Value| RopeConfig::from_json(v, 32).expect("a known kind");
        assert_eq!(read(&v4), read(&v5));
    }

    #[test]
    fn wrong_settings_are_named() {
        for (config, message) in [
            (json!({"rope_theta": "x"}), "rope default: rope_theta: expected a number, got \"x\""),
            (
                json!({"partial_rotary_factor": 0.1}),
                "partial_rotary_factor: expected a share of head_dim = 32",
            ),
            (
                json!({"rope_parameters": {"full_attention": {}}}),
                "per kind of layer (full_attention) are not supported",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": []}}),
                "beta_fast: expected a number, got []",
            ),
            (
                json!({"rope_scaling": {"mrope_section": [1, 2, 3]}}),
                "mrope_section: expected the sum 16, got 6",
            ),
            (
                json!({"rope_scaling": {"type": "spiral"}}),
                "rope type \"spiral\" is not known; known are default",
            ),
            (
                json!({"rope_scaling": {"type": "linear"}}),
                "rope linear: factor: expected a positive number, got null",
            ),
            (
                json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
                "expected 16 numbers, got 1",
            ),
        ] {
            let error = RopeConfig::from_json(&config, 32).expect_err("must be refused").to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn drafts_rotate_whole_heads() {
        let factors = |n: usize| {
            json!({ "rope_type": "longrope", "rope_theta": 5.0, "short_factor": vec![1.0; n],
                                         "long_factor": vec![2.0; n] })
        };
        let config = |rope: Value, partial: f64| {
            json!({ "rope_parameters": rope, "partial_rotary_factor": partial,
                    "original_max_position_embeddings": 16, "max_position_embeddings": 64 })
        };
        let partial = RopeConfig::from_json(&whole_heads(&config(factors(4), 0.5)), 16).expect("plain");
        let plain = json!({ "rope_theta": 5.0, "max_position_embeddings": 64 });
        assert_eq!(partial, RopeConfig::from_json(&plain, 16).expect("plain"));
        // Whole heads keep their factors, and the trained length is where an exported configuration has it.
        let whole = whole_heads(&config(factors(8), 1.0));
        assert_eq!(whole["rope_parameters"]["original_max_position_embeddings"], 16);
        let read = |config: &Value| RopeConfig::from_json(config, 16).expect("longrope");
        assert_eq!(read(&whole), read(&config(factors(8), 1.0)));
        let old = json!({ "rope_theta": 5.0, "rope_scaling": null, "partial_rotary_factor": 0.5 });
        assert_eq!(whole_heads(&old), json!({ "rope_theta": 5.0, "rope_scaling": null }));
    }

    #[test]
    fn partial_rotation_and_growth() {
        let rope = RopeConfig::from_json(&json!({"partial_rotary_factor": 0.5}), 64).expect("default");
        assert_eq!(rope.half(), 16);
        let tables = RopeTables::new(rope.clone(), Device::Cpu);
        let long = tables.up_to(100).0.to_f32();
        assert_eq!(long[..16 * 100], rope.tables(Device::Cpu, 100, 100).0.to_f32()[..]);
        assert_eq!(tables.up_to(7).0.rows_cols().0, 128);
    }

    #[test]
    fn the_trained_length_may_stand_beside_the_table_and_yarn_may_leave_out_its_factor() {
        let read = |v: Value| RopeConfig::from_json(&v, 32).expect("a known kind");
        let inside = json!({"max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}});
        let beside = json!({"max_position_embeddings": 64, "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "yarn", "factor": null}});
        assert_eq!(read(inside), read(beside));
    }

    #[test]
    fn what_was_asked_for_before_changes_no_row() {
        let scaling = json!({"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [4.0, 2.0],
            "original_max_position_embeddings": 8});
        let config = json!({"rope_scaling": scaling, "max_position_embeddings": 32});
        let rope = RopeConfig::from_json(&config, 4).expect("longrope");
        let tables = RopeTables::new(rope, Device::Cpu);
        let before = tables.up_to(4).0.to_f32();
        tables.up_to(20);
        assert_eq!(tables.up_to(4).0.to_f32()[..before.len()], before[..]);
    }
}
