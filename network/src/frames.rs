//! The frames that tell a network where a guest is now. Every byte is written here; nothing is parsed.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;

/// Who a guest is on its network, as far as is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub mac: [u8; 6],
    pub ipv4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Ipv6Addr>,
    /// The guest is an IPv6 router. Neighbours drop a router that advertises itself without saying so.
    pub ipv6_router: bool,
}

/// All that one round of an announcement sends: RARP for the switches, which works without knowing any address of
/// the guest, then what its neighbours' caches need. Some hosts believe only ARP requests, some only replies.
pub fn announcement(of: &Identity) -> Vec<Vec<u8>> {
    let mut frames = vec![rarp(of.mac).to_vec()];
    for ip in &of.ipv4 {
        frames.push(gratuitous_arp(of.mac, *ip, ARP_REQUEST).to_vec());
        frames.push(gratuitous_arp(of.mac, *ip, ARP_REPLY).to_vec());
    }
    for ip in &of.ipv6 {
        frames.push(neighbour_advertisement(of.mac, *ip, of.ipv6_router).to_vec());
    }
    frames
}

/// Appends pieces to a fixed array. All sizes are known when it is compiled, and `finish` insists on them.
struct Bytes<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Bytes<N> {
    fn new() -> Self {
        Bytes { bytes: [0; N], at: 0 }
    }

    fn put(mut self, piece: &[u8]) -> Self {
        debug_assert!(self.at + piece.len() <= N);
        for (to, from) in self.bytes.iter_mut().skip(self.at).zip(piece) {
            *to = *from;
        }
        self.at += piece.len();
        self
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn finish(self) -> [u8; N] {
        debug_assert_eq!(self.at, N);
        self.bytes
    }
}

fn arp(ethertype: u16, operation: u16, mac: [u8; 6], ip: Ipv4Addr, target: [u8; 6]) -> [u8; 42] {
    Bytes::new()
        .put(&BROADCAST)
        .put(&mac)
        .u16(ethertype)
        .u16(1) // Ethernet
        .u16(0x0800) // IPv4
        .put(&[6, 4])
        .u16(operation)
        .put(&mac)
        .put(&ip.octets())
        .put(&target)
        .put(&ip.octets())
        .finish()
}

/// "Who am I?", asked of everybody: switches learn the port, hosts ignore it.
pub fn rarp(mac: [u8; 6]) -> [u8; 42] {
    arp(ETHERTYPE_RARP, RARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED, mac)
}

fn gratuitous_arp(mac: [u8; 6], ip: Ipv4Addr, operation: u16) -> [u8; 42] {
    // RFC 5227: the target address of an announcement is zero. In a reply it is the sender again.
    let target = if operation == ARP_REPLY { mac } else { [0; 6] };
    arp(ETHERTYPE_ARP, operation, mac, ip, target)
}

/// Unsolicited, to all nodes, with the override flag: RFC 4861, 7.2.6.
pub fn neighbour_advertisement(mac: [u8; 6], ip: Ipv6Addr, router: bool) -> [u8; 86] {
    const LENGTH: u16 = 32;
    let flags: u8 = if router { 0xa0 } else { 0x20 };
    let message = |checksum: u16| -> [u8; LENGTH as usize] {
        Bytes::new()
            .put(&[136, 0])
            .u16(checksum)
            .put(&[flags, 0, 0, 0])
            .put(&ip.octets())
            .put(&[2, 1]) // option: target link-layer address, one unit of 8 bytes
            .put(&mac)
            .finish()
    };
    let sum = checksum_ipv6(ip, ALL_NODES, &message(0));
    Bytes::new()
        .put(&[0x33, 0x33, 0, 0, 0, 1])
        .put(&mac)
        .u16(ETHERTYPE_IPV6)
        .put(&[0x60, 0, 0, 0])
        .u16(LENGTH)
        .put(&[ICMPV6, 255])
        .put(&ip.octets())
        .put(&ALL_NODES.octets())
        .put(&message(sum))
        .finish()
}

fn checksum_ipv6(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut sum = Sum::default();
    sum.add(&source.octets());
    sum.add(&destination.octets());
    sum.add(&(message.len() as u32).to_be_bytes());
    sum.add(&[0, 0, 0, ICMPV6]);
    sum.add(message);
    sum.finish()
}

/// RFC 1071. Pieces but the last must have an even length.
#[derive(Default)]
pub(crate) struct Sum(u64);

impl Sum {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks(2) {
            let high = pair.first().copied().unwrap_or(0);
            let low = pair.get(1).copied().unwrap_or(0);
            self.0 += u64::from(u16::from_be_bytes([high, low]));
        }
    }

    pub(crate) fn finish(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

    fn bytes(text: &str) -> Vec<u8> {
        let digits: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        (0..digits.len() / 2)
            .map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn the_rarp_frame_has_these_bytes() {
        assert_eq!(
            rarp(MAC).to_vec(),
            bytes(
                "ffffffffffff 525400123456 8035  0001 0800 06 04 0003
                 525400123456 00000000  525400123456 00000000"
            )
        );
    }

    #[test]
    fn gratuitous_arp_request_and_reply_have_these_bytes() {
        let ip = Ipv4Addr::new(192, 0, 2, 7);
        assert_eq!(
            gratuitous_arp(MAC, ip, ARP_REQUEST).to_vec(),
            bytes(
                "ffffffffffff 525400123456 0806  0001 0800 06 04 0001
                 525400123456 c0000207  000000000000 c0000207"
            )
        );
        assert_eq!(
            gratuitous_arp(MAC, ip, ARP_REPLY).to_vec(),
            bytes(
                "ffffffffffff 525400123456 0806  0001 0800 06 04 0002
                 525400123456 c0000207  525400123456 c0000207"
            )
        );
    }

    #[test]
    fn the_neighbour_advertisement_has_these_bytes() {
        // The checksum was computed apart from this code: sum of the pseudo header and message in 16-bit words.
        let ip: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        let frame = neighbour_advertisement(MAC, ip, false);
        assert_eq!(
            frame.to_vec(),
            bytes(
                "333300000001 525400123456 86dd
                 60000000 0020 3a ff
                 fe80000000000000505400fffe123456 ff020000000000000000000000000001
                 88 00 cb68 20000000 fe80000000000000505400fffe123456 02 01 525400123456"
            )
        );
    }

    #[test]
    fn a_router_says_that_it_is_one_and_the_sum_of_any_advertisement_is_right() {
        let ip: Ipv6Addr = "2001:db8::1".parse().unwrap();
        for router in [false, true] {
            let frame = neighbour_advertisement(MAC, ip, router);
            assert_eq!(frame[58] & 0x80 != 0, router);
            // A receiver sums everything with the checksum in place and gets zero.
            let mut sum = Sum::default();
            sum.add(&frame[22..54]);
            sum.add(&[0, 0, 0, 32, 0, 0, 0, 58]);
            sum.add(&frame[54..]);
            assert_eq!(sum.finish(), 0);
        }
    }

    #[test]
    fn a_guest_without_known_addresses_is_still_announced_to_switches() {
        let unknown = Identity {
            mac: MAC,
            ..Identity::default()
        };
        assert_eq!(announcement(&unknown), vec![rarp(MAC).to_vec()]);
        let known = Identity {
            ipv4: vec![Ipv4Addr::new(192, 0, 2, 7)],
            ipv6: vec!["fe80::1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            ..unknown
        };
        assert_eq!(announcement(&known).len(), 1 + 2 + 2);
    }
}
