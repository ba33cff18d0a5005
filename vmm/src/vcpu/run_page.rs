//! The page that KVM shares with us per vCPU (`struct kvm_run`): the parts that kvm-ioctls does not hand out.
#![allow(unsafe_code)] // reads and writes one shared page through a pointer

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::kvm::vm::Vm;

/// A vCPU's run page. Belongs next to the `VcpuFd` whose page it is, in one struct: `Owned` makes sure of that.
pub(super) struct RunPage(NonNull<kvm_run>);

// SAFETY: the page is shared memory; other threads than the one that runs the vCPU touch only `immediate_exit`, and that
// as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// `vcpu` must outlive the page; the caller keeps both in one struct, and never replaces the vCPU.
    pub(super) fn of(vcpu: &mut VcpuFd) -> RunPage {
        RunPage(NonNull::from(vcpu.get_kvm_run()))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lives in the mapping of the VcpuFd, which outlives self (see `of`). The kernel only reads it,
        // and all of our accesses while the vCPU runs are atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }

    /// Makes the next KVM_RUN complete what is pending and return with EINTR. From any thread.
    pub(super) fn ask_exit(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    pub(super) fn clear_exit(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Width of one element of the port access that KVM_RUN just returned with. Only by the vCPU's own thread.
    pub(super) fn port_width(&self) -> usize {
        // SAFETY: the vCPU is not running, so nobody writes; every bit pattern is a valid `io` struct.
        usize::from(unsafe { (*self.0.as_ptr()).__bindgen_anon_1.io.size }).max(1)
    }

    /// Suberror and data of KVM_EXIT_INTERNAL_ERROR. Only by the vCPU's own thread.
    pub(super) fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: the vCPU is not running, so nobody writes; every bit pattern is a valid `internal` struct.
        let internal = unsafe { (*self.0.as_ptr()).__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        (
            internal.suberror,
            internal.data.iter().take(count).copied().collect(),
        )
    }
}

/// A vCPU, its run page, and the VM that must outlive both.
pub(super) struct Owned {
    pub(super) fd: std::sync::Mutex<VcpuFd>,
    pub(super) page: RunPage,
    _vm: Arc<Vm>,
}

impl Owned {
    pub(super) fn new(mut fd: VcpuFd, vm: Arc<Vm>) -> Owned {
        let page = RunPage::of(&mut fd);
        Owned {
            fd: std::sync::Mutex::new(fd),
            page,
            _vm: vm,
        }
    }
}
