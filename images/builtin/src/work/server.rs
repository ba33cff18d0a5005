//! The network services: web pages over HTTP, the Goldbach calculator over UDP and TCP; ARP and echo are
//! answered by the stack itself.

use core::fmt::Write;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address, Ipv4Cidr};

use super::Next;
use crate::goldbach;
use crate::http::{self, PERIOD, Status};
use crate::memory::Memory;
use crate::virtio::net::Net;

pub static REQUESTS: AtomicU64 = AtomicU64::new(0);
pub static BODY_BYTES: AtomicU64 = AtomicU64::new(0);
pub static CALCULATIONS: AtomicU64 = AtomicU64::new(0);
pub static ANNOUNCEMENTS: AtomicU64 = AtomicU64::new(0);
pub static FRAMES_IN: AtomicU64 = AtomicU64::new(0);
pub static FRAMES_OUT: AtomicU64 = AtomicU64::new(0);

pub const WEB_PORT: u16 = 80;
pub const CALC_PORT: u16 = 7;
const CALC_CONNECTIONS: usize = 8;
const PATTERN: usize = PERIOD as usize * 64;
const IN_BYTES: usize = 8 << 10;
const OUT_BYTES: usize = 128 << 10;
const CALC_BYTES: usize = 4 << 10;
const LONGEST_REQUEST: usize = 2048;

/// What the services are told.
#[derive(Clone, Copy)]
pub struct Services {
    pub address: [u8; 4],
    pub prefix: u8,
    pub gateway: Option<[u8; 4]>,
    pub web: bool,
    pub calc: bool,
    pub connections: usize,
    pub body_bytes: u64,
}

pub struct Server {
    net: &'static mut Net,
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Services,
    web: &'static mut [MaybeUninit<Web>],
    calc: [Option<SocketHandle>; CALC_CONNECTIONS],
    calc_udp: Option<SocketHandle>,
    pattern: &'static [u8],
    announced: bool,
}

/// One connection of the web server.
struct Web {
    socket: SocketHandle,
    request: [u8; LONGEST_REQUEST],
    used: usize,
    /// Of the answer that is being sent.
    header: Text,
    header_sent: usize,
    body_at: u64,
    body_end: u64,
    close: bool,
}

/// A short text, composed in place.
struct Text {
    bytes: [u8; 256],
    used: usize,
}

impl Text {
    const EMPTY: Text = Text {
        bytes: [0; 256],
        used: 0,
    };

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = self
            .bytes
            .get_mut(self.used..self.used + text.len())
            .ok_or(core::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.used += text.len();
        Ok(())
    }
}

