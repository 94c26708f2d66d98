//! Sources to machine code, and kernels that run.

use specforge_cuda::{Architecture, Arg, Compiler, Defines, Error, Gpu, Launch, Unit};

use crate::support::{KERNELS, gpu};

const NUMBER: Defines = &[("NUMBER", 7)];

/// NVRTC, if this machine has it.
fn compiler() -> Option<Compiler> {
    Compiler::new().map_err(|error| println!("skipped: {error}")).ok()
}

#[test]
fn a_source_compiles_with_its_headers_and_macros() {
    let Some(compiler) = compiler() else { return };
    assert!(compiler.version() >= (12, 0));
    for architecture in [(8, 0), (9, 0)].map(Architecture::of) {
        let cubin = compiler.compile(&KERNELS, NUMBER, &architecture).unwrap();
        assert!(cubin.starts_with(b"\x7fELF"));
        assert_eq!(cubin, compiler.compile(&KERNELS, NUMBER, &architecture).unwrap());
    }
}

#[test]
fn what_does_not_compile_is_named_with_the_compilers_words() {
    let Some(compiler) = compiler() else { return };
    let architecture = Architecture::named("sm_80");
    let broken =
        Unit { name: "broken", source: "extern \"C\" __global__ void f() { nothing(); }", headers: &[] };
    let error = compiler.compile(&broken, &[], &architecture).unwrap_err();
    let Error::Compile { unit, arch, log } = &error else { panic!("{error}") };
    assert_eq!((unit.as_str(), arch.as_str()), ("broken", "sm_80"));
    assert!(log.contains("\"nothing\" is undefined"), "{log}");
    assert!(error.to_string().starts_with("CUDA: kernels broken do not compile for sm_80:\n"));
    // Without the macro that it needs.
    assert!(compiler.compile(&KERNELS, &[], &architecture).is_err());
}

fn launch(kernel: &'static str, grid: usize, block: usize, shared: usize) -> Launch<'static> {
    Launch { unit: &KERNELS, defines: NUMBER, kernel, grid: [grid, 1, 1], block, shared }
}

fn bytes<const N: usize, T: Copy>(values: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| to(v)).collect()
}

#[test]
fn kernels_run_in_the_order_of_the_calls() {
    let Some(gpu) = gpu() else { return };
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (from, to) = (gpu.upload(&bytes(&x, f32::to_le_bytes)).unwrap(), gpu.alloc(4000).unwrap());
    let line = |to: u64, from: u64, a: f32, b: f64| {
        let args = [to.into(), from.into(), 1000i64.into(), a.into(), Arg::from(b)];
        gpu.launch(&launch("line", 4, 256, 0), &args).unwrap();
    };
    line(to.address(), from.address(), 2.0, 1.0);
    let first = gpu.read_back(to.address(), 4000).unwrap();
    line(to.address(), to.address(), -1.0, 0.5);
    let second = gpu.read_back(to.address(), 4000).unwrap();
    // An empty grid does nothing.
    gpu.launch(&launch("line", 0, 256, 0), &[]).unwrap();
    let want = |f: &dyn Fn(f32) -> f32| bytes(&x.iter().map(|&v| f(v)).collect::<Vec<_>>(), f32::to_le_bytes);
    assert!(second.wait().unwrap() == want(&|v| -0.5 - 2.0 * v));
    assert!(first.wait().unwrap() == want(&|v| 2.0 * v + 1.0));
}

#[test]
fn arguments_of_every_kind_arrive() {
    let Some(gpu) = gpu() else { return };
    let out = gpu.alloc_zeroed(80).unwrap();
    let pair = [&(-9i32).to_le_bytes()[..], &[0; 4], &2.5f64.to_le_bytes()].concat();
    let args = [
        out.address().into(),
        (-5i32).into(),
        4_000_000_000u32.into(),
        (-1i64 << 40).into(),
        1.5f32.into(),
        Arg::from(-0.1f64),
        true.into(),
        Arg::Bytes(&pair),
    ];
    gpu.launch(&launch("arguments", 1, 1, 0), &args).unwrap();
    let want = [-5.0, 4e9, -((1i64 << 40) as f64), 1.5, -0.1, 1.0, -9.0, 2.5, 7.0, 0.25];
    let read = gpu.read_back(out.address(), 80).unwrap();
    assert_eq!(read.wait().unwrap(), bytes(&want, f64::to_le_bytes));
}

#[test]
fn a_kernel_gets_the_shared_memory_it_asks_for() {
    let Some(gpu) = gpu() else { return };
    // Little, more than is free without asking, all there is, and little again.
    let most = gpu.properties().shared_memory;
    for shared in [400, 60_000, most, 400] {
        let n = shared / 4;
        let x: Vec<i32> = (0..n as i32).collect();
        let (from, to) = (gpu.upload(&bytes(&x, i32::to_le_bytes)).unwrap(), gpu.alloc(4 * n).unwrap());
        let args = [to.address().into(), from.address().into(), Arg::from(n as i32)];
        gpu.launch(&launch("reversed", 1, 256, 4 * n), &args).unwrap();
        let want: Vec<i32> = x.into_iter().rev().collect();
        assert!(
            gpu.read_back(to.address(), 4 * n).unwrap().wait().unwrap() == bytes(&want, i32::to_le_bytes)
        );
    }
}

#[test]
fn a_kernel_that_is_not_there_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let error = gpu.launch(&launch("nothing", 1, 1, 0), &[]).unwrap_err().to_string();
    assert!(error.starts_with("CUDA: cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"), "{error}");
    gpu.load(&KERNELS, NUMBER).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn events_tell_the_time_between_them() {
    let Some(gpu) = gpu() else { return };
    let before = gpu.record().unwrap();
    let memory = gpu.alloc_zeroed(64 << 20).unwrap();
    let after = gpu.record().unwrap();
    let milliseconds = after.milliseconds_since(&before).unwrap();
    assert!(milliseconds > 0.0 && milliseconds < 10_000.0, "{milliseconds}");
    drop(memory);
}

#[test]
fn a_device_that_is_not_there_is_an_error_with_a_remedy() {
    let far = Gpu::open(99).unwrap_err().to_string();
    assert!(far.contains("devices are numbered 0 to 15"), "{far}");
    let Ok(count) = Gpu::count() else { return };
    if count < 16 {
        let missing = Gpu::open(count).unwrap_err().to_string();
        assert!(missing.contains(&format!("sees no device {count} (it has {count})")), "{missing}");
    }
}
