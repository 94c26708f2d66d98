//! The reference cases of `targets/`: every hidden state, the final norm, logits, and cached decoding.

use std::path::Path;

use serde_json::Value;
use specforge_models::{Capture, KvCache, Target, tables};
use specforge_tensor::{DType, Device};
use specforge_testkit::{Tensors, assert_close, case_json, golden_cases};

/// One case with one of its two configurations.
struct Case {
    name: String,
    facts: Value,
    expected: Tensors,
    target: Target,
    rows: Vec<Vec<u32>>,
}

#[test]
fn golden_targets() {
    for (name, folder) in golden_cases("targets/") {
        for config in ["config.json", "config.v5.json"] {
            let case = Case::load(&format!("{name} {config}"), &folder, config);
            println!("{}", case.name);
            case.tables(&folder);
            case.forward();
            case.single();
            case.long();
            case.greedy();
        }
    }
}

/// bfloat16 on a device against the CPU's float32 on the same weights: every state, the logits, and decoding with a
/// cache, row by row the same bits as all rows at once. Then with 8-bit weights, which are coarser.
#[test]
fn golden_targets_on_cuda() {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(why) => return println!("skipped: no CUDA device ({why})"),
    };
    for (name, folder) in golden_cases("targets/") {
        println!("{name}");
        let load = |device, storage| Target::load(&folder, device, Some(storage)).unwrap();
        let reference = load(Device::Cpu, DType::Bf16);
        let rows = rows(&Tensors::read(folder.join("expected.safetensors")));
        let want = Outputs::of(&reference, &rows);
        let target = load(device, DType::Bf16);
        let got = Outputs::of(&target, &rows);
        // The norm on the output of linear attention enlarges what was rounded.
        let is_linear = !target.info().raw["linear_num_value_heads"].is_null();
        let bound = if want.is_mixture { 2e-1 } else { 5e-2 * if is_linear { 2.0 } else { 1.0 } };
        let distance = got.expect_near(&name, &want, bound);
        assert_eq!(got.states, Outputs::of(&target, &rows).states, "{name}: the same bits");
        decode_in_portions(&target, &rows[1]);
        match Target::load(&folder, device, Some(DType::E4m3)) {
            // Four bits less of every weight and every input.
            Ok(fp8) => _ = Outputs::of(&fp8, &rows).expect_near(&name, &want, 16.0 * distance),
            Err(why) => println!("  no 8-bit weights: {why}"),
        }
    }
}

/// What a target makes of rows.
struct Outputs {
    states: Vec<f32>,
    last: Vec<f32>,
    logits: Vec<f32>,
    n_rows: usize,
    is_mixture: bool,
}

impl Outputs {
    fn of(target: &Target, rows: &[Vec<u32>]) -> Self {
        let documents: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let all = Capture { layers: (0..target.info().n_layers).collect(), last_hidden: true };
        let captured = target.forward(&documents, &all).unwrap();
        let last = captured.last_hidden.unwrap();
        let logits = target.logits(&last).unwrap().to_f32();
        let keys = ["num_experts", "num_local_experts", "n_routed_experts"];
        let is_mixture = keys.iter().any(|key| !target.info().raw[*key].is_null());
        let (states, n_rows) = (captured.hidden_states.to_f32(), last.rows_cols().0);
        Self { states, last: last.to_f32(), logits, n_rows, is_mixture }
    }

    /// Within a relative distance. With mixtures of experts that holds of most rows: bfloat16 may tip the scales between
    /// two experts, and the row is another one from there on. Returns the largest distance.
    fn expect_near(&self, name: &str, want: &Self, bound: f64) -> f64 {
        let mut largest = 0f64;
        let pairs = [(&self.states, &want.states), (&self.last, &want.last), (&self.logits, &want.logits)];
        for (what, (got, want)) in ["states", "final norm", "logits"].into_iter().zip(pairs) {
            let rows = if self.is_mixture { self.n_rows } else { 1 };
            let width = got.len() / rows;
            let mut distances: Vec<f64> =
                got.chunks(width).zip(want.chunks(width)).map(|(g, w)| distance(g, w)).collect();
            distances.sort_by(f64::total_cmp);
            assert!(distances[rows / 2] < bound, "{name}: {what}: {distances:?}");
            largest = largest.max(distances[rows / 2]);
        }
        largest
    }
}