impl Server {
    pub fn new(net: &'static mut Net, services: Services, memory: &mut Memory, now: u64) -> Option<Server> {
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(net.mac)));
        config.random_seed = now | 1;
        let mut interface = Interface::new(config, net, instant(now));
        let address = Ipv4Address::from_octets(services.address);
        interface
            .update_ip_addrs(|list| _ = list.push(IpCidr::Ipv4(Ipv4Cidr::new(address, services.prefix))));
        if let Some(gateway) = services.gateway {
            let _ = interface
                .routes_mut()
                .add_default_ipv4_route(Ipv4Address::from_octets(gateway));
        }
        let connections = if services.web { services.connections } else { 0 };
        // SAFETY: taken while no shift is on; bytes, or MaybeUninit.
        let (storage, web, pattern) = unsafe {
            (
                memory
                    .take_zeroed::<MaybeUninit<SocketStorage<'static>>>(connections + CALC_CONNECTIONS + 1)?,
                memory.take_zeroed::<MaybeUninit<Web>>(connections)?,
                memory.take_zeroed::<u8>(PATTERN)?,
            )
        };
        for (i, byte) in pattern.iter_mut().enumerate() {
            *byte = (i % PERIOD as usize) as u8;
        }
        for place in storage.iter_mut() {
            place.write(SocketStorage::EMPTY);
        }
        // SAFETY: every element has just been written.
        let storage = unsafe {
            &mut *(storage as *mut [MaybeUninit<SocketStorage<'static>>] as *mut [SocketStorage<'static>])
        };
        let mut sockets = SocketSet::new(storage);
        for place in web.iter_mut() {
            let socket = sockets.add(tcp_socket(memory, IN_BYTES, OUT_BYTES)?);
            place.write(Web {
                socket,
                request: [0; LONGEST_REQUEST],
                used: 0,
                header: Text::EMPTY,
                header_sent: 0,
                body_at: 0,
                body_end: 0,
                close: false,
            });
        }
        let (mut calc, mut calc_udp) = ([None; CALC_CONNECTIONS], None);
        if services.calc {
            for place in &mut calc {
                *place = Some(sockets.add(tcp_socket(memory, CALC_BYTES, CALC_BYTES)?));
            }
            let mut socket = udp_socket(memory)?;
            let _ = socket.bind(CALC_PORT);
            calc_udp = Some(sockets.add(socket));
        }
        Some(Server {
            net,
            interface,
            sockets,
            services,
            web,
            calc,
            calc_udp,
            pattern,
            announced: false,
        })
    }

    pub fn step(&mut self, now: u64) -> Next {
        self.net.ignore();
        if !self.announced || self.net.asks_for_announcement() {
            self.net.announce(self.services.address, self.announced);
            self.announced = true;
            ANNOUNCEMENTS.fetch_add(1, Relaxed);
        }
        let at = instant(now);
        self.interface.poll(at, self.net, &mut self.sockets);
        let mut busy = false;
        for i in 0..self.web.len() {
            busy |= self.serve_web(i);
        }
        for handle in self.calc.into_iter().flatten() {
            busy |= self.serve_calc(handle);
        }
        if let Some(handle) = self.calc_udp {
            busy |= self.serve_datagrams(handle);
        }
        if busy {
            self.interface.poll(at, self.net, &mut self.sockets);
        }
        self.net.kick();
        let (received, sent) = self.net.frames();
        FRAMES_IN.store(received, Relaxed);
        FRAMES_OUT.store(sent, Relaxed);
        if self.net.is_full() {
            return Next::At(now + 100_000);
        }
        match self.interface.poll_delay(at, &self.sockets) {
            _ if busy || self.net.listen() => Next::Now,
            Some(delay) => Next::At(now + (delay.total_micros() * 1000).max(1000)),
            None => Next::At(u64::MAX),
        }
    }

    /// Takes requests and sends answers; true if it moved anything.
    fn serve_web(&mut self, i: usize) -> bool {
        // SAFETY: `new` wrote every connection.
        let web = unsafe { self.web[i].assume_init_mut() };
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(web.socket);
        if !socket.is_open() {
            (
                web.used,
                web.header.used,
                web.header_sent,
                web.body_at,
                web.body_end,
                web.close,
            ) = (0, 0, 0, 0, 0, false);
            return socket.listen(WEB_PORT).is_ok();
        }
        let mut moved = false;
        let sending = web.header_sent < web.header.used || web.body_at < web.body_end;
        if !sending && web.close {
            socket.close();
            web.close = false;
        }
        if !sending && socket.can_recv() {
            let room = &mut web.request[web.used..];
            web.used += socket.recv_slice(room).unwrap_or(0);
            moved = true;
        }
        if !sending && web.used > 0 {
            web.take_request(self.services.body_bytes);
        } else if socket.state() == tcp::State::CloseWait && !sending {
            socket.close();
        }
        if socket.can_send() {
            if web.header_sent < web.header.used {
                let sent = socket
                    .send_slice(&web.header.bytes()[web.header_sent..])
                    .unwrap_or(0);
                web.header_sent += sent;
                moved |= sent > 0;
            }
            while web.header_sent == web.header.used && web.body_at < web.body_end {
                let from = (web.body_at % PERIOD) as usize;
                let length = (PATTERN - from).min((web.body_end - web.body_at) as usize);
                let sent = socket.send_slice(&self.pattern[from..from + length]).unwrap_or(0);
                if sent == 0 {
                    break;
                }
                web.body_at += sent as u64;
                BODY_BYTES.fetch_add(sent as u64, Relaxed);
                moved = true;
            }
        }
        moved
    }

    fn serve_calc(&mut self, handle: SocketHandle) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if !socket.is_open() {
            return socket.listen(CALC_PORT).is_ok();
        }
        if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
            socket.close();
            return true;
        }
        let mut moved = false;
        while socket.can_send() && socket.send_capacity() - socket.send_queue() > 256 {
            let mut answer = Text::EMPTY;
            let taken = socket.recv(|bytes| match bytes.iter().position(|&b| b == b'\n') {
                Some(end) => {
                    goldbach::answer(core::str::from_utf8(&bytes[..end]).unwrap_or("?"), &mut answer);
                    (end + 1, true)
                }
                None if bytes.len() >= 256 => (bytes.len(), true),
                None => (0, false),
            });
            if taken != Ok(true) {
                break;
            }
            moved = true;
            CALCULATIONS.fetch_add(1, Relaxed);
            let _ = socket.send_slice(answer.bytes());
        }
        moved
    }

    fn serve_datagrams(&mut self, handle: SocketHandle) -> bool {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
        let mut moved = false;
        while socket.can_send() {
            let mut answer = Text::EMPTY;
            let Ok((bytes, from)) = socket.recv() else { break };
            goldbach::answer(core::str::from_utf8(bytes).unwrap_or("?").trim_end(), &mut answer);
            let _ = socket.send_slice(answer.bytes(), from.endpoint);
            CALCULATIONS.fetch_add(1, Relaxed);
            moved = true;
        }
        moved
    }
}

