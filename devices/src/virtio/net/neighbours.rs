//! Which IP addresses the guest has claimed as its own, learnt from the frames it sends.
//!
//! Only claims count: ARP senders and neighbour discovery. The source address of an ordinary packet proves nothing,
//! because a guest that routes sends other hosts' packets, and announcing their addresses as the guest's would
//! take them off their network.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The most recently claimed ones are kept.
const MAX_ADDRESSES: usize = 16;
/// As much of a frame as `learn` looks at: Ethernet, IPv6 and a neighbour message up to its target.
pub(super) const LOOK_BYTES: usize = 14 + 40 + 24;
const ETHERNET: usize = 14;
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbours {
    /// Latest claim last.
    pub ipv4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Ipv6Addr>,
    /// The guest is an IPv6 router, which its advertisements must go on saying.
    pub ipv6_router: bool,
}

fn bytes_at<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Whether the frame is of a kind that `learn` looks into, from its first 14 bytes.
pub(super) fn may_claim(ethernet: &[u8]) -> bool {
    matches!(ethernet.get(12..14), Some([0x08, 0x06] | [0x86, 0xdd]))
}

impl Neighbours {
    /// Takes note of what a frame from the guest with this address claims. The frame may be cut short.
    pub fn learn(&mut self, mac: [u8; 6], frame: &[u8]) {
        if bytes_at::<6>(frame, 6) != Some(mac) {
            return;
        }
        match frame.get(12..14) {
            Some([0x08, 0x06]) => {
                if let Some(ip) = arp_sender(mac, frame) {
                    keep(&mut self.ipv4, ip);
                }
            }
            Some([0x86, 0xdd]) => {
                if let Some((ip, router)) = neighbour_claim(frame) {
                    if let Some(router) = router {
                        self.ipv6_router = router;
                    }
                    keep(&mut self.ipv6, ip);
                }
            }
            _ => {}
        }
    }

    /// What a peer sent may be longer than what we would have learnt.
    pub(super) fn bound(&mut self) {
        self.ipv4.truncate(MAX_ADDRESSES);
        self.ipv6.truncate(MAX_ADDRESSES);
    }
}

fn keep<T: PartialEq>(list: &mut Vec<T>, ip: T) {
    if list.last() == Some(&ip) {
        return;
    }
    list.retain(|known| *known != ip);
    if list.len() >= MAX_ADDRESSES {
        list.remove(0);
    }
    list.push(ip);
}

fn arp_sender(mac: [u8; 6], frame: &[u8]) -> Option<Ipv4Addr> {
    let body = frame.get(ETHERNET..)?;
    let sender_mac: [u8; 6] = bytes_at(body, 8)?;
    let ip = Ipv4Addr::from(bytes_at::<4>(body, 14)?);
    // A probe (RFC 5227) asks with sender zero before the address is its own.
    let claims = body.starts_with(&ARP_ETHERNET_IPV4)
        && sender_mac == mac
        && !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_loopback());
    claims.then_some(ip)
}

