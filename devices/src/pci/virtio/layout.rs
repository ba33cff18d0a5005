//! Where things are inside the BAR, and the capabilities that tell the driver.

use std::ops::Range;

use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{CONTROL_ENABLE, CONTROL_FUNCTION_MASK};

pub const BAR_SIZE: u32 = 0x1_0000;
/// Most queues a device can have; each has a vector of its own, and one is for configuration changes.
pub const MAX_QUEUES: usize = 128;

pub(super) const COMMON: Range<u64> = 0x0000..0x1000;
pub(super) const ISR: Range<u64> = 0x1000..0x2000;
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
pub(super) const NOTIFY: Range<u64> = 0x3000..0x4000;
pub(super) const MSIX_TABLE: Range<u64> = 0x8000..0xf000;
pub(super) const MSIX_PENDING: Range<u64> = 0xf000..0x1_0000;
/// Each queue's notification address is its index times this.
pub(super) const NOTIFY_STRIDE: u64 = 4;

const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
const VENDOR_VIRTIO: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// Offsets of the capabilities whose registers do something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capabilities {
    /// MSI-X message control.
    pub(super) msix_control: usize,
    /// The window through configuration space into the BAR.
    pub(super) window: usize,
}

/// Fields of the window capability, from its start.
pub(super) const WINDOW_BAR: usize = 4;
pub(super) const WINDOW_OFFSET: usize = 8;
pub(super) const WINDOW_LENGTH: usize = 12;
pub(super) const WINDOW_DATA: usize = 16;
const WINDOW_LEN: u8 = 20;

/// The configuration space of a virtio device.
pub(super) fn config_space(kind: u16, vectors: u16) -> (ConfigSpace, Capabilities) {
    let class = match kind {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x80, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0x00, 0xff, 0x00],
    };
    let device = DEVICE_BASE.saturating_add(kind);
    let identity = Identity {
        vendor: VENDOR_VIRTIO,
        device,
        class,
        revision: 1,
        subsystem: 0x1100,
    };
    let mut config = ConfigSpace::new(&identity, BAR_SIZE);
    let mut region = |cfg_type: u8, range: Range<u64>, extra: &[u8]| {
        let len = 16 + extra.len() as u8;
        config.add_capability(
            CAP_VENDOR,
            &[&vendor_body(len, cfg_type, range)[..], extra].concat(),
            &[],
        );
    };
    region(1, COMMON, &[]);
    region(2, NOTIFY, &(NOTIFY_STRIDE as u32).to_le_bytes());
    region(3, ISR, &[]);
    region(4, DEVICE, &[]);
    let mut body = vendor_body(WINDOW_LEN, 5, 0..0).to_vec();
    body.extend([0; 4]);
    // The window's bar, offset, length and data may be written.
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.extend([0xff; 12]);
    let window = config.add_capability(CAP_VENDOR, &body, &writable);

    let mut body = vectors.saturating_sub(1).to_le_bytes().to_vec();
    // The low bits say which BAR, and it is 0.
    body.extend((MSIX_TABLE.start as u32).to_le_bytes());
    body.extend((MSIX_PENDING.start as u32).to_le_bytes());
    let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
    let msix = config.add_capability(CAP_MSIX, &body, &writable);
    (
        config,
        Capabilities {
            msix_control: msix + 2,
            window,
        },
    )
}

/// A virtio capability after its id and next bytes.
fn vendor_body(len: u8, cfg_type: u8, range: Range<u64>) -> [u8; 14] {
    let [o0, o1, o2, o3] = (range.start as u32).to_le_bytes();
    let [l0, l1, l2, l3] = ((range.end - range.start) as u32).to_le_bytes();
    [len, cfg_type, 0, 0, 0, 0, o0, o1, o2, o3, l0, l1, l2, l3]
}
