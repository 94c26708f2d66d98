//! Reproducible random numbers for tests: the same everywhere, fast, and of no statistical ambition.

/// A 64-bit linear congruential generator (Knuth's MMIX constants), output mixed by xor-shift.
#[derive(Debug, Clone)]
pub struct Lcg(u64);

impl Lcg {
    /// A generator whose numbers depend on `seed` alone.
    pub fn new(seed: u64) -> Self {
        let mut lcg = Self(seed);
        // Neighbouring seeds start with neighbouring states: two steps separate them.
        lcg.bits();
        lcg.bits();
        lcg
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 33);
        let x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^ (x >> 33)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(self.uniform())).cos()) as f32
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "there is no number below 0");
        (self.bits() % n as u64) as usize
    }

    /// `n` standard normal numbers times `scale`.
    pub fn normals(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }

    /// `n` numbers uniform in [low, high).
    pub fn uniforms(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| low + (high - low) * self.uniform()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reproducible_and_depend_on_the_seed() {
        let draw = |seed| Lcg::new(seed).normals(8, 1.0);
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn moments_are_right() {
        let mut lcg = Lcg::new(7);
        let n = 20_000;
        let uniform: Vec<f32> = (0..n).map(|_| lcg.uniform()).collect();
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
        assert!((mean(&uniform) - 0.5).abs() < 0.01);
        let normal = lcg.normals(n, 2.0);
        assert!(mean(&normal).abs() < 0.05);
        let variance = mean(&normal.iter().map(|v| v * v).collect::<Vec<_>>());
        assert!((variance - 4.0).abs() < 0.15, "{variance}");
        assert!((0..1000).map(|_| lcg.below(3)).all(|v| v < 3));
        assert!(lcg.uniforms(100, -2.0, -1.0).iter().all(|v| (-2.0..-1.0).contains(v)));
    }
}
