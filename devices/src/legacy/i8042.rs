//! The keyboard controller, of which only the reset line is connected. Has no state.

use std::ops::Range;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::request::{MachineEvents, MachineRequest};

/// Port 0x61 in the middle is the timer's; where the host's KVM has no timer it reads as nothing there.
pub const PORTS: Range<u64> = 0x60..0x65;
const DATA: u64 = 0;
const COMMAND: u64 = 4;
const RESET: u8 = 0xfe;

pub struct I8042 {
    events: Arc<dyn MachineEvents>,
}

impl I8042 {
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The status says: no input waiting, ready for a command.
        data.fill(if matches!(offset, DATA | COMMAND) { 0 } else { 0xff });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            self.events.request(MachineRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Requests;

    #[test]
    fn only_the_reset_command_resets() {
        let requests = Arc::new(Requests::default());
        let controller = I8042::new(requests.clone());
        for (offset, data) in [(0, &[RESET][..]), (4, &[0xd1]), (4, &[RESET, 0]), (1, &[RESET])] {
            controller.write(offset, data);
        }
        assert_eq!(requests.take(), []);
        controller.write(4, &[RESET]);
        assert_eq!(requests.take(), [MachineRequest::Reset]);
    }

    #[test]
    fn a_guest_that_waits_for_the_controller_does_not_wait() {
        let mut status = [0xff];
        I8042::new(Arc::new(Requests::default())).read(4, &mut status);
        assert_eq!(status[0] & 3, 0);
    }
}
