//! A network namespace without a name: a network of its own on this host, gone when nobody uses it any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::interface::Control;

#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes a namespace whose only interface is the loopback, and takes that up. Needs CAP_SYS_ADMIN.
    pub fn create() -> io::Result<Namespace> {
        let made = std::thread::scope(|scope| scope.spawn(unshare).join());
        let file = made.map_err(|_| io::Error::other("the thread that makes a network namespace died"))??;
        Ok(Namespace { file })
    }

    /// Runs `work` in a thread inside the namespace. Sockets and TAPs that it opens stay there wherever they are
    /// used later, and threads and processes that it starts begin there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let ran = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Ok(work())
                })
                .join()
        });
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A path for tools that take one, such as `nsenter --net=PATH` and `ip link set veth0 netns PATH`. Good while
    /// this process holds the namespace.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }
}

#[allow(unsafe_code)] // unshare(2) is unsafe for flags that split the file table or memory.
fn unshare() -> io::Result<File> {
    // SAFETY: NEWNET changes only which network this short-lived thread sees; no descriptor or memory is touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    let file = File::open("/proc/thread-self/ns/net")?;
    Control::new()?.set_up("lo", true)?;
    Ok(file)
}
