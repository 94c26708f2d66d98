//! Tensors in device memory, and the operations that move or add elements.

use specforge_testkit::Lcg;

use super::{assert_near, device, upload};
use crate::tests::{bits, matrix, normal, rows};
use crate::{DType, Device, Tensor};

/// A tensor of these bfloat16 numbers on the CPU, and in `dtype` on the device.
fn both(t: &Tensor, dtype: DType, device: Device) -> (Tensor, Tensor) {
    let here = super::rounded(t);
    (here.clone(), here.cast(dtype).unwrap().to_device(device).unwrap())
}

const FLOATS: [DType; 2] = [DType::F32, DType::Bf16];

/// Destination and source in every combination of types: `f` on both devices, then the destinations compared.
fn check_pairs(
    name: &str,
    device: Device,
    [dst, src]: [&Tensor; 2],
    f: impl Fn(&mut Tensor, &Tensor, &dyn Fn(Tensor) -> Tensor) -> crate::Result<()>,
) {
    for to in FLOATS {
        for from in FLOATS {
            let ((mut want, mut got), (src, src_there)) = (both(dst, to, device), both(src, from, device));
            let kept = got.clone();
            f(&mut want, &src, &|t| t).unwrap();
            f(&mut got, &src_there, &|t| t.to_device(device).unwrap()).unwrap();
            assert_eq!(got.dtype(), to);
            assert_near(&format!("{name}, {from:?} to {to:?}"), &got, &want);
            assert_eq!(bits(&kept), bits(&super::rounded(dst)), "{name}: shared storage was written to");
        }
    }
}

#[test]
fn cuda_rows_are_added_in_every_combination_of_types() {
    let Some(device) = device() else { return };
    let mut rng = Lcg::new(1);
    for width in [40, 37, 1] {
        let mut x = |n: usize| normal(&mut rng, &[n, width]);
        check_pairs("add_assign", device, [&x(50), &x(50)], |dst, src, _| {
            dst.device().kernels().add_assign(dst, src)
        });
        let distinct = rows((0..50).map(|i| if i % 4 == 0 { u32::MAX } else { 70 - i }));
        check_pairs("distinct rows", device, [&x(80), &x(50)], |dst, src, on| {
            dst.device().kernels().scatter_add_rows(dst, &on(distinct.clone()), src)
        });
        let repeated = rows((0..300).map(|i| if i % 9 == 0 { u32::MAX } else { i * 7 % 20 }));
        check_pairs("repeated rows", device, [&x(20), &x(300)], |dst, src, on| {
            dst.device().kernels().scatter_add_rows(dst, &on(repeated.clone()), src)
        });
        let nothing = rows([u32::MAX; 3]);
        check_pairs("no rows", device, [&x(20), &x(3)], |dst, src, on| {
            dst.device().kernels().scatter_add_rows(dst, &on(nothing.clone()), src)
        });
        check_pairs("copied rows", device, [&x(20), &x(30)], |dst, src, on| {
            let (to, from) = (on(rows([19, 0, 7])), on(rows([4, 29, 4])));
            dst.device().kernels().copy_rows(dst, &to, src, &from)
        });
    }
    let mut x = |width: usize| normal(&mut rng, &[30, width]);
    for cols in [8..24, 3..20, 0..40] {
        check_pairs("columns", device, [&x(40), &x(cols.len())], |dst, src, _| {
            dst.device().kernels().add_columns(dst, cols.clone(), src)
        });
    }
}

/// Every row is added where it belongs whatever the device does at once: sums of many rows have an order.
#[test]
fn cuda_repeated_rows_give_the_same_bits_again() {
    let Some(device) = device() else { return };
    let mut rng = Lcg::new(2);
    let index = Tensor::from_u32(device, (0..3000).map(|i| i * i % 13).collect());
    let (src, dst) = (upload(&normal(&mut rng, &[3000, 64]), device), normal(&mut rng, &[13, 64]));
    let run = || {
        let mut dst = dst.to_device(device).unwrap();
        device.kernels().scatter_add_rows(&mut dst, &index, &src).unwrap();
        bits(&dst)
    };
    let first = run();
    assert!((0..5).all(|_| run() == first));
}

#[test]
fn cuda_rows_and_columns_are_copied_exactly() {
    let Some(device) = device() else { return };
    let index = rows([3, u32::MAX, 0, 3, 19]);
    for width in [40, 37] {
        for dtype in FLOATS {
            let (here, there) = both(&normal(&mut Lcg::new(3), &[20, width]), dtype, device);
            let (cpu, kernels) = (Device::Cpu.kernels(), device.kernels());
            let on = |t: &Tensor| t.to_device(device).unwrap();
            let same = |got: Tensor, want: Tensor| assert_eq!(bits(&got), bits(&want), "{dtype:?}");
            same(kernels.gather_rows(&there, &on(&index)).unwrap(), cpu.gather_rows(&here, &index).unwrap());
            same(kernels.columns(&there, 5..21).unwrap(), cpu.columns(&here, 5..21).unwrap());
            same(kernels.columns(&there, 8..24).unwrap(), cpu.columns(&here, 8..24).unwrap());
            assert_near("add", &kernels.add(&there, &there).unwrap(), &cpu.add(&here, &here).unwrap());
        }
    }
    // An embedding table of halves.
    let (here, _) = both(&normal(&mut Lcg::new(4), &[20, 16]), DType::F32, device);
    let half = here.cast(DType::F16).unwrap().to_device(device).unwrap();
    let got = device.kernels().gather_rows(&half, &index.to_device(device).unwrap()).unwrap();
    assert_near("halves", &got, &Device::Cpu.kernels().gather_rows(&here, &index).unwrap());
}

