//! The gated delta rule against its recurrence written out in float64.

use specforge_testkit::{Lcg, assert_close};

use super::{bits, matrix, normal, rows};
use crate::kernels::{Columns, DeltaInputs};
use crate::{DeltaShape, Device, Result, Tensor};

const NONE: u32 = u32::MAX;

/// Inputs of a rule whose b and a are columns of one matrix.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) shape: DeltaShape,
    pub(crate) qkv: Tensor,
    pub(crate) ba: Tensor,
    pub(crate) gates: [Tensor; 2],
    pub(crate) states: Tensor,
    pub(crate) from: Vec<u32>,
    pub(crate) to: Vec<u32>,
}

impl Case {
    /// Rows that start from and leave states: 0 is known from the start, there are as many as `to` needs.
    pub(crate) fn new(shape: DeltaShape, from: &[u32], to: &[u32]) -> Self {
        let (mut rng, n) = (Lcg::new(37), from.len());
        let states = to.iter().filter(|&&t| t != NONE).max().map_or(1, |&t| t as usize + 1);
        let mut draw = |shape: &[usize]| normal(&mut rng, shape);
        Self {
            shape,
            qkv: draw(&[n, shape.width()]),
            ba: draw(&[n, 2 * shape.value_heads]),
            gates: [draw(&[shape.value_heads]), draw(&[shape.value_heads])],
            states: draw(&[states, shape.state()]),
            from: from.to_vec(),
            to: to.to_vec(),
        }
    }

    /// A sequence of `n` rows, its documents beginning at these rows.
    pub(crate) fn documents(shape: DeltaShape, n: usize, starts: &[usize]) -> Self {
        let mut from = vec![NONE; n];
        starts.iter().for_each(|&start| from[start] = 0);
        Self::new(shape, &from, &vec![NONE; n])
    }

    /// Rows that go on, and a tree on them: 0 - 1 - 3, 0 - 2, 4.
    pub(crate) fn tree(shape: DeltaShape) -> Self {
        Self::new(shape, &[0, NONE, 1, NONE, 2, 3, 1], &[NONE, 1, 2, 3, NONE, NONE, NONE])
    }

    /// Outputs, and states after the call, on the device of the tensors.
    pub(crate) fn run(&self) -> [Tensor; 2] {
        self.try_run().unwrap()
    }

    /// As [`Case::run`], where the device may refuse.
    pub(crate) fn try_run(&self) -> Result<[Tensor; 2]> {
        let (device, mut states) = (self.qkv.device(), self.states.clone());
        let [from, to] = [&self.from, &self.to].map(|index| Tensor::from_u32(device, index.clone()));
        let heads = self.shape.value_heads;
        let part = |first| Columns { of: &self.ba, first };
        let [a_log, dt_bias] = &self.gates;
        let (shape, qkv, b, a) = (self.shape, &self.qkv, part(0), part(heads));
        let inputs = DeltaInputs { shape, qkv, b, a, a_log, dt_bias, from: &from, to: &to };
        let out = device.kernels().delta_rule(&inputs, &mut states)?;
        Ok([out, states])
    }

