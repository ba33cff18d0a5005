//! What a page or cluster becomes on the wire, and how it becomes a page or cluster again.
//!
//! The encoder tries the cheapest first: zero, the same eight bytes over and over, unchanged since it was last
//! sent (then nothing travels), a difference to the version sent last, LZ4, and at the end the bytes as they
//! are. What costs time is only done while measurement says that it saves more time on the link.

pub mod cache;
pub mod costs;
pub mod decode;
pub mod delta;
pub mod encode;
pub mod sent;

/// Fills `room` with the same eight bytes, over and over.
fn repeat(word: [u8; 8], room: &mut [u8]) {
    room.as_chunks_mut::<8>().0.fill(word);
}
