//! A virtio network device, as the TCP/IP stack wants it.

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::queue::{Piece, Queue};
use super::{Device, EVENT_INDEX};
use crate::cpu;
use crate::memory::Memory;

const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const CONTROL: u64 = 1 << 17;
const ANNOUNCE: u64 = 1 << 21;
const HEADER: usize = 12;
const FRAME: usize = 1514;
const BUFFERS: usize = 256;

/// One frame; to be sent, behind its virtio header.
type Buffer = [u8; 2048];

pub struct Net {
    device: Device,
    incoming: Incoming,
    outgoing: Outgoing,
    control: Option<Queue>,
    /// The command buffer of the control queue.
    command: &'static mut [u8],
    config_vector: u8,
    config_seen: u64,
    pub mac: [u8; 6],
}

struct Incoming {
    queue: Queue,
    /// In pages of their own: nothing but the frame is written where a frame is.
    headers: &'static mut [[u8; HEADER]],
    buffers: &'static mut [Buffer],
    /// Which buffer a descriptor belongs to.
    owner: [u8; BUFFERS],
    /// The buffer that is being looked at; it goes back to the device before the next.
    lent: Option<u8>,
    frames: u64,
}

pub struct Outgoing {
    queue: Queue,
    buffers: &'static mut [Buffer],
    owner: [u8; BUFFERS],
    free: [u8; BUFFERS],
    free_count: usize,
    frames: u64,
}

impl Incoming {
    fn offer(&mut self, buffer: u8) {
        let header = Piece {
            address: &raw const self.headers[buffer as usize] as u64,
            length: HEADER as u32,
            device_writes: true,
        };
        let frame = Piece {
            address: &raw const self.buffers[buffer as usize] as u64,
            length: size_of::<Buffer>() as u32,
            device_writes: true,
        };
        if let Some(head) = self.queue.add(&[header, frame]) {
            self.owner[head as usize] = buffer;
        }
    }

    fn take_back(&mut self) {
        if let Some(buffer) = self.lent.take() {
            self.offer(buffer);
        }
    }

    fn next(&mut self) -> Option<&[u8]> {
        self.take_back();
        let (head, length) = self.queue.pop()?;
        let buffer = self.owner[head as usize];
        self.lent = Some(buffer);
        self.frames += 1;
        Some(&self.buffers[buffer as usize][..(length as usize).clamp(HEADER, HEADER + FRAME) - HEADER])
    }
}

impl Outgoing {
    fn reclaim(&mut self) {
        while let Some((head, _)) = self.queue.pop() {
            self.free[self.free_count] = self.owner[head as usize];
            self.free_count += 1;
        }
        self.queue.ignore();
    }

    /// Queues a frame. There must be a free buffer.
    fn send_with<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let length = length.min(FRAME);
        self.free_count -= 1;
        let index = self.free[self.free_count];
        let buffer = &mut self.buffers[index as usize];
        buffer[..HEADER].fill(0);
        let result = fill(&mut buffer[HEADER..HEADER + length]);
        let address = &raw const *buffer as u64;
        match self.queue.add(&[Piece {
            address,
            length: (HEADER + length) as u32,
            device_writes: false,
        }]) {
            Some(head) => {
                self.owner[head as usize] = index;
                self.frames += 1;
            }
            None => self.free_count += 1,
        }
        result
    }
}