/// The norm of the difference, relative to that of `want`.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

/// Decoding token by token, and several at once as when proposals are verified, gives the same bits.
fn decode_in_portions(target: &Target, row: &[u32]) {
    let capture = Capture { layers: vec![], last_hidden: true };
    let (prompt, rest) = row.split_at(row.len() / 2);
    let decode = |portion: usize| -> Vec<f32> {
        let mut cache = KvCache::new(target, row.len()).unwrap();
        target.extend(&mut cache, prompt, None, &capture).unwrap();
        let last = rest.chunks(portion).map(|tokens| {
            let last = target.extend(&mut cache, tokens, None, &capture).unwrap().last_hidden.unwrap();
            target.logits(&last).unwrap().to_f32()
        });
        last.collect::<Vec<_>>().concat()
    };
    let one_by_one: Vec<u32> = decode(1).iter().map(|v| v.to_bits()).collect();
    for portion in [2, 5, 32] {
        let bits: Vec<u32> = decode(portion).iter().map(|v| v.to_bits()).collect();
        assert_eq!(bits, one_by_one, "{portion} at once");
    }
}

impl Case {
    fn load(name: &str, folder: &Path, config: &str) -> Self {
        let dir = specforge_testkit::tempdir();
        for entry in fs_err::read_dir(folder).unwrap().map(Result::unwrap) {
            let file = entry.file_name().into_string().unwrap();
            if file.starts_with("model") {
                fs_err::copy(entry.path(), dir.path().join(file)).unwrap();
            }
        }
        fs_err::copy(folder.join(config), dir.path().join("config.json")).unwrap();
        let target =
            Target::load(dir.path(), Device::Cpu, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = Tensors::read(folder.join("expected.safetensors"));
        let rows = rows(&expected);
        Self { name: name.to_owned(), facts: case_json(folder), expected, target, rows }
    }

    /// Compares by the tolerance of `kind`: element by element, or for bfloat16 references by the root mean square
    /// of the distance to the float32 values.
    fn check(&self, kind: &str, tensor: &str, got: &[f32], select: impl Fn(&[usize], Vec<f32>) -> Vec<f32>) {
        let what = format!("{}: {tensor}", self.name);
        let tolerance = &self.facts["tolerance"][kind];
        let Some(ratio) = tolerance["rms_ratio"].as_f64() else {
            let Some(atol) = tolerance["atol"].as_f64() else { return };
            let (shape, want) = self.expected.f32(tensor);
            let rtol = tolerance["rtol"].as_f64().expect("rtol") as f32;
            assert_close(&what, got, &select(shape, want), atol as f32, rtol);
            return;
        };
        let name = format!("float32.{tensor}");
        if !self.expected.contains(&name) {
            return;
        }
        let (shape, want) = self.expected.f32(&name);
        let want = select(shape, want);
        assert_eq!(got.len(), want.len(), "{what}");
        let squares: f64 = got.iter().zip(&want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
        let rms = (squares / got.len() as f64).sqrt();
        let limit = ratio * self.facts["bfloat16_error_against_float32"][kind]["rms"].as_f64().expect("rms");
        assert!(rms <= limit, "{what}: rms {rms:e}, at most {limit:e}");
    }

    /// Embedding and head without the layers between are those of the whole.
    fn tables(&self, folder: &Path) {
        let info = self.target.info();
        let [embedding, head] = tables(folder, info, self.target.embedding().dtype()).unwrap();
        assert_eq!(embedding.to_f32(), self.target.embedding().to_f32(), "{}", self.name);
        assert_eq!(head.to_f32(), self.target.head().to_f32(), "{}", self.name);
    }

    fn documents(&self) -> Vec<&[u32]> {
        self.rows.iter().map(Vec::as_slice).collect()
    }

    /// All rows packed: the embedding, every layer's output, and the final norm.
    fn forward(&self) {
        let n = self.target.info().n_layers;
        let all = Capture { layers: (0..n).collect(), last_hidden: true };
        let captured = self.target.forward(&self.documents(), &all).unwrap();
        let embedded = self.target.embed(&self.rows.concat()).unwrap();
        let h = self.target.info().hidden_size;
        let states = captured.hidden_states.f32s();
        for i in 0..=n {
            let got = if i == 0 { embedded.to_f32() } else { columns(&states, n * h, (i - 1) * h, h) };
            self.check("hidden_states", "padded.hidden_states", &got, |shape, want| {
                let layer = shape[1..].iter().product::<usize>();
                valid(&shape[1..], &want[i * layer..][..layer], &self.rows)
            });
        }
        let last = captured.last_hidden.unwrap().to_f32();
        self.check("final_norm", "padded.final_norm", &last, |shape, want| valid(shape, &want, &self.rows));
    }

    /// The second row alone: EAGLE3's capture, the final norm, and the logits.
    fn single(&self) {
        let aux = &self.facts["aux"]["zero_based_layer_outputs"];
        let layers: Vec<usize> = serde_json::from_value(aux.clone()).unwrap();
        if aux == &serde_json::json!(Capture::eagle3_default(self.target.info().n_layers).unwrap().layers) {
            assert_eq!(layers.len(), 3, "{}", self.name);
        }
        let captured = self.target.forward(&[&self.rows[1]], &Capture { layers, last_hidden: true }).unwrap();
        let last = captured.last_hidden.unwrap();
        let same = |_: &[usize], want| want;
        self.check("hidden_states", "single.1.aux", &captured.hidden_states.f32s(), same);
        self.check("final_norm", "single.1.final_norm", &last.f32s(), same);
        self.check("logits", "single.1.logits", &self.target.logits(&last).unwrap().f32s(), same);
    }

    fn long(&self) {
        let tokens: Vec<u32> = self.expected.i64("long.input_ids").1.iter().map(|&t| t as u32).collect();
        let capture = Capture { layers: vec![], last_hidden: true };
        let last = self.target.forward(&[&tokens], &capture).unwrap().last_hidden.unwrap();
        self.check("long.final_norm", "long.final_norm", &last.f32s(), |_, want| want);
    }

    /// Greedy continuation with a cache.
    fn greedy(&self) {
        let greedy = &self.facts["greedy"];
        let row = greedy["prompt"]["row"].as_u64().unwrap() as usize;
        let len = greedy["prompt"]["len"].as_u64().unwrap() as usize;
        let (shape, expected) = self.expected.f32("greedy.logits");
        let mut next = self.rows[row][..len].to_vec();
        let mut cache = KvCache::new(&self.target, len + shape[0]).unwrap();
        let capture = Capture { layers: vec![], last_hidden: true };
        let (mut tokens, mut all) = (Vec::new(), Vec::new());
        for _ in 0..shape[0] {
            let last = self.target.extend(&mut cache, &next, None, &capture).unwrap().last_hidden.unwrap();
            let logits = self.target.logits(&last).unwrap().to_f32();
            let logits = &logits[logits.len() - shape[1]..];
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            all.extend_from_slice(logits);
            tokens.push(best as i64);
            next = vec![best as u32];
        }
        // A bfloat16 reference may legitimately continue otherwise.
        if self.facts["tolerance"]["logits"]["rms_ratio"].is_null() {
            assert_eq!(tokens, self.expected.i64("greedy.tokens").1, "{}", self.name);
            self.check("logits", "greedy.logits", &all, |_, _| expected.clone());
        }
    }
}

/// The batch without its padding.
fn rows(expected: &Tensors) -> Vec<Vec<u32>> {
    let (shape, ids) = expected.i64("input_ids");
    let mask = expected.i64("attention_mask").1;
    let len = shape[1];
    let valid =
        |r: usize| (r * len..(r + 1) * len).filter(|&at| mask[at] == 1).map(|at| ids[at] as u32).collect();
    (0..shape[0]).map(valid).collect()
}

/// The rows of a padded `[B, S, H]` that are no padding.
fn valid(shape: &[usize], values: &[f32], rows: &[Vec<u32>]) -> Vec<f32> {
    let (s, h) = (shape[1], shape[2]);
    rows.iter().enumerate().flat_map(|(b, row)| values[b * s * h..][..row.len() * h].to_vec()).collect()
}

fn columns(values: &[f32], width: usize, start: usize, n: usize) -> Vec<f32> {
    values.chunks_exact(width).flat_map(|row| row[start..start + n].to_vec()).collect()
}
