//! Bytes that come over the link: messages, heads, and frames with a good checksum.

use std::sync::Arc;

use ferry_devices::ram::Ram;
use ferry_migration::block::{BlockId, Sink};
use ferry_migration::pages::decode::{Placement, Scratch};
use ferry_migration::wire::{
    ENVELOPE_BYTES, Entry, FrameHeader, Greeting, MAX_ENTRIES, Message, envelope, frame_bytes, open_envelope,
};
use ferry_vmm::crossing::{MemorySink, Region};
use vm_memory::GuestAddress;

use crate::input::Input;

/// Whatever is read means the same when it is written and read again.
pub(crate) fn messages(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        assert_eq!(Message::decode(&message.encode()).as_ref(), Ok(&message));
    }
    if let Some(head) = bytes.first_chunk::<{ Greeting::BYTES }>()
        && let Ok(greeting) = Greeting::decode(head)
    {
        let again = greeting.encode();
        assert_eq!(Greeting::decode(again.first_chunk().unwrap()), Ok(greeting));
    }
    if let Some(head) = bytes.first_chunk::<{ FrameHeader::BYTES }>()
        && let Ok(header) = FrameHeader::decode(head)
    {
        assert_eq!(FrameHeader::decode(&header.encode()).as_ref(), Ok(&header));
    }
    if let Some(entry) = bytes.first_chunk::<{ Entry::BYTES }>() {
        let _ = Entry::decode(entry);
    }
    if let Some(head) = bytes.first_chunk::<ENVELOPE_BYTES>() {
        let _ = open_envelope(*head);
    }
    let _ = frame_bytes(bytes);
    assert_eq!(open_envelope(envelope(bytes)).ok().map(|(len, _)| len), {
        (bytes.len() <= ferry_migration::wire::MAX_MESSAGE_BYTES).then_some(bytes.len())
    });
}

/// Guest memory of so many pages, as the engine places into it.
pub(crate) fn memory(id: u16, pages: u64) -> Arc<dyn Sink> {
    let ram = Ram::from_ranges(&[(GuestAddress(0), pages as usize * 4096)]).unwrap();
    Arc::new(MemorySink::new(BlockId(id), Region::all(&ram).remove(0)))
}

/// A frame of a peer that knows the checksums: entries, then payload.
pub(crate) fn frame(input: &mut Input, sequence: u64) -> Option<Vec<u8>> {
    let (block, entries, round) = (input.u8()?, input.u8()?, input.u8()?);
    let len = usize::from(input.u16()?) % 9000;
    let body = input.bytes(usize::from(entries) * Entry::BYTES + len);
    let table = (usize::from(entries) * Entry::BYTES).min(body.len());
    let header = FrameHeader {
        block: BlockId(u16::from(block) % 3),
        entries: (table / Entry::BYTES).min(MAX_ENTRIES) as u16,
        sequence,
        round: u32::from(round) % 4,
        payload_bytes: (body.len() - table / Entry::BYTES * Entry::BYTES) as u32,
        checksum: crc32c::crc32c(body),
    };
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(body);
    Some(frame)
}

pub(crate) fn frames(bytes: &[u8]) {
    let placement = Placement::new(&[memory(0, 64), memory(1, 7)]);
    let (mut scratch, mut input) = (Scratch::new(), Input::new(bytes));
    let mut sequence = 0;
    while let Some(frame) = frame(&mut input, sequence) {
        sequence += 1;
        let (head, mut rest) = frame.split_first_chunk().unwrap();
        let Ok(header) = FrameHeader::decode(head) else {
            continue;
        };
        let _ = placement.place(&header, &mut rest, &mut scratch);
    }
}
