//! The sockets of a probe: one for datagrams and pings, one for each attempt over TCP.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::target::ProbeTarget;
use crate::frames::Sum;

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
/// Enough of an answer to see "HTTP/1.1 200".
const STATUS_BYTES: usize = 12;

pub(super) type Verdict = (u64, io::Result<()>);

pub(super) struct Asker {
    how: How,
    /// Told apart from the answers to other probes and pings.
    token: u64,
    verdicts: Vec<Verdict>,
}

enum How {
    Datagram {
        socket: Socket,
        ping: Option<Ping>,
    },
    Connections {
        to: SocketAddr,
        request: Option<Vec<u8>>,
        open: BTreeMap<u64, Connection>,
    },
}

#[derive(Clone, Copy, PartialEq)]
enum Ping {
    /// The socket gives IPv4 headers too.
    RawV4,
    DatagramV4,
    V6,
}

struct Connection {
    socket: Socket,
    connected: bool,
    answer: Vec<u8>,
}

/// The random part of a random address will do.
fn token() -> io::Result<u64> {
    let mut token = 0u64;
    for _ in 0..3 {
        let [.., a, b, c] = crate::random_mac()?;
        token = token << 24 | u64::from(u32::from_be_bytes([0, a, b, c]));
    }
    Ok(token)
}

impl Asker {
    pub(super) fn open(target: &ProbeTarget) -> io::Result<Asker> {
        let connections = |to, request| How::Connections {
            to,
            request,
            open: BTreeMap::new(),
        };
        let how = match target {
            ProbeTarget::Tcp(address) => connections(*address, None),
            ProbeTarget::Http(url) => {
                let request = format!(
                    "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: ferry\r\nConnection: close\r\n\r\n",
                    url.path, url.host
                );
                connections(url.address, Some(request.into_bytes()))
            }
            ProbeTarget::Udp(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::DGRAM, Some(Protocol::UDP))?;
                socket.connect(&(*address).into())?;
                How::Datagram { socket, ping: None }
            }
            ProbeTarget::Icmp(ip) => {
                let (socket, ping) = ping_socket(*ip)?;
                socket.connect(&SocketAddr::new(*ip, 0).into())?;
                How::Datagram {
                    socket,
                    ping: Some(ping),
                }
            }
        };
        if let How::Datagram { socket, .. } = &how {
            socket.set_nonblocking(true)?;
        }
        Ok(Asker {
            how,
            token: token()?,
            verdicts: Vec::new(),
        })
    }

    pub(super) fn ask(&mut self, number: u64) -> io::Result<()> {
        match &mut self.how {
            How::Datagram { socket, ping } => {
                let packet = question(self.token, number, *ping);
                socket.send(&packet).map(drop)
            }
            How::Connections { to, open, .. } => {
                let socket = Socket::new(Domain::for_address(*to), Type::STREAM, Some(Protocol::TCP))?;
                socket.set_nonblocking(true)?;
                // Closed with a reset: thousands of attempts leave nothing in TIME_WAIT.
                socket.set_linger(Some(Duration::ZERO))?;
                match socket.connect(&(*to).into()) {
                    Ok(()) => {}
                    Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
                    Err(e) => return Err(e),
                }
                let connection = Connection {
                    socket,
                    connected: false,
                    answer: Vec::new(),
                };
                open.insert(number, connection);
                Ok(())
            }
        }
    }

    /// Nothing more is wanted of this attempt.
    pub(super) fn forget(&mut self, number: u64) {
        if let How::Connections { open, .. } = &mut self.how {
            open.remove(&number);
        }
    }

    pub(super) fn verdicts(&mut self) -> Vec<Verdict> {
        std::mem::take(&mut self.verdicts)
    }

    /// Returns when something came in, or after `limit`.
    pub(super) fn wait(&mut self, limit: Duration) {
        let timeout = Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        match &mut self.how {
            How::Datagram { socket, ping } => {
                let ready = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout));
                if matches!(ready, Ok(n) if n > 0) {
                    receive(socket, *ping, self.token, &mut self.verdicts);
                }
            }
            How::Connections { request, open, .. } => {
                let mut waiting: Vec<_> = open
                    .values()
                    .map(|c| {
                        PollFd::new(
                            &c.socket,
                            if c.connected {
                                PollFlags::IN
                            } else {
                                PollFlags::OUT
                            },
                        )
                    })
                    .collect();
                if !matches!(poll(&mut waiting, Some(&timeout)), Ok(n) if n > 0) {
                    return;
                }
                let ready: Vec<bool> = waiting.iter().map(|p| !p.revents().is_empty()).collect();
                let mut done = Vec::new();
                for ((number, connection), ready) in open.iter_mut().zip(ready) {
                    if !ready {
                        continue;
                    }
                    if let Some(result) = connection.advance(request.as_deref()) {
                        self.verdicts.push((*number, result));
                        done.push(*number);
                    }
                }
                for number in done {
                    open.remove(&number);
                }
            }
        }
    }
}