    fn head(&self, h: usize, states: &mut [f64]) -> Vec<Vec<f64>> {
        let s = self.shape;
        let wide = |t: &Tensor| t.f32s().iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let [qkv, ba, a_log, dt_bias] = [&self.qkv, &self.ba, &self.gates[0], &self.gates[1]].map(wide);
        let (size, key_head) = (s.key_dim * s.value_dim, h / (s.value_heads / s.key_heads));
        let place = |slot: u32| slot as usize * s.state() + h * size;
        let mut state = vec![0.0; size];
        let mut out = Vec::new();
        for r in 0..self.from.len() {
            if self.from[r] != NONE {
                state.copy_from_slice(&states[place(self.from[r])..][..size]);
            }
            let row = &qkv[r * s.width()..][..s.width()];
            let normed = |x: &[f64], scale: f64| -> Vec<f64> {
                let length = (x.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
                x.iter().map(|v| v / length * scale).collect()
            };
            let q = normed(&row[key_head * s.key_dim..][..s.key_dim], (s.key_dim as f64).powf(-0.5));
            let k = normed(&row[(s.key_heads + key_head) * s.key_dim..][..s.key_dim], 1.0);
            let v = &row[2 * s.key_heads * s.key_dim + h * s.value_dim..][..s.value_dim];
            let (b, a) = (ba[2 * r * s.value_heads + h], ba[(2 * r + 1) * s.value_heads + h]);
            let keep = (-a_log[h].exp() * (a + dt_bias[h]).exp().ln_1p()).exp();
            state.iter_mut().for_each(|s| *s *= keep);
            for j in 0..s.value_dim {
                let seen: f64 = (0..s.key_dim).map(|i| state[i * s.value_dim + j] * k[i]).sum();
                let change = (v[j] - seen) / (1.0 + (-b).exp());
                (0..s.key_dim).for_each(|i| state[i * s.value_dim + j] += k[i] * change);
            }
            let sum = |j: usize| (0..s.key_dim).map(|i| state[i * s.value_dim + j] * q[i]).sum();
            out.push((0..s.value_dim).map(sum).collect());
            if self.to[r] != NONE {
                states[place(self.to[r])..][..size].copy_from_slice(&state);
            }
        }
        out
    }

    fn plain(&self) -> [Vec<f32>; 2] {
        let mut states: Vec<f64> = self.states.f32s().iter().map(|&v| f64::from(v)).collect();
        let heads: Vec<_> = (0..self.shape.value_heads).map(|h| self.head(h, &mut states)).collect();
        let row = |r: usize| heads.iter().flat_map(move |head| head[r].clone()).collect::<Vec<f64>>();
        let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
        [narrow((0..self.from.len()).flat_map(row).collect()), narrow(states)]
    }
}

/// Heads of odd and of even sizes, shared by neighbours or not.
fn shapes() -> [DeltaShape; 3] {
    [[1, 1, 1, 1], [2, 4, 6, 5], [2, 2, 16, 16]].map(|[key_heads, value_heads, key_dim, value_dim]| {
        DeltaShape { key_heads, value_heads, key_dim, value_dim }
    })
}

#[test]
fn states_fade_and_are_corrected() {
    for shape in shapes() {
        let cases =
            [Case::documents(shape, 90, &[0, 3, 40]), Case::documents(shape, 3, &[]), Case::tree(shape)];
        for (case, name) in cases.into_iter().zip(["documents", "from nothing", "a tree"]) {
            let ([out, states], [want, want_states]) = (case.run(), case.plain());
            assert_close(&format!("{name}, {shape:?}"), &out.f32s(), &want, 1e-5, 1e-4);
            assert_close(&format!("{name}, {shape:?}, states"), &states.f32s(), &want_states, 1e-5, 1e-4);
        }
    }
}

#[test]
fn a_state_goes_on_to_the_same_bits() {
    let shape = shapes()[1];
    let whole = Case::new(shape, &[0, NONE, NONE, NONE], &[NONE, 1, NONE, NONE]);
    let [out, states] = whole.run();
    let rest = |t: &Tensor| t.rows(2..4).unwrap();
    let states = [states.rows(1..2).unwrap(), states.rows(1..2).unwrap()].map(|t| t.to_f32()).concat();
    let second = Case {
        qkv: rest(&whole.qkv),
        ba: rest(&whole.ba),
        states: matrix(states, &[2, shape.state()]),
        from: vec![0, NONE],
        to: vec![NONE; 2],
        ..whole.clone()
    };
    assert_eq!(bits(&second.run()[0]), bits(&rest(&out)));
}

#[test]
fn threads_change_no_bit_of_a_state() {
    let case = Case::tree(shapes()[1]);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.run().map(|t| bits(&t)))
    };
    assert_eq!(run(4), run(1));
}

#[test]
fn wrong_states_are_refused() {
    use crate::{Delta, Params, Part, Tape};
    let case = Case::tree(shapes()[1]);
    let mut params = Params::new();
    let [a_log, dt_bias] = case.gates.clone().map(|t| params.add("gate", t, false));
    let tape = Tape::inference(&params);
    let (qkv, ba) = (tape.input(case.qkv.clone()), tape.input(case.ba.clone()));
    let run = |shape, from: Tensor, states: &[usize]| {
        let to = rows(case.to.clone());
        let (b, a) = (Part::new(&ba, 0), Part::new(&ba, 4));
        let delta = Delta { shape, qkv: &qkv, b, a, a_log, dt_bias, from: &from, to: &to };
        let mut states = Tensor::zeros(Device::Cpu, states).unwrap();
        tape.delta_rule(&delta, &mut states).map(|y| y.value().shape().to_vec()).unwrap_err().to_string()
    };
    let (shape, from) = (case.shape, || rows(case.from.clone()));
    let message = run(DeltaShape { key_heads: 3, ..shape }, from(), &[4, 120]);
    assert_eq!(message, "delta_rule: heads has shape [4, 3], expected a multiple of the key heads");
    assert!(run(DeltaShape { key_dim: 7, ..shape }, from(), &[4, 120]).contains("expected [.., 48]"));
    assert!(run(shape, from(), &[4, 100]).contains("states has shape [4, 100], expected [.., 120]"));
    assert!(run(shape, from(), &[3, 120]).contains("index 3 is outside the 3 rows of the states"));
    assert!(run(shape, rows([0]), &[4, 120]).contains("states before has shape [1], expected [7]"));
}
