//! The configuration space of one function: 256 bytes, which of their bits the guest may write, and one memory BAR.

use serde::{Deserialize, Serialize};

use std::ops::Range;

pub(super) const CONFIG_LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const CACHE_LINE: usize = 0x0c;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Parity and SERR bits may be written but mean nothing here.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_OFF;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Who a function says it is.
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    /// Class, subclass, programming interface.
    pub(super) class: [u8; 3],
    pub(super) revision: u8,
    pub(super) subsystem: u16,
}

/// One function's configuration space.
pub(super) struct ConfigSpace {
    bytes: [u8; CONFIG_LEN],
    writable: [u8; CONFIG_LEN],
    /// 0 if the function has no BAR.
    bar_size: u32,
    last_capability: usize,
    end: usize,
}

/// What a guest can have changed in the header. Capabilities save themselves.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct SavedHeader {
    command: u16,
    bar: u32,
    cache_line: u8,
    interrupt_line: u8,
}

impl ConfigSpace {
    /// `bar_size` is zero or a power of two of at least 4096.
    pub(super) fn new(identity: &Identity, bar_size: u32) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            bar_size,
            last_capability: 0,
            end: FIRST_CAPABILITY,
        };
        let Identity {
            vendor,
            device,
            class: [class, subclass, interface],
            revision,
            subsystem,
        } = *identity;
        space.set(0x00, &vendor.to_le_bytes());
        space.set(0x02, &device.to_le_bytes());
        space.set(0x08, &[revision, interface, subclass, class]);
        space.set(0x2c, &vendor.to_le_bytes());
        space.set(0x2e, &subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        if bar_size != 0 {
            // Writing all ones and reading back shows the size: the bits below it stay zero.
            space.allow(BAR0, &(!(bar_size - 1)).to_le_bytes());
        }
        space
    }

    /// Appends a capability: `body` follows the id and next bytes, `writable` says which of its bits are.
    /// Returns where it starts. Capabilities are few and fixed; one that does not fit is left out.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        let next_end = (at + 2 + body.len()).next_multiple_of(4);
        if next_end > CONFIG_LEN {
            debug_assert!(false, "capabilities do not fit");
            return at;
        }
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let link = if self.last_capability == 0 {
            CAPABILITIES
        } else {
            self.last_capability + 1
        };
        // Below 256, as was checked.
        self.set(link, &[at as u8]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_capability = at;
        self.end = next_end;
        at
    }

    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// Where the BAR is, if memory decoding is on and the address can be one.
    pub(super) fn bar(&self) -> Option<Range<u64>> {
        let start = u64::from(self.u32(BAR0));
        let enabled = self.u16(COMMAND) & COMMAND_MEMORY != 0 && self.bar_size != 0 && start != 0;
        let end = start + u64::from(self.bar_size);
        // A BAR that reaches 4 GiB is one that is just being sized.
        (enabled && end <= 1 << 32).then_some(start..end)
    }

    pub(super) fn bar_size(&self) -> u32 {
        self.bar_size
    }

    /// Puts the BAR somewhere, as firmware would.
    pub(super) fn place_bar(&mut self, address: u32) {
        self.write(BAR0 as u16, &address.to_le_bytes());
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        self.number(at, 2) as u16
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        self.number(at, 4)
    }

    fn number(&self, at: usize, len: usize) -> u32 {
        let bytes = self.bytes.get(at..at + len).unwrap_or_default();
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    fn set(&mut self, at: usize, values: &[u8]) {
        self.bytes
            .iter_mut()
            .skip(at)
            .zip(values)
            .for_each(|(byte, value)| *byte = *value);
    }

    fn allow(&mut self, at: usize, masks: &[u8]) {
        self.writable
            .iter_mut()
            .skip(at)
            .zip(masks)
            .for_each(|(byte, mask)| *byte = *mask);
    }

    pub(super) fn save(&self) -> SavedHeader {
        SavedHeader {
            command: self.u16(COMMAND),
            bar: self.u32(BAR0),
            cache_line: self.number(CACHE_LINE, 1) as u8,
            interrupt_line: self.number(INTERRUPT_LINE, 1) as u8,
        }
    }

    pub(super) fn restore(&mut self, saved: &SavedHeader) {
        let SavedHeader {
            command,
            bar,
            cache_line,
            interrupt_line,
        } = *saved;
        self.write(COMMAND as u16, &command.to_le_bytes());
        self.write(BAR0 as u16, &bar.to_le_bytes());
        self.write(CACHE_LINE as u16, &[cache_line]);
        self.write(INTERRUPT_LINE as u16, &[interrupt_line]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fresh() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: [1, 0, 0],
            revision: 1,
            subsystem: 0x1100,
        };
        ConfigSpace::new(&identity, 0x10000)
    }

    #[test]
    fn sizing_shows_the_size_and_putting_back_shows_the_address() {
        let mut space = fresh();
        space.place_bar(0xc001_0000);
        space.write(BAR0 as u16, &[0xff; 4]);
        assert_eq!(space.u32(BAR0), 0xffff_0000);
        space.write(BAR0 as u16, &0xc001_0000u32.to_le_bytes());
        assert_eq!(space.bar(), None);
        space.write(COMMAND as u16, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar(), Some(0xc001_0000..0xc002_0000));
        // The other BARs do not exist.
        space.write(0x14, &[0xff; 20]);
        assert_eq!((0x14..0x28).step_by(4).map(|at| space.u32(at)).sum::<u32>(), 0);
    }

    #[test]
    fn a_bar_at_the_top_or_at_zero_decodes_nothing() {
        let mut space = fresh();
        space.write(COMMAND as u16, &[0xff, 0xff]);
        for (address, expected) in [
            (0u32, false),
            (0xffff_0000, true),
            (0xffff_ffff, true),
            (1, false),
        ] {
            space.place_bar(address);
            assert_eq!(space.bar().is_some(), expected, "{address:#x}");
        }
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = fresh();
        let first = space.add_capability(0x09, &[1, 2, 3, 4, 5], &[]);
        let second = space.add_capability(0x11, &[6; 10], &[0, 0xc0]);
        assert_eq!(space.u16(STATUS) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        assert_eq!(usize::from(space.bytes[CAPABILITIES]), first);
        assert_eq!(usize::from(space.bytes[first + 1]), second);
        assert_eq!((space.bytes[second], space.bytes[second + 1]), (0x11, 0));
        assert_eq!((first % 4, second % 4), (0, 0));
        space.write(second as u16 + 2, &[0xff; 4]);
        assert_eq!(space.u32(second), 0xc606_0011);
    }

    proptest! {
        #[test]
        fn identity_and_capabilities_cannot_be_changed_and_nothing_panics(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..100)) {
            let mut space = fresh();
            space.add_capability(0x09, &[1, 2, 3], &[]);
            let before = space.bytes;
            for (offset, data) in &writes {
                space.write(*offset % 300, data);
                let mut out = data.clone();
                space.read(*offset, &mut out);
                space.bar();
            }
            for at in (0..4).chain(8..12).chain(0x14..0x3c).chain(0x40..CONFIG_LEN) {
                prop_assert_eq!(space.bytes[at], before[at]);
            }
            let mut new = fresh();
            new.restore(&space.save());
            prop_assert_eq!(new.save(), space.save());
        }
    }
}
