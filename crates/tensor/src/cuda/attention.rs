//! Attention: warpgroup kernels on Hopper where they exist, the general ones elsewhere.

use specforge_cuda::{Arg, Defines, Gpu, Launch, Unit};

use super::launch::{at, gpu_of, in_bf16, new};
use super::units::{
    ATTENTION_BACKWARD, ATTENTION_BACKWARD_WGMMA, ATTENTION_FORWARD, ATTENTION_FORWARD_WGMMA, HEAD_DIMS,
    SMALL_SHARED_256, capped_head_dim, head_dim, on_warpgroups,
};
use crate::kernels::{AttentionInputs, Columns, Extra};
use crate::{DType, Error, Result, Tensor};

/// Further keys of one call; `MAX_EXTRAS` of attention.cuh.
const MAX_EXTRAS: usize = 32;

/// `Extras` of attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Extras {
    key: [u64; MAX_EXTRAS],
    value: [u64; MAX_EXTRAS],
    index: [u64; MAX_EXTRAS],
    ld_key: [i32; MAX_EXTRAS],
    ld_value: [i32; MAX_EXTRAS],
}

/// `Backward` of attention_backward.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Backward {
    /// q, k, v, out, dout.
    inputs: [u64; 5],
    lse: u64,
    lo: u64,
    hi: u64,
    stats: u64,
    extra_ds: u64,
    /// dq, dk, dv.
    grads: [u64; 3],
    rows: i32,
    keys: i32,
    n_heads: i32,
    n_kv_heads: i32,
    n_extras: i32,
    padded: i32,
    /// Of q, k, v, out, dout, dq, dk, dv.
    ld: [i32; 8],
    scale: f32,
    accumulate: u32,
}

/// `ExtraGrads` of attention_backward.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ExtraGrads {
    key: [u64; MAX_EXTRAS],
    value: [u64; MAX_EXTRAS],
    ld_key: [i32; MAX_EXTRAS],
    ld_value: [i32; MAX_EXTRAS],
    accumulate: [u32; 2],
}

/// Grid, threads of a block, bytes of shared memory.
type Size = ([usize; 2], usize, usize);

/// What a call computes on: everything in bfloat16.
struct Call<'a> {
    inputs: &'a AttentionInputs<'a>,
    gpu: &'static Gpu,
    defines: Defines,
    /// q, k, v; columns of other types were cast.
    qkv: Vec<(Tensor, usize)>,
    extras: Vec<[(Tensor, usize); 2]>,
    rows: usize,
    keys: usize,
}

fn part(columns: &Columns<'_>) -> Result<(Tensor, usize)> {
    Ok((in_bf16(columns.of)?, columns.first))
}

impl<'a> Call<'a> {
    fn new(inputs: &'a AttentionInputs<'a>) -> Result<Self> {
        let dim = inputs.shape.head_dim;
        let known = if inputs.cap.is_some() { capped_head_dim(dim) } else { head_dim(dim) };
        let Some(defines) = known else {
            let known: Vec<usize> = HEAD_DIMS.iter().map(|(dim, _)| *dim).collect();
            let why = format!("heads of {dim} elements; there are kernels for {known:?}");
            return Err(Error::Unsupported { op: "attention", why });
        };
        if inputs.extras.len() > MAX_EXTRAS {
            let why = format!("{} extra keys per query, at most {MAX_EXTRAS}", inputs.extras.len());
            return Err(Error::Unsupported { op: "attention", why });
        }
        let pair = |e: &Extra<'_>| Ok([part(&e.key)?, part(&e.value)?]);
        Ok(Self {
            inputs,
            gpu: gpu_of(inputs.qkv[0].of),
            defines,
            qkv: inputs.qkv.iter().map(part).collect::<Result<_>>()?,
            extras: inputs.extras.iter().map(pair).collect::<Result<_>>()?,
            rows: inputs.spans.lo.len(),
            keys: inputs.qkv[1].of.rows_cols().0,
        })
    }

    fn extras(&self) -> Result<Extras> {
        let mut all: Extras = bytemuck::Zeroable::zeroed();
        for (e, [key, value]) in self.extras.iter().enumerate() {
            (all.key[e], all.ld_key[e]) = place(key)?;
            (all.value[e], all.ld_value[e]) = place(value)?;
            all.index[e] = self.inputs.extras[e].index.map_or(Ok(0), at)?;
        }
        Ok(all)
    }

