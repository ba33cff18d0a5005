//! The commands of the control queue as data. What they do is `shared`'s matter.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::backend::Offloads;

/// No command that we know is longer: two tables of addresses. A guest that sends more is refused.
pub(super) const MAX_COMMAND_BYTES: usize = 2 + 2 * (4 + 6 * 512);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Which frames the guest wants. Taken and not acted on: the guest filters again anyway, and a bridge has
    /// learnt what belongs here.
    ReceiveMode,
    AddressTable,
    Address([u8; 6]),
    AnnounceAck,
    Pairs(u16),
    Offloads(u64),
}

/// Reads a command; None is answered with an error.
pub(super) fn parse(bytes: &[u8]) -> Option<Command> {
    let (class, rest) = bytes.split_first()?;
    let (command, data) = rest.split_first()?;
    match (u32::from(*class), u32::from(*command)) {
        (VIRTIO_NET_CTRL_RX, 0..=VIRTIO_NET_CTRL_RX_NOBCAST) => {
            matches!(data, [0 | 1]).then_some(Command::ReceiveMode)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            let rest = skip_table(skip_table(data)?)?;
            rest.is_empty().then_some(Command::AddressTable)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            let mac: [u8; 6] = data.try_into().ok()?;
            let [first, ..] = mac;
            (first & 1 == 0).then_some(Command::Address(mac))
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
            data.is_empty().then_some(Command::AnnounceAck)
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            Some(Command::Pairs(u16::from_le_bytes(data.try_into().ok()?)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            Some(Command::Offloads(u64::from_le_bytes(data.try_into().ok()?)))
        }
        _ => None,
    }
}

/// A table is a count of addresses and the addresses.
fn skip_table(data: &[u8]) -> Option<&[u8]> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    rest.get(bytes..)
}

/// What the guest accepts, from feature bits or from the offloads command, which uses the same bits.
pub(super) fn offloads(features: u64) -> Offloads {
    let has = |bit: u32| features & (1 << bit) != 0;
    Offloads {
        checksum: has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(VIRTIO_NET_F_GUEST_ECN),
        ufo: has(VIRTIO_NET_F_GUEST_UFO),
        uso4: has(VIRTIO_NET_F_GUEST_USO4),
        uso6: has(VIRTIO_NET_F_GUEST_USO6),
    }
}

/// All the bits that `offloads` reads.
pub(super) const OFFLOAD_BITS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_read_as_the_specification_writes_them() {
        assert_eq!(parse(&[0, 0, 1]), Some(Command::ReceiveMode));
        assert_eq!(parse(&[0, 5, 0]), Some(Command::ReceiveMode));
        let tables = [
            1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3,
        ];
        assert_eq!(parse(&tables), Some(Command::AddressTable));
        assert_eq!(
            parse(&[1, 1, 2, 0, 0, 0, 0, 9]),
            Some(Command::Address([2, 0, 0, 0, 0, 9]))
        );
        assert_eq!(parse(&[3, 0]), Some(Command::AnnounceAck));
        assert_eq!(parse(&[4, 0, 3, 1]), Some(Command::Pairs(259)));
        assert_eq!(parse(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), Some(Command::Offloads(2)));
    }

    #[test]
    fn what_is_cut_short_or_too_long_or_unknown_is_refused() {
        for bytes in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 7],
            &[0, 6, 1],
            &[1, 0, 1, 0, 0, 0],
            &[1, 0, 255, 255, 255, 255, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            &[1, 1, 1, 0, 0, 0, 0, 9],
            &[1, 1, 2, 0, 0],
            &[2, 0, 0, 0],
            &[3, 0, 0],
            &[4, 0, 1],
            &[4, 1, 1, 0],
            &[5, 0, 0],
            &[99, 0],
        ] {
            assert_eq!(parse(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_command_makes_it_panic(class in 0u8..8, command in 0u8..8, data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = vec![class, command];
            bytes.extend(data);
            let _ = parse(&bytes);
        }
    }
}
