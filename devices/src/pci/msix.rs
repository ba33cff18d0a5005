//! The MSI-X table of one function: what the guest wrote, what is masked, and what waits for being unmasked.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::irq::{MsiController, MsiMessage};
use crate::log_once::LogOnce;

const ENTRY_LEN: u64 = 16;
const MASKED: u32 = 1;
/// Bits of the capability's message control.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
pub(super) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// "No vector" in virtio's vector registers.
pub(super) const NO_VECTOR: u16 = 0xffff;

pub(super) struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
    controller: Arc<dyn MsiController>,
    refused: LogOnce,
}

#[derive(Clone)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// What the controller knows.
    installed: Option<MsiMessage>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct SavedMsix {
    enabled: bool,
    function_masked: bool,
    entries: Vec<SavedEntry>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct SavedEntry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Msix {
    pub(super) fn new(entries: u16, controller: Arc<dyn MsiController>) -> Self {
        let entry = Entry {
            message: MsiMessage { address: 0, data: 0 },
            masked: true,
            pending: false,
            installed: None,
        };
        Self {
            entries: vec![entry; usize::from(entries)],
            enabled: false,
            function_masked: false,
            controller,
            refused: LogOnce::new(),
        }
    }

    pub(super) fn len(&self) -> u16 {
        // Made from a u16.
        self.entries.len() as u16
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled
    }

    /// The guest wrote the capability's message control.
    pub(super) fn set_control(&mut self, control: u16) {
        let enabled = control & CONTROL_ENABLE != 0;
        let function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if (enabled, function_masked) != (self.enabled, self.function_masked) {
            self.enabled = enabled;
            self.function_masked = function_masked;
            (0..self.entries.len()).for_each(|slot| self.settle(slot));
        }
    }

    /// The message control as the guest would read it, without the table's size.
    pub(super) fn control(&self) -> u16 {
        let bit = |on: bool, bit: u16| if on { bit } else { 0 };
        bit(self.enabled, CONTROL_ENABLE) | bit(self.function_masked, CONTROL_FUNCTION_MASK)
    }

    /// Sends the interrupt, or keeps it pending while it is masked.
    pub(super) fn trigger(&mut self, vector: u16) {
        let slot = usize::from(vector);
        if let Some(entry) = self.entries.get_mut(slot)
            && self.enabled
        {
            entry.pending = true;
            self.settle(slot);
        }
    }

    /// Brings the controller in line with one entry, and sends what waited if it may go now.
    fn settle(&mut self, slot: usize) {
        let (enabled, function_masked) = (self.enabled, self.function_masked);
        let Some(entry) = self.entries.get_mut(slot) else {
            return;
        };
        if !enabled {
            if entry.installed.take().is_some() {
                // Taking a message away cannot fail in a way that matters: nothing is sent any more.
                let _ = self.controller.set(slot, None);
            }
            return;
        }
        // A masked entry keeps its old message at the controller: a guest masks, rewrites and unmasks to move an
        // interrupt to another CPU, and a new message is a dear operation.
        if function_masked || entry.masked {
            return;
        }
        if entry.installed != Some(entry.message) {
            match self.controller.set(slot, Some(entry.message)) {
                Ok(()) => entry.installed = Some(entry.message),
                Err(error) => {
                    self.refused
                        .warn(|| format!("an interrupt message of the guest was refused: {error}"));
                    entry.installed = None;
                    return;
                }
            }
        }
        if std::mem::take(&mut entry.pending) {
            self.controller.trigger(slot);
        }
    }

    /// Reads the table: four or eight aligned bytes at a time, as the specification has it.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !well_formed(offset, data.len()) {
            return;
        }
        if let Some(entry) = self.entries.get((offset / ENTRY_LEN) as usize) {
            let image = entry_image(entry);
            data.copy_from_slice(
                image
                    .get(within(offset, data.len()))
                    .unwrap_or(&[0xff; 8][..data.len()]),
            );
        }
    }

    pub(super) fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !well_formed(offset, data.len()) {
            return;
        }
        let slot = (offset / ENTRY_LEN) as usize;
        let Some(entry) = self.entries.get_mut(slot) else {
            return;
        };
        let mut image = entry_image(entry);
        let Some(target) = image.get_mut(within(offset, data.len())) else {
            return;
        };
        target.copy_from_slice(data);
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = image;
        entry.message = MsiMessage {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        };
        entry.masked = u32::from(control) & MASKED != 0;
        self.settle(slot);
    }

    /// Reads the pending bits, 64 to a word.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(first) = usize::try_from(offset.saturating_mul(8)) else {
            return;
        };
        for (at, byte) in data.iter_mut().enumerate() {
            let bits = self.entries.iter().skip(first.saturating_add(at * 8)).take(8);
            *byte = bits
                .enumerate()
                .fold(0, |byte, (bit, entry)| byte | u8::from(entry.pending) << bit);
        }
    }

    pub(super) fn save(&self) -> SavedMsix {
        let Self {
            entries,
            enabled,
            function_masked,
            controller: _,
            refused: _,
        } = self;
        let saved = entries.iter().map(|entry| {
            let Entry {
                message: MsiMessage { address, data },
                masked,
                pending,
                installed: _,
            } = *entry;
            SavedEntry {
                address,
                data,
                masked,
                pending,
            }
        });
        SavedMsix {
            enabled: *enabled,
            function_masked: *function_masked,
            entries: saved.collect(),
        }
    }

    /// False if the number of entries differs; then nothing is changed.
    pub(super) fn restore(&mut self, saved: &SavedMsix) -> bool {
        let SavedMsix {
            enabled,
            function_masked,
            entries,
        } = saved;
        if entries.len() != self.entries.len() {
            return false;
        }
        for (entry, saved) in self.entries.iter_mut().zip(entries) {
            let SavedEntry {
                address,
                data,
                masked,
                pending,
            } = *saved;
            entry.message = MsiMessage { address, data };
            entry.masked = masked;
            entry.pending = pending;
        }
        (self.enabled, self.function_masked) = (*enabled, *function_masked);
        (0..self.entries.len()).for_each(|slot| self.settle(slot));
        true
    }
}