#[test]
fn cuda_tensors_come_back_as_they_went() {
    let Some(device) = device() else { return };
    let values = [0.0, -0.0, 1.5, -3.25, f32::INFINITY, f32::NEG_INFINITY, 1e-40, 65504.0, 6e-8];
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        // Small and large uploads go different ways.
        for n in [0, 1, 9, 5000, 3_000_000] {
            let all: Vec<f32> = values.iter().copied().cycle().take(n).collect();
            let here = matrix(all, &[n]).cast(dtype).unwrap();
            let there = here.to_device(device).unwrap();
            assert_eq!((there.dtype(), there.shape(), there.device()), (dtype, &[n][..], device));
            assert!(bits(&there) == bits(&here), "{n} of {dtype:?}");
            assert!(there.to_bf16() == here.to_bf16(), "{n} of {dtype:?}");
        }
    }
    let index = Tensor::from_u32(device, vec![4, 0, u32::MAX]);
    assert_eq!(index.u32s(), Some(&[4, 0, u32::MAX][..]));
    assert_eq!(index.to_device(Device::Cpu).unwrap().to_u32(), [4, 0, u32::MAX]);
    assert_eq!(Tensor::zeros(device, &[3, 5]).unwrap().to_f32(), [0.0; 15]);
    let shape = Tensor::from_f32(device, vec![0.0; 5], &[2, 3]).unwrap_err();
    assert_eq!(shape.to_string(), "tensor: data has shape [2, 3], expected 5 elements");
}

#[test]
fn cuda_casts_round_like_the_cpu() {
    let Some(device) = device() else { return };
    let mut rng = Lcg::new(5);
    for n in [1, 8, 1003] {
        // Ties, too: halves of the last bit of a bfloat16.
        let values = (0..n).map(|i| if i % 3 == 0 { 1.0 + (2 * i + 1) as f32 / 256.0 } else { rng.normal() });
        let here = matrix(values.collect(), &[n]);
        let there = here.to_device(device).unwrap();
        let narrow = there.cast(DType::Bf16).unwrap();
        assert_eq!(bits(&narrow), bits(&here.cast(DType::Bf16).unwrap()));
        assert_eq!(bits(&narrow.cast(DType::F32).unwrap()), bits(&here.cast(DType::Bf16).unwrap()));
        let half = here.cast(DType::F16).unwrap();
        for dtype in FLOATS {
            let got = half.to_device(device).unwrap().cast(dtype).unwrap();
            assert_eq!(bits(&got), bits(&half.cast(dtype).unwrap()), "{dtype:?}");
        }
    }
    let error = matrix(vec![1.0], &[1]).to_device(device).unwrap().cast(DType::F16).unwrap_err();
    assert_eq!(error.to_string(), "cast on a CUDA device: there is no conversion of F32 to F16");
}

