//! Matrix products of small whole numbers, which every order of summation gets right.

use specforge_cuda::{Gemm, GemmType, Gpu, Operand};

use crate::support::gpu;

/// Whole numbers from -2 to 2 as the upper halves of their float32 bits.
fn whole(n: usize, seed: usize) -> (Vec<f32>, Vec<u8>) {
    let values: Vec<f32> = (0..n).map(|i| ((i * 7 + i / 13 + seed * 3) % 5) as f32 - 2.0).collect();
    let bytes = values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
    (values, bytes)
}

fn decode(bytes: &[u8], output: GemmType) -> Vec<f32> {
    match output {
        GemmType::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        _ => bytes.chunks(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    size: [usize; 3],
    transposed: [bool; 2],
    output: GemmType,
    adds: bool,
    bias: bool,
}

fn check(gpu: &'static Gpu, case: Case) {
    let [m, n, k] = case.size;
    let ((a, a_bytes), (b, b_bytes), (c, c_bytes)) = (whole(m * k, 1), whole(k * n, 2), whole(m * n, 3));
    let (bias, bias_bytes) = whole(n, 4);
    let c_bytes = match case.output {
        GemmType::F32 => c.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => c_bytes,
    };
    let [a_there, b_there, d_there, bias_there] =
        [a_bytes, b_bytes, c_bytes, bias_bytes].map(|bytes| gpu.upload(&bytes).unwrap());
    let plain = |address, ld, transposed| Operand { address, ld, transposed };
    let d = plain(d_there.address(), n, false);
    let gemm = Gemm {
        m,
        n,
        k,
        a: plain(a_there.address(), if case.transposed[0] { m } else { k }, case.transposed[0]),
        b: plain(b_there.address(), if case.transposed[1] { k } else { n }, case.transposed[1]),
        input: GemmType::Bf16,
        d,
        output: case.output,
        c: case.adds.then_some(d),
        bias: case.bias.then_some(bias_there.address()),
        scales: None,
    };
    gpu.gemm(&gemm).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let element = |i: usize, j: usize| {
        let left = |l: usize| if case.transposed[0] { a[l * m + i] } else { a[i * k + l] };
        let right = |l: usize| if case.transposed[1] { b[j * k + l] } else { b[l * n + j] };
        let sum: f32 = (0..k).map(|l| left(l) * right(l)).sum();
        sum + if case.adds { c[i * n + j] } else { 0.0 } + if case.bias { bias[j] } else { 0.0 }
    };
    let want: Vec<f32> = (0..m * n).map(|e| element(e / n, e % n)).collect();
    let bytes = if case.output == GemmType::F32 { 4 } else { 2 };
    let read = gpu.read_back(d_there.address(), bytes * m * n).unwrap();
    let got = decode(read.wait().unwrap(), case.output);
    // Sums beyond 256 are rounded to bfloat16; where something is added, the library may round the product first.
    let rounding = match (bytes, case.adds) {
        (4, _) => 0.0,
        (_, false) => 1.0 / 256.0,
        (_, true) => 1.0 / 128.0,
    };
    let near = |(got, want): (&f32, &f32)| (got - want).abs() <= want.abs() * rounding;
    assert!(got.iter().zip(&want).all(near), "{case:?}");
}

#[test]
fn products_are_right_for_every_layout() {
    let Some(gpu) = gpu() else { return };
    // The forward, the gradient of the input, and that of the weight; aligned and not; the row count changes.
    for size in [[64, 128, 256], [40, 24, 72], [100, 33, 20], [101, 33, 20], [7, 10, 7], [1, 1, 1]] {
        for output in [GemmType::Bf16, GemmType::F32] {
            for adds in [false, true] {
                let case = |transposed, bias| Case { size, transposed, output, adds, bias };
                check(gpu, case([false, true], false));
                check(gpu, case([false, false], false));
                check(gpu, case([true, false], false));
                if output == GemmType::Bf16 {
                    check(gpu, case([false, true], true));
                }
            }
        }
    }
}

#[test]
fn products_without_rows_or_columns_do_nothing() {
    let Some(gpu) = gpu() else { return };
    for size in [[0, 5, 4], [5, 0, 4]] {
        let case = Case { size, transposed: [false, true], output: GemmType::Bf16, adds: false, bias: false };
        check(gpu, case);
    }
}
