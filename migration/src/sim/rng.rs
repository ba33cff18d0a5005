//! Random numbers that are the same everywhere for the same seed (xoshiro256++).

#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        // SplitMix64 spreads the seed over the state.
        let mut z = seed;
        let state = [0; 4].map(|_: u64| {
            z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = z;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        });
        Rng { state }
    }

    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (mut c, mut d) = (c ^ a, d ^ b);
        let (a, shifted) = (a ^ d, b << 17);
        let b = b ^ c;
        c ^= shifted;
        d = d.rotate_left(45);
        self.state = [a, b, c, d];
        result
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..below; 0 for an empty range.
    pub fn below(&mut self, below: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(below)) >> 64) as u64
    }

    /// The time to the next event of a rate; infinite for no rate.
    pub fn wait(&mut self, rate: f64) -> f64 {
        if rate > 0.0 {
            -(1.0 - self.unit()).ln() / rate
        } else {
            f64::INFINITY
        }
    }

    /// Numbers 0..count in random order.
    pub fn shuffled(&mut self, count: u64) -> Vec<u32> {
        let mut list: Vec<u32> = (0..count as u32).collect();
        for at in (1..list.len()).rev() {
            list.swap(at, self.below(at as u64 + 1) as usize);
        }
        list
    }
}
