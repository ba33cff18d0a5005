//! A port that ends the machine with a code, for tests: writing v gives (v << 1) | 1.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::request::{MachineEvents, MachineRequest};

pub const PORT: u64 = 0xf4;
pub const LEN: u64 = 4;

/// Has no state: it acts at once or never.
pub struct DebugExit {
    events: Arc<dyn MachineEvents>,
}

impl DebugExit {
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let value = data
                .iter()
                .take(4)
                .rev()
                .fold(0u32, |value, byte| value << 8 | u32::from(*byte));
            self.events
                .request(MachineRequest::DebugExit { code: value << 1 | 1 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Requests;

    #[test]
    fn the_code_is_the_value_shifted_with_the_last_bit_set() {
        let requests = Arc::new(Requests::default());
        let port = DebugExit::new(requests.clone());
        port.write(0, &[5]);
        port.write(0, &[0x34, 0x12, 0, 0]);
        port.write(1, &[7]);
        let expected = [11, 0x2469].map(|code| MachineRequest::DebugExit { code });
        assert_eq!(requests.take(), expected);
    }
}