fn well_formed(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn within(offset: u64, len: usize) -> Range<usize> {
    let start = (offset % ENTRY_LEN) as usize;
    start..start + len
}

fn entry_image(entry: &Entry) -> [u8; 16] {
    let control = if entry.masked { MASKED } else { 0 };
    let high = u64::from(entry.message.data) | u64::from(control) << 32;
    (u128::from(entry.message.address) | u128::from(high) << 64).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Messages;
    use proptest::prelude::*;

    fn table(entries: u16) -> (Msix, Arc<Messages>) {
        let messages = Arc::new(Messages::default());
        (Msix::new(entries, messages.clone()), messages)
    }

    fn unmask(msix: &mut Msix, slot: u64, data: u32) {
        msix.write_table(slot * 16, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(slot * 16 + 8, &data.to_le_bytes());
        msix.write_table(slot * 16 + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn an_interrupt_goes_out_with_the_message_the_guest_wrote() {
        let (mut msix, messages) = table(3);
        unmask(&mut msix, 1, 0x4041);
        msix.trigger(1);
        assert_eq!(messages.take(), []);
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(1);
        assert_eq!(
            messages.take(),
            [MsiMessage {
                address: 0xfee0_0000,
                data: 0x4041
            }]
        );
        msix.trigger(0);
        msix.trigger(3);
        msix.trigger(NO_VECTOR);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn a_masked_interrupt_waits_and_goes_out_once_with_the_new_message() {
        let (mut msix, messages) = table(70);
        msix.set_control(CONTROL_ENABLE);
        unmask(&mut msix, 65, 1);
        msix.write_table(65 * 16 + 12, &1u32.to_le_bytes());
        (0..3).for_each(|_| msix.trigger(65));
        let mut pending = [0; 16];
        msix.read_pending(0, &mut pending);
        assert_eq!(u128::from_le_bytes(pending), 1 << 65);
        assert_eq!(messages.take(), []);
        unmask(&mut msix, 65, 2);
        assert_eq!(
            messages.take(),
            [MsiMessage {
                address: 0xfee0_0000,
                data: 2
            }]
        );
        msix.read_pending(8, &mut pending[..8]);
        assert_eq!(pending[..8], [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_back() {
        let (mut msix, messages) = table(2);
        unmask(&mut msix, 0, 1);
        unmask(&mut msix, 1, 2);
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.trigger(0);
        msix.trigger(1);
        assert_eq!(messages.take(), []);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(messages.take().len(), 2);
        msix.set_control(0);
        assert_eq!(messages.installed(), 0);
    }

    #[test]
    fn what_is_pending_travels() {
        let (mut old, _) = table(2);
        old.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        unmask(&mut old, 1, 7);
        old.trigger(1);
        let saved = old.save();
        let (mut new, messages) = table(2);
        assert!(new.restore(&saved));
        assert_eq!(new.save(), saved);
        new.set_control(CONTROL_ENABLE);
        assert_eq!(
            messages.take(),
            [MsiMessage {
                address: 0xfee0_0000,
                data: 7
            }]
        );
        assert!(!table(3).0.restore(&saved));
    }

    proptest! {
        #[test]
        fn garbage_is_harmless(steps in prop::collection::vec(
            (0..5u8, 0..100u64, prop::collection::vec(any::<u8>(), 0..9), any::<u16>()), 0..100)) {
            let (mut msix, _) = table(5);
            for (kind, offset, mut data, number) in steps {
                match kind {
                    0 => msix.write_table(offset, &data),
                    1 => msix.read_table(offset, &mut data),
                    2 => msix.read_pending(offset, &mut data),
                    3 => msix.set_control(number),
                    _ => msix.trigger(number % 8),
                }
            }
            let saved = msix.save();
            let (mut new, _) = table(5);
            prop_assert!(new.restore(&saved));
            // What waited unmasked for a refused message may have gone out; the table itself is the same.
            prop_assert_eq!(new.save(), saved);
        }
    }
}