impl Connection {
    /// One step after poll(2) found it ready. Some: it is over.
    fn advance(&mut self, request: Option<&[u8]>) -> Option<io::Result<()>> {
        if !self.connected {
            match self.socket.take_error() {
                Ok(None) => self.connected = true,
                Ok(Some(error)) | Err(error) => return Some(Err(error)),
            }
            let Some(request) = request else {
                return Some(Ok(()));
            };
            return match self.socket.send(request) {
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            };
        }
        let mut bytes = [MaybeUninit::uninit(); 512];
        match self.socket.recv(&mut bytes) {
            Ok(0) => Some(Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "the connection was closed without an answer",
            ))),
            Ok(n) => {
                self.answer.extend(initialised(&bytes, n));
                (self.answer.len() >= STATUS_BYTES).then(|| http_verdict(&self.answer))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => Some(Err(error)),
        }
    }
}

fn http_verdict(answer: &[u8]) -> io::Result<()> {
    let good = answer.starts_with(b"HTTP/1.") && matches!(answer.get(9), Some(b'2' | b'3'));
    if good {
        return Ok(());
    }
    let line = answer.split(|b| *b == b'\r').next().unwrap_or_default();
    Err(io::Error::other(format!(
        "the server answered {:?}",
        String::from_utf8_lossy(line.get(..60).unwrap_or(line))
    )))
}

/// The first `n` bytes, which recv(2) wrote.
#[allow(unsafe_code)] // socket2 gives what it received as MaybeUninit.
fn initialised(bytes: &[MaybeUninit<u8>], n: usize) -> Vec<u8> {
    // SAFETY: socket2 promises that recv initialised the first n bytes.
    bytes.iter().take(n).map(|b| unsafe { b.assume_init() }).collect()
}

/// Raw sockets need CAP_NET_RAW; ping sockets need net.ipv4.ping_group_range.
fn ping_socket(ip: IpAddr) -> io::Result<(Socket, Ping)> {
    let open = |domain, kind, protocol| Socket::new(domain, kind, Some(protocol));
    let result = match ip {
        IpAddr::V4(_) => open(Domain::IPV4, Type::RAW, Protocol::ICMPV4)
            .map(|socket| (socket, Ping::RawV4))
            .or_else(|_| {
                open(Domain::IPV4, Type::DGRAM, Protocol::ICMPV4).map(|socket| (socket, Ping::DatagramV4))
            }),
        IpAddr::V6(_) => open(Domain::IPV6, Type::RAW, Protocol::ICMPV6)
            .or_else(|_| open(Domain::IPV6, Type::DGRAM, Protocol::ICMPV6))
            .map(|socket| (socket, Ping::V6)),
    };
    result.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!(
                "a ping needs CAP_NET_RAW or this user's group in net.ipv4.ping_group_range ({error}); \
                 use a tcp: or http: probe instead"
            ),
        )
    })
}