    fn launch(&self, unit: &Unit, kernel: &'static str, size: Size, args: &[Arg<'_>]) -> Result<()> {
        self.launch_with(self.defines, unit, kernel, size, args)
    }

    fn launch_with(
        &self,
        defines: Defines,
        unit: &Unit,
        kernel: &'static str,
        (grid, block, shared): Size,
        args: &[Arg<'_>],
    ) -> Result<()> {
        let most = self.gpu.properties().shared_memory;
        if shared > most {
            let why = format!("{kernel} needs {shared} bytes of shared memory, this card has {most}");
            return Err(Error::Unsupported { op: "attention", why });
        }
        let grid = [grid[0], grid[1], 1];
        Ok(self.gpu.launch(&Launch { unit, defines, kernel, grid, block, shared }, args)?)
    }

    /// Whether the warpgroup kernels run: forward, backward.
    fn on_warpgroups(&self) -> [bool; 2] {
        let hopper = self.gpu.architecture().is_hopper();
        on_warpgroups(self.inputs.shape.head_dim).map(|exists| exists && hopper)
    }
}

/// Address and row stride.
fn place((tensor, first): &(Tensor, usize)) -> Result<(u64, i32)> {
    Ok((at(tensor)? + 2 * *first as u64, tensor.rows_cols().1 as i32))
}

pub(super) fn forward(inputs: &AttentionInputs<'_>) -> Result<(Tensor, Tensor)> {
    let (call, s) = (Call::new(inputs)?, inputs.shape);
    let d = s.head_dim;
    let out = new(call.gpu, DType::Bf16, &[call.rows, s.n_heads * d])?;
    let lse = new(call.gpu, DType::F32, &[call.rows, s.n_heads])?;
    let [(q, ldq), (k, ldk), (v, ldv)] = [place(&call.qkv[0])?, place(&call.qkv[1])?, place(&call.qkv[2])?];
    let extras = call.extras()?;
    let (lo, hi) = (at(&inputs.spans.lo)?, at(&inputs.spans.hi)?);
    let mut args = args![at(&out)?, at(&lse)?, q, k, v, lo, hi, inputs.sinks.map_or(Ok(0), at)?].to_vec();
    args.push(Arg::Bytes(bytemuck::bytes_of(&extras)));
    let sizes =
        [inputs.extras.len(), call.rows, call.keys, s.n_heads, s.n_kv_heads].map(|n| Arg::from(n as i32));
    args.extend(sizes);
    args.extend([ldq, ldk, ldv, (s.n_heads * d) as i32].map(Arg::from));
    args.extend([s.scale, inputs.cap.unwrap_or(0.0)].map(Arg::from));
    if call.on_warpgroups()[0] {
        let shared = 256 * d + 8 * (if d == 256 { 64 } else { 128 }) * d + 2048;
        let size = ([s.n_heads, call.rows.div_ceil(128)], 384, shared);
        call.launch(&ATTENTION_FORWARD_WGMMA, "attention_forward_wgmma", size, &args)?;
    } else {
        let shared = 384 * (if d.is_multiple_of(64) { d } else { d + 8 });
        let size = ([s.n_heads, call.rows.div_ceil(64)], 128, shared);
        call.launch(&ATTENTION_FORWARD, "attention_forward", size, &args)?;
    }
    Ok((out, lse))
}

