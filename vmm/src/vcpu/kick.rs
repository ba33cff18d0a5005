//! The signal that gets a thread out of KVM_RUN.
#![allow(unsafe_code)] // tgkill has no safe wrapper

use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Installs the signal's handler, which does nothing: the interruption is the message.
pub(super) fn prepare() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        if let Err(errno) = register_signal_handler(SIGRTMIN(), nothing) {
            tracing::error!("the signal that stops vCPUs cannot be set up: {errno}");
        }
    });
}

/// The kernel's number of a vCPU's thread: 0 before it begins and after it ends.
#[derive(Default)]
pub(super) struct ThreadId(AtomicI32);

impl ThreadId {
    /// By the thread itself.
    pub(super) fn begin(&self) {
        self.0
            .store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    }

    pub(super) fn end(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    pub(super) fn signal(&self) {
        let thread = self.0.load(Ordering::SeqCst);
        if thread == 0 {
            return;
        }
        let process = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: no pointers are passed. Should the thread have ended meanwhile and its number been given away, then to
        // a thread of this very process (tgkill checks that), whose handler for this signal does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGRTMIN()) };
    }
}
