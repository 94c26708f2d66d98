//! Fresh weights. Every weight draws from its own stream, named by seed and tensor, so that adding or reordering
//! weights changes no other one.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use specforge_tensor::{Device, Result, Tensor};

/// A weight, in the device's storage type, of normal values with mean 0 and the given standard deviation (Box-Muller over ChaCha8).
pub fn normal(device: Device, shape: &[usize], std: f64, seed: u64, name: &str) -> Result<Tensor> {
    let mut rng = stream(seed, name);
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let n: usize = shape.iter().product();
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt() * std, std::f64::consts::TAU * unit());
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(n);
    Tensor::from_f32(device, values, shape)?.cast(device.storage())
}

/// A weight of one value.
pub fn constant(device: Device, shape: &[usize], value: f32) -> Result<Tensor> {
    Tensor::from_f32(device, vec![value; shape.iter().product()], shape)?.cast(device.storage())
}

/// A random stream of its own for a seed and a name: the same on every machine.
pub fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut key = [0; 32];
    key.copy_from_slice(
        blake3::Hasher::new().update(&seed.to_le_bytes()).update(name.as_bytes()).finalize().as_bytes(),
    );
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_the_asked_moments_and_depends_on_name_and_seed() {
        let draw =
            |seed, name| normal(Device::Cpu, &[100, 101], 0.02, seed, name).expect("a weight").to_f32();
        let x = draw(1, "a");
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 1e-3 && (var.sqrt() - 0.02).abs() < 5e-4, "mean {mean}, std {}", var.sqrt());
        assert_eq!(x, draw(1, "a"));
        assert_ne!(x, draw(2, "a"));
        assert_ne!(x, draw(1, "b"));
    }
}