/// The claimed address, and what the message says about being a router, if it says that.
fn neighbour_claim(frame: &[u8]) -> Option<(Ipv6Addr, Option<bool>)> {
    let packet = frame.get(ETHERNET..)?;
    let (next_header, hop_limit) = (*packet.get(6)?, *packet.get(7)?);
    // Neighbour discovery never passes a router: its hop limit is 255.
    if next_header != ICMPV6 || hop_limit != 255 {
        return None;
    }
    let source = Ipv6Addr::from(bytes_at::<16>(packet, 8)?);
    let message = packet.get(40..)?;
    let (ip, router) = match *message.first()? {
        // Sent from :: it only asks whether the address is free.
        NEIGHBOUR_SOLICITATION => (source, None),
        ROUTER_ADVERTISEMENT => (source, Some(true)),
        NEIGHBOUR_ADVERTISEMENT => {
            let flags = *message.get(4)?;
            (
                Ipv6Addr::from(bytes_at::<16>(message, 8)?),
                Some(flags & 0x80 != 0),
            )
        }
        _ => return None,
    };
    let usable = !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback());
    usable.then_some((ip, router))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    fn arp(source: [u8; 6], sender: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(source);
        frame.extend([8, 6]);
        frame.extend(ARP_ETHERNET_IPV4);
        frame.extend([0, 1]);
        frame.extend(sender);
        frame.extend(ip);
        frame.extend([0; 10]);
        frame
    }

    fn nd(kind: u8, flags: u8, source: &str, target: &str) -> Vec<u8> {
        let mut frame = vec![0x33; 6];
        frame.extend(MAC);
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, ICMPV6, 255]);
        frame.extend(source.parse::<Ipv6Addr>().unwrap().octets());
        frame.extend([0xff; 16]);
        frame.extend([kind, 0, 0, 0, flags, 0, 0, 0]);
        frame.extend(target.parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(frame.len(), LOOK_BYTES);
        frame
    }

    fn learnt(frames: &[Vec<u8>]) -> Neighbours {
        let mut neighbours = Neighbours::default();
        for frame in frames {
            neighbours.learn(MAC, frame);
        }
        neighbours
    }

    #[test]
    fn claims_are_learnt_and_nothing_else_is() {
        let good = learnt(&[
            arp(MAC, MAC, [192, 0, 2, 7]),
            nd(NEIGHBOUR_SOLICITATION, 0, "fe80::1", "fe80::99"),
            nd(NEIGHBOUR_ADVERTISEMENT, 0x60, "fe80::1", "2001:db8::5"),
        ]);
        assert_eq!(good.ipv4, [Ipv4Addr::new(192, 0, 2, 7)]);
        assert_eq!(
            good.ipv6,
            ["fe80::1", "2001:db8::5"].map(|ip| ip.parse::<Ipv6Addr>().unwrap())
        );
        assert!(!good.ipv6_router);

        let other = [0x52, 0x54, 0, 0, 0, 2];
        let mut routed = nd(NEIGHBOUR_SOLICITATION, 0, "2001:db8::66", "fe80::99");
        routed[14 + 7] = 64;
        let nothing = learnt(&[
            arp(other, other, [192, 0, 2, 8]),
            arp(MAC, other, [192, 0, 2, 9]),
            arp(MAC, MAC, [0, 0, 0, 0]),
            arp(MAC, MAC, [255, 255, 255, 255]),
            nd(NEIGHBOUR_SOLICITATION, 0, "::", "fe80::1"),
            nd(128, 0, "2001:db8::66", "::"),
            routed,
        ]);
        assert_eq!(nothing, Neighbours::default());
    }

    #[test]
    fn a_router_is_known_by_its_advertisements() {
        assert!(learnt(&[nd(ROUTER_ADVERTISEMENT, 0, "fe80::1", "::")]).ipv6_router);
        assert!(learnt(&[nd(NEIGHBOUR_ADVERTISEMENT, 0xe0, "fe80::1", "fe80::1")]).ipv6_router);
        let no_more = [
            nd(ROUTER_ADVERTISEMENT, 0, "fe80::1", "::"),
            nd(NEIGHBOUR_ADVERTISEMENT, 0x60, "fe80::1", "fe80::1"),
        ];
        assert!(!learnt(&no_more).ipv6_router);
    }

    #[test]
    fn the_latest_claims_are_kept_and_no_more_than_fit() {
        let mut neighbours = Neighbours::default();
        for i in 0..200u8 {
            neighbours.learn(MAC, &arp(MAC, MAC, [10, 0, 0, i]));
        }
        neighbours.learn(MAC, &arp(MAC, MAC, [10, 0, 0, 190]));
        assert_eq!(neighbours.ipv4.len(), MAX_ADDRESSES);
        assert_eq!(neighbours.ipv4.last(), Some(&Ipv4Addr::new(10, 0, 0, 190)));
        assert_eq!(neighbours.ipv4.first(), Some(&Ipv4Addr::new(10, 0, 0, 184)));
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic_or_grow(frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..60)) {
            let mut neighbours = Neighbours::default();
            for mut frame in frames {
                if frame.len() > 14 {
                    frame[6..12].copy_from_slice(&MAC);
                    let kind = if frame[0] & 1 == 0 { [8, 6] } else { [0x86, 0xdd] };
                    frame[12..14].copy_from_slice(&kind);
                }
                neighbours.learn(MAC, &frame);
            }
            prop_assert!(neighbours.ipv4.len() <= MAX_ADDRESSES && neighbours.ipv6.len() <= MAX_ADDRESSES);
        }
    }
}
