//! The floor of a step: its matrix products alone, replayed on random values. No step that runs them can be faster.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use specforge_cuda::{Gemm, GemmType, Gpu, Memory, Operand};
use specforge_tensor::{Device, Tensor};

use super::clock::{Mark, laps, median};
use super::data::Draw;
use super::tflops;

/// Times that the products are run; the middle one counts.
const PASSES: usize = 5;
/// Operands keep their place within so many bytes: algorithms are chosen by alignment.
const ALIGNED: u64 = 256;
/// Random values, repeated until a buffer is full.
const PATTERN: usize = 4 << 20;

/// What the products come to.
#[derive(Debug, Serialize)]
pub(super) struct Floor {
    pub(super) ms: f64,
    /// How many products there are.
    pub(super) products: usize,
    /// Their operations.
    pub(super) flop: f64,
    /// Those of one shape together, the most time first.
    shapes: Vec<Shape>,
}

/// Products of one shape.
#[derive(Debug, Serialize)]
struct Shape {
    kind: &'static str,
    input: &'static str,
    m: usize,
    n: usize,
    k: usize,
    /// How many there are in a step.
    count: usize,
    /// Milliseconds of one.
    ms: f64,
    tflops: f64,
}

/// What an operand is for; those of one role and type share a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    A,
    B,
    C,
    D,
    Bias,
    RowScale,
    ColumnScale,
}

/// Bytes that each kind of operand takes at most.
type Room = BTreeMap<(Role, GemmType), usize>;

/// Buffers that stand for the operands of all products.
struct Scratch(BTreeMap<(Role, GemmType), Arc<Memory>>);

/// The products that `work` runs.
pub(super) fn record(gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<Vec<Gemm>> {
    gpu.record_gemms(true);
    let done = work();
    let gemms = gpu.take_gemms();
    gpu.record_gemms(false);
    done.map(|()| gemms)
}

/// Runs the products back to back, as often as it takes to know their time.
pub(super) fn replay(gpu: &'static Gpu, gemms: &[Gemm]) -> Result<Floor> {
    let scratch = Scratch::new(gpu, gemms)?;
    let gemms: Vec<Gemm> = gemms.iter().map(|gemm| scratch.place(gemm)).collect();
    let pass = || gemms.iter().try_for_each(|gemm| gpu.gemm(gemm));
    let ms = repeat(gpu, PASSES, || Ok(pass()?))?;
    Ok(Floor { ms, products: gemms.len(), flop: gemms.iter().map(flop).sum(), shapes: shapes(gpu, &gemms)? })
}

/// Median milliseconds of `work`, after one time that does not count.
fn repeat(gpu: &'static Gpu, times: usize, work: impl Fn() -> Result<()>) -> Result<f64> {
    work()?;
    let device = Device::Cuda(gpu.ordinal());
    let mut marks = vec![Mark::now(device)?];
    for _ in 0..times {
        work()?;
        marks.push(Mark::now(device)?);
    }
    Ok(median(&laps(&marks)?))
}

fn flop(gemm: &Gemm) -> f64 {
    2.0 * gemm.m as f64 * gemm.n as f64 * gemm.k as f64
}

/// What a product is in a step, by how it reads its operands.
fn kind(gemm: &Gemm) -> &'static str {
    match (gemm.a.transposed, gemm.b.transposed) {
        (true, _) => "weight gradient",
        (false, true) => "forward",
        (false, false) => "input gradient",
    }
}

fn shapes(gpu: &'static Gpu, gemms: &[Gemm]) -> Result<Vec<Shape>> {
    let mut distinct: BTreeMap<_, (&Gemm, usize)> = BTreeMap::new();
    for gemm in gemms {
        let strides = [gemm.a.ld, gemm.b.ld, gemm.d.ld];
        let key = (kind(gemm), gemm.input, gemm.m, gemm.n, gemm.k, gemm.c.is_some(), strides);
        distinct.entry(key).or_insert((gemm, 0)).1 += 1;
    }
    let shape = |(gemm, count): (&Gemm, usize)| {
        let ms = repeat(gpu, PASSES, || Ok(gpu.gemm(gemm)?))?;
        let (kind, input) = (kind(gemm), if gemm.input == GemmType::E4m3 { "e4m3" } else { "bf16" });
        let &Gemm { m, n, k, .. } = gemm;
        Ok(Shape { kind, input, m, n, k, count, ms, tflops: tflops(flop(gemm), ms) })
    };
    let mut shapes = distinct.into_values().map(shape).collect::<Result<Vec<_>>>()?;
    shapes.sort_by(|a, b| f64::total_cmp(&(b.ms * b.count as f64), &(a.ms * a.count as f64)));
    Ok(shapes)
}