/// Token and number; for a ping with the echo header before it. The kernel fills in the checksum of ICMPv6 and of
/// ping sockets itself.
fn question(token: u64, number: u64, ping: Option<Ping>) -> Vec<u8> {
    let mut packet = Vec::with_capacity(24);
    if let Some(ping) = ping {
        let kind = if ping == Ping::V6 {
            ECHO_REQUEST_V6
        } else {
            ECHO_REQUEST_V4
        };
        packet.extend_from_slice(&[kind, 0, 0, 0]);
        packet.extend_from_slice(&(token as u16).to_be_bytes());
        packet.extend_from_slice(&(number as u16).to_be_bytes());
    }
    packet.extend_from_slice(&token.to_be_bytes());
    packet.extend_from_slice(&number.to_be_bytes());
    if ping == Some(Ping::RawV4) {
        let mut sum = Sum::default();
        sum.add(&packet);
        if let Some(field) = packet.get_mut(2..4) {
            field.copy_from_slice(&sum.finish().to_be_bytes());
        }
    }
    packet
}

/// The number in an answer to one of our questions.
fn answer_number(packet: &[u8], token: u64, ping: Option<Ping>) -> Option<u64> {
    let body = match ping {
        None => packet,
        Some(Ping::RawV4) => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            packet.get(header..)?.strip_prefix(&[ECHO_REPLY_V4])?.get(7..)?
        }
        Some(Ping::DatagramV4) => packet.strip_prefix(&[ECHO_REPLY_V4])?.get(7..)?,
        Some(Ping::V6) => packet.strip_prefix(&[ECHO_REPLY_V6])?.get(7..)?,
    };
    let number = body.strip_prefix(&token.to_be_bytes())?.get(..8)?;
    Some(u64::from_be_bytes(number.try_into().ok()?))
}

fn receive(socket: &Socket, ping: Option<Ping>, token: u64, verdicts: &mut Vec<Verdict>) {
    let mut bytes = [MaybeUninit::uninit(); 2048];
    loop {
        match socket.recv(&mut bytes) {
            Ok(n) => {
                if let Some(number) = answer_number(&initialised(&bytes, n), token, ping) {
                    verdicts.push((number, Ok(())));
                }
            }
            // "Refused" and "unreachable" belong to some earlier question, which will be counted as lost.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_matched_to_its_question_and_nothing_else_is() {
        for ping in [None, Some(Ping::DatagramV4), Some(Ping::V6), Some(Ping::RawV4)] {
            let mut packet = question(0x1122_3344_5566_7788, 77, ping);
            match ping {
                Some(Ping::V6) => packet[0] = ECHO_REPLY_V6,
                Some(_) => packet[0] = ECHO_REPLY_V4,
                None => {}
            }
            if ping == Some(Ping::RawV4) {
                let mut with_header = vec![0x45; 20];
                with_header.append(&mut packet);
                packet = with_header;
            }
            assert_eq!(answer_number(&packet, 0x1122_3344_5566_7788, ping), Some(77));
            assert_eq!(answer_number(&packet, 1, ping), None, "another probe's");
            for length in 0..packet.len() {
                assert_eq!(
                    answer_number(&packet[..length], 0x1122_3344_5566_7788, ping),
                    None
                );
            }
        }
    }

    #[test]
    fn only_success_counts_as_an_http_answer() {
        assert!(http_verdict(b"HTTP/1.1 200 OK\r\n").is_ok());
        assert!(http_verdict(b"HTTP/1.0 302 Fo\r\n").is_ok());
        let error = http_verdict(b"HTTP/1.1 503 Service Unavailable\r\nx").unwrap_err();
        assert!(error.to_string().contains("503 Service"));
        assert!(http_verdict(b"SSH-2.0-OpenSSH").is_err());
    }
}
