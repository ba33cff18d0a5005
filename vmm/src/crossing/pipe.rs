//! The outgoing side's end of one pipe to a receiver, as ssh makes it.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ferry_migration::handover::SessionId;
use ferry_migration::link::{Lane, Link, LinkError, Peer};
use ferry_migration::transport::PipeLink;

use crate::error::{MachineError, Result};

/// Hangs up when it is dropped: the thread that reads the pipe would keep it open otherwise, and the receiver waiting.
pub(super) struct Pipe {
    link: PipeLink,
    near: UnixStream,
}

impl Pipe {
    pub(super) fn open(session: SessionId, path: &str, stall: Duration) -> Result<Pipe> {
        let failed = |error: std::io::Error| {
            MachineError::Host(format!("the pipe at {path} could not be opened: {error}"))
        };
        let near = UnixStream::connect(path).map_err(failed)?;
        let reader = near.try_clone().map_err(failed)?;
        let writer = near.try_clone().map_err(failed)?;
        let link = PipeLink::new(session, reader, writer, stall)
            .map_err(|error| MachineError::Host(error.to_string()))?;
        Ok(Pipe { link, near })
    }
}

impl Link for Pipe {
    fn control(&mut self) -> std::result::Result<Box<dyn Peer>, LinkError> {
        self.link.control()
    }

    fn lane(
        &mut self,
        session: SessionId,
        attempt: u32,
        index: u16,
    ) -> std::result::Result<Box<dyn Lane>, LinkError> {
        self.link.lane(session, attempt, index)
    }

    fn most_lanes(&self) -> u16 {
        self.link.most_lanes()
    }

    fn reconnects(&self) -> bool {
        self.link.reconnects()
    }

    fn parallel(&self) -> bool {
        self.link.parallel()
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // It may have ended from the other side already.
        let _ = self.near.shutdown(Shutdown::Both);
    }
}