/// Buffers that a product reads or writes, and their bytes.
fn operands(gemm: &Gemm) -> Vec<((Role, GemmType), usize)> {
    let bytes = |role, operand: &Operand, [rows, cols]: [usize; 2], t: GemmType| {
        ((role, t), if operand.transposed { cols } else { rows } * operand.ld * size(t))
    };
    let mut all = vec![
        bytes(Role::A, &gemm.a, [gemm.m, gemm.k], gemm.input),
        bytes(Role::B, &gemm.b, [gemm.k, gemm.n], gemm.input),
        bytes(Role::D, &gemm.d, [gemm.m, gemm.n], gemm.output),
    ];
    all.extend(gemm.c.as_ref().map(|c| bytes(Role::C, c, [gemm.m, gemm.n], gemm.output)));
    all.extend(gemm.bias.map(|_| ((Role::Bias, GemmType::Bf16), 2 * gemm.n)));
    let scales =
        [((Role::RowScale, GemmType::F32), 4 * gemm.m), ((Role::ColumnScale, GemmType::F32), 4 * gemm.n)];
    all.extend(gemm.scales.into_iter().flat_map(|_| scales));
    all
}

fn size(t: GemmType) -> usize {
    match t {
        GemmType::E4m3 => 1,
        GemmType::Bf16 => 2,
        GemmType::F32 => 4,
    }
}

impl Scratch {
    fn new(gpu: &'static Gpu, gemms: &[Gemm]) -> Result<Self> {
        let mut room = Room::new();
        for (kind, bytes) in gemms.iter().flat_map(operands) {
            let most = room.entry(kind).or_default();
            *most = bytes.max(*most);
        }
        let buffer = |(kind, bytes): ((Role, GemmType), usize)| {
            Ok((kind, filled(gpu, kind.1, bytes + ALIGNED as usize)?))
        };
        Ok(Self(room.into_iter().map(buffer).collect::<Result<_>>()?))
    }

    /// The product on these buffers: shapes, strides, flags and alignment as they were.
    fn place(&self, gemm: &Gemm) -> Gemm {
        let at = |role, t, address: u64| self.0[&(role, t)].address() + address % ALIGNED;
        let operand = |role, o: Operand, t| Operand { address: at(role, t, o.address), ..o };
        // What adds to the result in place still does.
        let c_role = |c: &Operand| if c.address == gemm.d.address { Role::D } else { Role::C };
        Gemm {
            a: operand(Role::A, gemm.a, gemm.input),
            b: operand(Role::B, gemm.b, gemm.input),
            d: operand(Role::D, gemm.d, gemm.output),
            c: gemm.c.map(|c| operand(c_role(&c), c, gemm.output)),
            bias: gemm.bias.map(|bias| at(Role::Bias, GemmType::Bf16, bias)),
            scales: gemm.scales.map(|[rows, columns]| {
                [at(Role::RowScale, GemmType::F32, rows), at(Role::ColumnScale, GemmType::F32, columns)]
            }),
            ..*gemm
        }
    }
}

/// Memory full of random values: what the multipliers draw in power, and so their clock, depends on the values.
fn filled(gpu: &'static Gpu, t: GemmType, bytes: usize) -> Result<Arc<Memory>> {
    let memory = gpu.alloc(bytes)?;
    let pattern = gpu.upload(&pattern(t)?)?;
    for first in (0..bytes).step_by(PATTERN) {
        gpu.copy(memory.address() + first as u64, pattern.address(), PATTERN.min(bytes - first))?;
    }
    Ok(memory)
}

fn pattern(t: GemmType) -> Result<Vec<u8>> {
    let values = Tensor::random(Device::Cpu, &[PATTERN / size(t)], 1.0, 1)?;
    let mut draw = Draw(1);
    Ok(match t {
        GemmType::F32 => values.to_f32().into_iter().flat_map(f32::to_le_bytes).collect(),
        GemmType::Bf16 => values.to_bf16().into_iter().flat_map(|v| v.to_bits().to_le_bytes()).collect(),
        // Every byte but for those of the largest exponent and mantissa, which are no numbers.
        GemmType::E4m3 => (0..PATTERN).map(|_| (draw.next() as u8) & 0xf7).collect(),
    })
}
