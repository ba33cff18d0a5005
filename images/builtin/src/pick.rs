//! Which page is written next. Pure.

use crate::content::mix;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Sequential,
    Random,
    Zipf,
}

impl Order {
    pub fn parse(text: &str) -> Option<Order> {
        match text {
            "seq" => Some(Order::Sequential),
            "random" => Some(Order::Random),
            "zipf" => Some(Order::Zipf),
            _ => None,
        }
    }
}

/// A source of numbers below `count`, in an order.
pub struct Picker {
    order: Order,
    count: u64,
    state: u64,
}

impl Picker {
    pub fn new(order: Order, count: u64, seed: u64) -> Picker {
        let state = if order == Order::Sequential { 0 } else { mix(seed) };
        Picker {
            order,
            count: count.max(1),
            state,
        }
    }

    pub fn next(&mut self) -> u64 {
        match self.order {
            Order::Sequential => {
                let page = self.state;
                self.state = (page + 1) % self.count;
                page
            }
            Order::Random => below(self.draw(), self.count),
            Order::Zipf => scatter(zipf_rank(self.draw(), self.count), self.count),
        }
    }

    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }
}

/// A 64-bit draw as a number below `count`.
pub fn below(draw: u64, count: u64) -> u64 {
    ((draw as u128 * count as u128) >> 64) as u64
}

/// Rank `count^u - 1` for a uniform u: the probability of rank r falls as 1/(r+1), Zipf's law with exponent 1.
/// In fixed point: 2^(u * log2(count)), with the fraction between powers of two interpolated.
fn zipf_rank(draw: u64, count: u64) -> u64 {
    let whole = 63 - count.max(1).leading_zeros() as u64;
    let fraction = ((count << (63 - whole)) << 1) >> 48; // 16 bits after the leading one
    let log2 = whole << 16 | fraction;
    let power = below(draw, log2 + 1);
    let (exponent, part) = (power >> 16, power & 0xffff);
    let value = (1u64 << exponent) + (((part as u128) << exponent) >> 16) as u64;
    (value - 1).min(count - 1)
}

/// Spreads ranks over the pages, so that the hottest pages are not neighbours.
fn scatter(rank: u64, count: u64) -> u64 {
    const PRIMES: [u64; 2] = [2_654_435_761, 4_294_967_291];
    let prime = if count.is_multiple_of(PRIMES[0]) {
        PRIMES[1]
    } else {
        PRIMES[0]
    };
    (rank as u128 * prime as u128 % count as u128) as u64
}