impl Net {
    /// Sets the device up; its interrupts go to the vCPU with this local APIC id.
    pub fn begin(nth: usize, memory: &mut Memory, apic_id: u32) -> Option<Net> {
        let function = super::find(1, nth)?;
        let mut device = Device::begin(function, MAC | STATUS | CONTROL | ANNOUNCE | EVENT_INDEX)?;
        let receive = device.queue(0, BUFFERS as u16, memory, apic_id)?;
        let send = device.queue(1, BUFFERS as u16, memory, apic_id)?;
        let control = if device.features & CONTROL != 0 {
            device.queue(2, 16, memory, apic_id)
        } else {
            None
        };
        let config_vector = device.watch_config(apic_id);
        let mut mac = [0x02, 0x46, 0x65, 0x72, 0x72, 0x79];
        if device.features & MAC != 0 {
            for (i, byte) in mac.iter_mut().enumerate() {
                *byte = device.config.get(i as u64);
            }
        }
        // SAFETY: made before any shift, kept for good; plain bytes.
        let (headers, receive_buffers, send_buffers, command) = unsafe {
            (
                memory.take_zeroed(BUFFERS / 2)?,
                memory.take_zeroed(BUFFERS / 2)?,
                memory.take_zeroed(BUFFERS)?,
                memory.take_zeroed(64)?,
            )
        };
        device.ready();
        let owner = [0; BUFFERS];
        let mut incoming = Incoming {
            queue: receive,
            headers,
            buffers: receive_buffers,
            owner,
            lent: None,
            frames: 0,
        };
        for buffer in 0..incoming.queue.size().min(BUFFERS as u16) / 2 {
            incoming.offer(buffer as u8);
        }
        incoming.queue.kick();
        let free = core::array::from_fn(|i| i as u8);
        let free_count = (send.size() as usize).min(BUFFERS);
        let mut outgoing = Outgoing {
            queue: send,
            buffers: send_buffers,
            owner,
            free,
            free_count,
            frames: 0,
        };
        outgoing.queue.ignore();
        Some(Net {
            device,
            incoming,
            outgoing,
            control,
            command,
            config_vector,
            config_seen: 0,
            mac,
        })
    }

    /// Tells the device of all frames and buffers queued since the last call.
    pub fn kick(&mut self) {
        self.incoming.take_back();
        self.outgoing.queue.kick();
        self.incoming.queue.kick();
    }

    /// No interrupts until `listen`.
    pub fn ignore(&mut self) {
        self.incoming.queue.ignore();
    }

    /// Asks for an interrupt at the next frame; true if one is there already.
    pub fn listen(&mut self) -> bool {
        self.incoming.queue.listen()
    }

    /// Frames received and sent.
    pub fn frames(&self) -> (u64, u64) {
        (self.incoming.frames, self.outgoing.frames)
    }

    pub fn is_full(&mut self) -> bool {
        self.outgoing.reclaim();
        self.outgoing.free_count == 0
    }

    /// Whether the device asks us to make our place known (after a move, for instance).
    pub fn asks_for_announcement(&mut self) -> bool {
        let count = cpu::vector_count(self.config_vector);
        if self.device.features & ANNOUNCE == 0 || count == self.config_seen {
            return false;
        }
        self.config_seen = count;
        self.device.config.get::<u16>(6) & 2 != 0
    }

    /// Broadcasts a gratuitous ARP request, and tells the device if it asked for that.
    pub fn announce(&mut self, address: [u8; 4], asked: bool) {
        if !self.is_full() {
            let mac = self.mac;
            self.outgoing.send_with(60, |frame| {
                frame.fill(0);
                frame[..6].fill(0xff);
                frame[6..12].copy_from_slice(&mac);
                frame[12..22].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
                frame[22..28].copy_from_slice(&mac);
                frame[28..32].copy_from_slice(&address);
                frame[38..42].copy_from_slice(&address);
            });
            self.outgoing.queue.kick();
        }
        if let (true, Some(control)) = (asked, &mut self.control) {
            while control.pop().is_some() {}
            self.command[..2].copy_from_slice(&[3, 0]); // announcement: done
            let at = self.command.as_ptr() as u64;
            let order = Piece {
                address: at,
                length: 2,
                device_writes: false,
            };
            let status = Piece {
                address: at + 8,
                length: 1,
                device_writes: true,
            };
            if control.add(&[order, status]).is_some() {
                control.kick();
            }
        }
    }
}

pub struct Received<'a> {
    bytes: &'a [u8],
}

pub struct ToSend<'a> {
    outgoing: &'a mut Outgoing,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, look: F) -> R {
        look(self.bytes)
    }
}

impl phy::TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        self.outgoing.send_with(length, fill)
    }
}

impl phy::Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = ToSend<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, ToSend<'_>)> {
        if self.is_full() {
            return None;
        }
        let bytes = self.incoming.next()?;
        Some((
            Received { bytes },
            ToSend {
                outgoing: &mut self.outgoing,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToSend<'_>> {
        (!self.is_full()).then_some(ToSend {
            outgoing: &mut self.outgoing,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities.max_burst_size = Some(BUFFERS);
        capabilities
    }
}