pub(super) fn backward(
    inputs: &AttentionInputs<'_>,
    [out, lse, dout]: [&Tensor; 3],
) -> Result<([Tensor; 3], Vec<[Tensor; 2]>)> {
    let (call, s) = (Call::new(inputs)?, inputs.shape);
    if inputs.extras.iter().any(|e| e.index.is_some()) {
        let why = "extra keys with an index have no gradient: only decoding uses them".to_owned();
        return Err(Error::Unsupported { op: "attention_backward", why });
    }
    let (width, kv) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    let bf16 = |rows: usize, width: usize| new(call.gpu, DType::Bf16, &[rows, width]);
    let grads = [bf16(call.rows, width)?, bf16(call.keys, kv)?, bf16(call.keys, kv)?];
    let pair = |_: &Extra<'_>| Ok([bf16(call.rows, kv)?, bf16(call.rows, kv)?]);
    let dextras = inputs.extras.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let padded = call.rows.next_multiple_of(128) + 128;
    let n_extras = inputs.extras.len();
    let stats = new(call.gpu, DType::F32, &[2, s.n_heads, padded])?;
    let extra_ds = new(call.gpu, DType::F32, &[call.rows, s.n_heads, n_extras.max(1)])?;
    let (out, dout) = ((in_bf16(out)?, 0), (in_bf16(dout)?, 0));
    let places = [&call.qkv[0], &call.qkv[1], &call.qkv[2], &out, &dout].map(place);
    let [q, k, v, out_at, dout_at] = places;
    let inputs_at = [q?, k?, v?, out_at?, dout_at?];
    let ld = |i: usize| inputs_at[i].1;
    let b = Backward {
        inputs: inputs_at.map(|(address, _)| address),
        lse: at(lse)?,
        lo: at(&inputs.spans.lo)?,
        hi: at(&inputs.spans.hi)?,
        stats: at(&stats)?,
        extra_ds: at(&extra_ds)?,
        grads: [at(&grads[0])?, at(&grads[1])?, at(&grads[2])?],
        rows: call.rows as i32,
        keys: call.keys as i32,
        n_heads: s.n_heads as i32,
        n_kv_heads: s.n_kv_heads as i32,
        n_extras: n_extras as i32,
        padded: padded as i32,
        ld: [ld(0), ld(1), ld(2), ld(3), ld(4), width as i32, kv as i32, kv as i32],
        scale: s.scale,
        accumulate: 0,
    };
    run_backward(&call, &b, &dextras)?;
    Ok((grads, dextras))
}

fn run_backward(call: &Call<'_>, b: &Backward, dextras: &[[Tensor; 2]]) -> Result<()> {
    let (s, d) = (call.inputs.shape, call.inputs.shape.head_dim);
    let extras = call.extras()?;
    let (b_arg, extras_arg) = (Arg::Bytes(bytemuck::bytes_of(b)), Arg::Bytes(bytemuck::bytes_of(&extras)));
    let (padded, rows, keys) = (b.padded as usize, call.rows, call.keys);
    call.launch(&ATTENTION_BACKWARD, "attention_delta", ([s.n_heads, padded / 64], 256, 0), &[b_arg])?;
    if !dextras.is_empty() {
        let mut to: ExtraGrads = bytemuck::Zeroable::zeroed();
        for (e, [key, value]) in dextras.iter().enumerate() {
            (to.key[e], to.value[e]) = (at(key)?, at(value)?);
            (to.ld_key[e], to.ld_value[e]) = (key.rows_cols().1 as i32, value.rows_cols().1 as i32);
        }
        let lanes = match d {
            0..=64 => 8,
            65..=128 => 16,
            _ => 32,
        };
        let size = ([(rows * s.n_kv_heads * lanes).div_ceil(256), 1], 256, 0);
        let args = [b_arg, extras_arg, Arg::Bytes(bytemuck::bytes_of(&to))];
        call.launch(&ATTENTION_BACKWARD, "attention_backward_extras", size, &args)?;
    }
    if call.on_warpgroups()[1] {
        // Blocks of both kernels fill a multiprocessor; those of dq take over where dk's short ones are done.
        let dkv = ([keys.div_ceil(128) * s.n_kv_heads, 1], 384, 512 * d + 8 * (128 * d + 1024) + 1024);
        let dq = ([rows.div_ceil(128) * s.n_heads, 1], 384, 512 * d + 4 * 256 * d + 1024);
        let unit = &ATTENTION_BACKWARD_WGMMA;
        return call.gpu.side_by_side(
            || call.launch(unit, "attention_backward_dkv_wgmma", dkv, &[b_arg]),
            || call.launch(unit, "attention_backward_dq_wgmma", dq, &[b_arg, extras_arg]),
        );
    }
    let n = if d > 128 { 32 } else { 64 };
    let shared = |n: usize| 256 * d + 4 * d * n + 272 * n;
    let small = d == 256 && shared(n) > call.gpu.properties().shared_memory;
    let (defines, queries) = if small { (SMALL_SHARED_256, 16) } else { (call.defines, n) };
    let dkv = ([keys.div_ceil(64) * s.n_kv_heads, 1], 256, shared(queries));
    call.launch_with(defines, &ATTENTION_BACKWARD, "attention_backward_dkv", dkv, &[b_arg])?;
    let dq = ([rows.div_ceil(64) * s.n_heads, 1], 128, 256 * d + 4 * d * n);
    call.launch(&ATTENTION_BACKWARD, "attention_backward_dq", dq, &[b_arg, extras_arg])
}