#[test]
fn cuda_rows_are_appended_and_dropped_without_touching_shared_storage() {
    let Some(device) = device() else { return };
    for dtype in FLOATS {
        let on = |values: &[f32]| {
            let t = matrix(values.to_vec(), &[values.len() / 2, 2]).cast(dtype).unwrap();
            t.to_device(device).unwrap()
        };
        let mut cache = on(&[1.0, 2.0]);
        let shared = cache.clone();
        cache.append_rows(&on(&[3.0, 4.0, 5.0, 6.0])).unwrap();
        assert_eq!((cache.shape(), cache.to_f32()), (&[3, 2][..], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let three = cache.clone();
        cache.truncate_rows(2);
        cache.truncate_rows(9);
        assert_eq!((cache.shape(), cache.to_f32()), (&[2, 2][..], vec![1.0, 2.0, 3.0, 4.0]));
        // What was dropped here is still there for who shares it.
        cache.append_rows(&on(&[7.0, 8.0])).unwrap();
        assert_eq!(cache.to_f32(), [1.0, 2.0, 3.0, 4.0, 7.0, 8.0]);
        assert_eq!(three.to_f32(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((shared.shape(), shared.to_f32()), (&[1, 2][..], vec![1.0, 2.0]));
        // Grown many times, in place where it can.
        (0..100).for_each(|i| cache.append_rows(&on(&[i as f32, 0.5])).unwrap());
        assert_eq!(cache.shape(), [103, 2]);
        let last: Vec<f32> = (0..100).flat_map(|i| [i as f32, 0.5]).collect();
        assert_eq!(cache.to_f32()[6..], last);
        cache.truncate_rows(0);
        assert_eq!((cache.shape(), cache.to_f32()), (&[0, 2][..], vec![]));
        assert!(cache.append_rows(&on(&[1.0, 2.0]).reshape(&[2, 1]).unwrap()).is_err());
    }
    let mut positions = Tensor::from_u32(device, vec![1, 2]).reshape(&[2, 1]).unwrap();
    positions.append_rows(&Tensor::from_u32(device, vec![9]).reshape(&[1, 1]).unwrap()).unwrap();
    assert_eq!(positions.to_u32(), [1, 2, 9]);
}

#[test]
fn cuda_tensors_take_values_where_they_are() {
    let Some(device) = device() else { return };
    for dtype in FLOATS {
        let values = matrix(vec![1.0, -2.0, 3.5], &[3]);
        let mut t = Tensor::zeros(device, &[3]).unwrap().cast(dtype).unwrap();
        let address = t.stored().unwrap().address().unwrap();
        for values in [values.clone(), values.cast(DType::Bf16).unwrap(), values.to_device(device).unwrap()] {
            t.assign(&values).unwrap();
            assert_eq!((t.dtype(), t.to_f32()), (dtype, vec![1.0, -2.0, 3.5]));
            assert_eq!(t.stored().unwrap().address().unwrap(), address);
        }
        let shared = t.clone();
        t.assign(&matrix(vec![0.0; 3], &[3])).unwrap();
        assert_eq!((t.to_f32(), shared.to_f32()), (vec![0.0; 3], vec![1.0, -2.0, 3.5]));
        let error = t.assign(&matrix(vec![0.0; 3], &[3, 1])).unwrap_err().to_string();
        assert_eq!(error, "assign: values has shape [3, 1], expected [3]");
    }
}

#[test]
fn cuda_numbers_are_told_from_what_is_none() {
    let Some(device) = device() else { return };
    for n in [1, 9, 100_003] {
        for dtype in FLOATS {
            let finite = |at: usize, bad: f32| {
                let mut values = vec![f32::MAX / 2.0; n];
                values[at] = bad;
                let there = matrix(values, &[n]).cast(dtype).unwrap().to_device(device).unwrap();
                device.kernels().all_finite(&there).unwrap().wait().unwrap()
            };
            assert!(finite(0, -1.0) && finite(n - 1, 1e-40));
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(
                    !finite(0, bad) && !finite(n - 1, bad) && !finite(n / 2, bad),
                    "{bad}, {n} of {dtype:?}"
                );
            }
        }
    }
    assert!(device.kernels().all_finite(&Tensor::zeros(device, &[0]).unwrap()).unwrap().wait().unwrap());
}

/// Few rows, and more than one piece of pinned memory takes.
#[test]
fn cuda_rows_of_a_table_on_the_host_keep_their_type_and_values() {
    let Some(device) = device() else { return };
    let table = normal(&mut Lcg::new(9), &[70, 1001]);
    for n in [4, 6000] {
        let index: Vec<u32> = (0..n).map(|i| i * 37 % 70).collect();
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let table = table.cast(dtype).unwrap();
            let got = table.rows_from_host(&index, device).unwrap();
            assert_eq!((got.dtype(), got.shape()), (dtype, &[n as usize, 1001][..]));
            let want = Device::Cpu.kernels().gather_rows(&table, &rows(index.clone())).unwrap();
            let got = got.to_device(Device::Cpu).unwrap().cast(DType::F32).unwrap();
            assert_eq!(bits(&got), bits(&want.cast(DType::F32).unwrap()), "{n} rows of {dtype:?}");
        }
    }
    assert!(rows([1]).rows_from_host(&[0], device).is_err());
}

/// What is computed beside the compute stream is waited for where it is used, and freed in order: rounds of copies whose
/// memory is given back at once, on both sides, keep their values.
#[test]
fn cuda_work_beside_is_in_order() {
    let Some(device) = device() else { return };
    let n = 3 << 20;
    let kernels = device.kernels();
    let mut sum = Tensor::zeros(device, &[n]).unwrap();
    for round in 0..50 {
        let start = Tensor::random(device, &[n], 1.0, round).unwrap();
        let want = start.to_f32();
        // Computed on the compute stream right before, and dropped beside it.
        let doubled = kernels.scale(&start, 2.0).unwrap();
        let wide = device.beside(|| doubled.cast(DType::F32).inspect(|_| drop(doubled))).unwrap();
        // Memory that comes and goes meanwhile.
        let other = kernels.scale(&start, -1.0).unwrap();
        sum.assign(&wide).unwrap();
        device.beside(|| kernels.add_assign(&mut sum, &wide)).unwrap();
        drop((wide, other));
        let got = kernels.scale(&sum, 0.25).unwrap().to_f32();
        assert!(got == want, "round {round}");
    }
}
