//! What a vCPU does when the guest leaves to us: serve an access, or say why the guest cannot go on.

use ferry_devices::log_once::LogOnce;
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::Surroundings;
use super::run_page::RunPage;
use crate::kvm::vm::Vm;
use crate::lifecycle::{Event, StopReason};

pub(super) enum Step {
    Again,
    Interrupted,
    Ended(Event),
}

static NOBODY: LogOnce = LogOnce::new();

/// Why the guest cannot go on, found while KVM's exit still borrows the vCPU.
enum Trouble {
    TripleFault,
    Internal,
    FailEntry(u64),
    Other(String),
}

/// One KVM_RUN and the service of its exit.
pub(super) fn step(index: u32, vcpu: &mut VcpuFd, page: &RunPage, vm: &Vm, around: &Surroundings) -> Step {
    let trouble = match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            // A string instruction reads several elements from one port.
            for element in data.chunks_mut(page.port_width()) {
                if !around.ports.read(u64::from(port), element) {
                    NOBODY.warn(|| format!("the guest reads port {port:#x}, where no device is"));
                }
            }
            return Step::Again;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            for element in data.chunks(page.port_width()) {
                if !around.ports.write(u64::from(port), element) {
                    NOBODY.warn(|| format!("the guest writes to port {port:#x}, where no device is"));
                }
            }
            return Step::Again;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            if !around.memory.read(address, data) {
                NOBODY.warn(|| format!("the guest reads address {address:#x}, where nothing is"));
            }
            return Step::Again;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            if !around.memory.write(address, data) {
                NOBODY.warn(|| format!("the guest writes to address {address:#x}, where nothing is"));
            }
            return Step::Again;
        }
        // With the interrupt controllers in the kernel HLT stays there; a KVM that hands it out all the same is obeyed by
        // going back, where it waits.
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {
            return Step::Again;
        }
        // So many writes since the last survey of a crossing: nothing of it is lost, the guest waits while it is noted.
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match vm.make_room(index) {
            Ok(()) => return Step::Again,
            Err(error) => Trouble::Other(error.to_string()),
        },
        Ok(VcpuExit::Shutdown) => Trouble::TripleFault,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            return Step::Ended(Event::Stop(StopReason::PowerOff));
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
            return Step::Ended(Event::Stop(StopReason::Reset));
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
            Trouble::Other("the guest reported a crash".into())
        }
        Ok(VcpuExit::InternalError) => Trouble::Internal,
        Ok(VcpuExit::FailEntry(reason, _)) => Trouble::FailEntry(reason),
        Ok(other) => Trouble::Other(format!(
            "KVM returned with {other:?}, which nothing here asked for"
        )),
        Err(e) => match e.errno() {
            libc::EINTR => return Step::Interrupted,
            // A vCPU that waited for its start-up message got it.
            libc::EAGAIN => return Step::Again,
            libc::EFAULT => Trouble::Other(
                "the host could not provide a page of guest memory (out of huge pages, or a memory error)"
                    .into(),
            ),
            errno => Trouble::Other(format!(
                "KVM_RUN failed: {}",
                std::io::Error::from_raw_os_error(errno)
            )),
        },
    };
    let what = match trouble {
        Trouble::TripleFault => format!("CPU {index} of the guest ended in a triple fault"),
        Trouble::Internal => {
            let (suberror, data) = page.internal_error();
            let name = match suberror {
                1 => "the instruction could not be emulated",
                2 => "two exceptions at the same time",
                3 => "an event could not be delivered",
                4 => "an exit that KVM did not expect",
                _ => "for a reason that this program does not know",
            };
            format!("KVM gave up on CPU {index} (internal error {suberror}: {name}; data {data:x?})")
        }
        Trouble::FailEntry(reason) => {
            format!("the processor refused to run CPU {index} (reason {reason:#x})")
        }
        Trouble::Other(what) => format!("CPU {index}: {what}"),
    };
    let message = format!("{what}; {}", describe(vcpu, vm));
    tracing::error!("{message}");
    Step::Ended(Event::Fail(message))
}

/// Registers and the code bytes at the instruction pointer, for the message that ends a machine.
pub fn describe(vcpu: &VcpuFd, vm: &Vm) -> String {
    let (Ok(r), Ok(s)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "its registers cannot be read".into();
    };
    let mut code = Vec::new();
    for offset in 0..16u64 {
        // Segment bases are 0 in long mode for cs; in the other modes the base counts.
        let linear = s.cs.base.wrapping_add(r.rip).wrapping_add(offset);
        let Ok(at) = vcpu.translate_gva(linear) else { break };
        let mut byte = [0u8];
        if at.valid == 0
            || vm
                .ram
                .read_slice(&mut byte, GuestAddress(at.physical_address))
                .is_err()
        {
            break;
        }
        code.push(format!("{:02x}", byte[0]));
    }
    let code = if code.is_empty() {
        "not mapped".to_owned()
    } else {
        code.join(" ")
    };
    format!(
        "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} rbp={:#x} r8={:#x} \
         r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} r14={:#x} r15={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} \
         efer={:#x} cs={:#x} ss={:#x}; code at rip: {code}",
        r.rip,
        r.rsp,
        r.rflags,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        s.cs.selector,
        s.ss.selector
    )
}
