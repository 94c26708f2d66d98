//! The device a command computes on, and what is known of it.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use specforge_config::DeviceChoice;
use specforge_cuda::{Compiler, Config, Gpu, Library, blas_version, libraries, nccl_library};
use specforge_tensor::Device;

use crate::env;
use crate::show::{Progress, note};

/// Tells the CUDA layer what only the command line may read.
pub(crate) fn configure() {
    specforge_cuda::configure(Config {
        library_folders: env::cuda_folders(),
        kernel_cache: env::kernel_cache(),
        on_compile: Some(|unit| note!("kernels   compiling {unit} for this card (once)")),
    });
}

/// The GPU of this process.
static ORDINAL: AtomicUsize = AtomicUsize::new(0);

/// Takes the GPU of a rank's number on its machine; the only one that there is to see, if a launcher has chosen.
pub(crate) fn choose(local_rank: usize) -> Result<()> {
    match Gpu::count() {
        // Without a GPU that is for whoever asks for one to say.
        Err(_) | Ok(0 | 1) => {}
        Ok(n) if local_rank < n => ORDINAL.store(local_rank, Ordering::Relaxed),
        Ok(n) => bail!(
            "this is rank {local_rank} (from 0) of its machine, which shows {n} GPUs: start one process per GPU"
        ),
    }
    Ok(())
}

/// The number of this process's GPU.
fn ordinal() -> usize {
    ORDINAL.load(Ordering::Relaxed)
}

/// The device of a choice; says in one line which it is.
pub(crate) fn device(choice: DeviceChoice) -> Result<Device> {
    let device = match choice {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Auto => Device::cuda(ordinal()).unwrap_or_else(|why| {
            // A machine without a driver is no surprise; one that cannot use its card is.
            if libraries()[0].path.is_some() {
                note!("device    cpu, because the GPU cannot be used: {why}");
            }
            Device::Cpu
        }),
        DeviceChoice::Cuda => Device::cuda(ordinal()).context("device = \"cuda\"")?,
    };
    if let Some(gpu) = device.gpu() {
        note!("device    {}", line(gpu));
    }
    Ok(device)
}

/// The device that a choice came to.
pub(crate) fn chosen(choice: DeviceChoice) -> Result<Device> {
    Ok(if choice == DeviceChoice::Cuda { Device::cuda(ordinal())? } else { Device::Cpu })
}

/// What `auto` came to.
pub(crate) fn choice(device: Device) -> DeviceChoice {
    if device == Device::Cpu { DeviceChoice::Cpu } else { DeviceChoice::Cuda }
}

/// Compiles (or finds in the cache) and loads every kernel that the card can use.
pub(crate) fn warm() -> Result<()> {
    let gpu = Gpu::open(0)?;
    let units = specforge_tensor::units(gpu.architecture().is_hopper(), None);
    let progress = Progress::new("kernels", false);
    for (done, (unit, defines)) in units.iter().enumerate() {
        progress.set(done as u64, units.len() as u64);
        gpu.load(unit, defines)?;
    }
    progress.done();
    note!("kernels   {} modules for {}", units.len(), gpu.architecture().name());
    Ok(())
}

fn line(gpu: &Gpu) -> String {
    let p = gpu.properties();
    format!(
        "{}, {:.0} GiB, {}, driver for CUDA {}",
        p.name,
        p.memory as f64 / f64::from(1 << 30),
        gpu.architecture().name(),
        version(p.driver)
    )
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// The facts of `specforge info`: the device, or why there is none, and the libraries found.
pub(crate) fn facts() -> Value {
    let mut facts = match Gpu::open(0) {
        Ok(gpu) => json!({ "device": "cuda", "gpu": line(gpu), "gpus": Gpu::count().unwrap_or(1) }),
        Err(why) => json!({ "device": "cpu", "gpu": format!("none: {why}") }),
    };
    for library in libraries().iter().chain([nccl_library()]) {
        facts[library.name] = library_line(library).into();
    }
    if let Some(cache) = env::kernel_cache() {
        facts["kernel_cache"] = cache.display().to_string().into();
    }
    facts
}

fn library_line(library: &Library) -> String {
    let Some(path) = &library.path else { return format!("not found: {}", library.remedy) };
    let version = match library.name {
        "nvrtc" => {
            Compiler::new().ok().map(|compiler| compiler.version()).map(|(a, b)| format!(" ({a}.{b})"))
        }
        "cublasLt" => blas_version().map(|(a, b)| format!(" ({a}.{b})")),
        _ => None,
    };
    let version = version.unwrap_or_default();
    format!("{}{version}", path.display())
}