impl Web {
    /// Starts the answer to the first whole request.
    fn take_request(&mut self, usual: u64) {
        let full = self.used == LONGEST_REQUEST;
        let request = match http::parse(&self.request[..self.used]) {
            Some(request) => request,
            None if full => http::Request {
                length: LONGEST_REQUEST,
                status: Status::BadRequest,
                size: None,
                head_only: false,
                close: true,
            },
            None => return,
        };
        self.request.copy_within(request.length..self.used, 0);
        self.used -= request.length;
        let size = if request.status == Status::Ok {
            request.size.unwrap_or(usual)
        } else {
            0
        };
        self.header = Text::EMPTY;
        let connection = if request.close { "close" } else { "keep-alive" };
        let _ = write!(
            self.header,
            "HTTP/1.1 {}\r\nServer: ferry-guest\r\nContent-Type: application/octet-stream\r\nContent-Length: {size}\r\nConnection: {connection}\r\n\r\n",
            request.status.line()
        );
        self.header_sent = 0;
        (self.body_at, self.body_end) = (0, if request.head_only { 0 } else { size });
        self.close = request.close;
        REQUESTS.fetch_add(1, Relaxed);
    }
}

fn tcp_socket(memory: &mut Memory, input: usize, output: usize) -> Option<tcp::Socket<'static>> {
    // SAFETY: taken while no shift is on; plain bytes.
    let (input, output) = unsafe {
        (
            memory.take_zeroed::<u8>(input)?,
            memory.take_zeroed::<u8>(output)?,
        )
    };
    let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(input), tcp::SocketBuffer::new(output));
    socket.set_nagle_enabled(false);
    socket.set_congestion_control(tcp::CongestionControl::Reno);
    socket.set_timeout(Some(Duration::from_secs(90)));
    socket.set_keep_alive(Some(Duration::from_secs(20)));
    Some(socket)
}

fn udp_socket(memory: &mut Memory) -> Option<udp::Socket<'static>> {
    const DATAGRAMS: usize = 128;
    let mut buffer = || {
        // SAFETY: as above; metadata is written before use.
        let (meta, bytes) = unsafe {
            (
                memory.take_zeroed::<MaybeUninit<udp::PacketMetadata>>(DATAGRAMS)?,
                memory.take_zeroed::<u8>(32 << 10)?,
            )
        };
        for place in meta.iter_mut() {
            place.write(udp::PacketMetadata::EMPTY);
        }
        // SAFETY: every element has just been written.
        let meta =
            unsafe { &mut *(meta as *mut [MaybeUninit<udp::PacketMetadata>] as *mut [udp::PacketMetadata]) };
        Some(udp::PacketBuffer::new(meta, bytes))
    };
    Some(udp::Socket::new(buffer()?, buffer()?))
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros((ns / 1000) as i64)
}
