//! A virtual machine as KVM sees it: interrupt chips and memory slots, nothing that runs.
#![allow(unsafe_code)] // plugging memory into KVM

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ferry_devices::ram::{PAGE_SIZE, Ram};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{Doing, MachineError, Result};
use crate::kvm::ring::{RingUse, Rings};
use crate::kvm::stats::VcpuStats;
use crate::kvm::{Capabilities, raw};
use crate::layout;

/// What is counted of one vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tracked {
    /// With dirty rings.
    pub ring: Option<RingUse>,
    /// Page faults that KVM mended, whatever for.
    pub faults: Option<u64>,
}

/// The VM and the memory plugged into it; the memory lives at least as long.
pub struct Vm {
    pub fd: VmFd,
    /// Instead of the dirty log, if the machine was made so. Dropped before the memory: they keep the VM in the kernel.
    pub rings: Option<Rings>,
    /// What KVM counts of each vCPU, in order; none where it does not.
    stats: Mutex<Vec<Option<VcpuStats>>>,
    pub ram: Ram,
    /// One bit per slot whose writes are tracked.
    logging: AtomicU32,
}

impl Vm {
    /// Makes a VM over memory that exists already (and may have been in another VM before: a pulse does that). With
    /// `ring_entries` writes are tracked by dirty rings of that size, without by the dirty log: KVM does one or the other
    /// for the whole life of a VM, and must know before the first vCPU.
    pub fn create(kvm: &Kvm, caps: &Capabilities, ram: &Ram, ring_entries: Option<u32>) -> Result<Arc<Vm>> {
        let fd = loop {
            match kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.doing("create a virtual machine")?,
            }
        };
        let pages: Vec<u64> = ram.iter().map(|region| region.len() / PAGE_SIZE).collect();
        let rings = ring_entries
            .map(|entries| Rings::enable(&fd, caps, entries, &pages))
            .transpose()?;
        // Not beside rings: with INITIALLY_SET memory would not be protected when the tracking begins, and rings have
        // nothing else that protects it the first time.
        if caps.manual_dirty_protect != 0 && rings.is_none() {
            // Before the memory is plugged in: a slot that exists already would begin with an empty log instead of
            // a full one, and the first round of a crossing would send nothing.
            let mut cap = kvm_enable_cap {
                cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = u64::from(caps.manual_dirty_protect);
            fd.enable_cap(&cap).doing("enable manual dirty-log protection")?;
        }
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .doing("place the identity map")?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .doing("place the TSS")?;
        fd.create_irq_chip().doing("create the interrupt controllers")?;
        if caps.pit2 {
            let pit = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            fd.create_pit2(pit).doing("create the PIT")?;
        }
        let vm = Vm {
            fd,
            rings,
            stats: Mutex::default(),
            ram: ram.clone(),
            logging: AtomicU32::new(0),
        };
        (0..).zip(ram.iter()).try_for_each(|(slot, _)| vm.plug(slot, 0))?;
        Ok(Arc::new(vm))
    }

    /// Takes note of a new vCPU.
    pub(crate) fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<()> {
        let stats = VcpuStats::open(vcpu);
        let stats = stats.inspect_err(|error| tracing::debug!("no statistics of a CPU: {error}"));
        let mut all = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(stats.ok());
        self.rings.as_ref().map_or(Ok(()), |rings| rings.add(vcpu))
    }

    /// What the tracking of writes has cost each vCPU since it was made, as far as it is counted.
    pub fn tracked(&self) -> Vec<Tracked> {
        let rings = self.rings.as_ref().map(Rings::used);
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |(vcpu, stats): (usize, &Option<VcpuStats>)| Tracked {
            ring: rings.as_ref().and_then(|used| used.get(vcpu).copied()),
            faults: stats.as_ref().and_then(|stats| stats.faults().ok()),
        };
        stats.iter().enumerate().map(of).collect()
    }

    /// Empties the rings, for a vCPU that cannot go on before.
    pub(crate) fn make_room(&self, vcpu: u32) -> Result<()> {
        let Some(rings) = &self.rings else { return Ok(()) };
        rings.make_room(&self.fd, vcpu).doing("empty the dirty rings")
    }

    /// Switches the tracking of writes to a slot on or off.
    pub fn log_dirty_pages(&self, slot: u32, on: bool) -> Result<()> {
        self.plug(slot, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        let bit = 1u32.checked_shl(slot).unwrap_or(0);
        if on {
            self.logging.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.logging.fetch_and(!bit, Ordering::AcqRel)
        };
        Ok(())
    }

    /// Whether any slot's writes are tracked: then nobody may take the memory to another VM, which knows of none of them.
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::Acquire) != 0
    }

    fn plug(&self, slot: u32, flags: u32) -> Result<()> {
        let Some(region) = self.ram.iter().nth(slot as usize) else {
            return Err(MachineError::Host(format!(
                "the machine has no memory slot {slot}"
            )));
        };
        let guest = region.start_addr().0;
        // SAFETY: the mapping belongs to `self.ram`, which is dropped after `self.fd` (declaration order); a VM without
        // its file descriptor and vCPUs touches no memory. vCPUs hold an `Arc` of this VM.
        unsafe { raw::set_memory(&self.fd, slot, guest, region.len(), region.as_ptr() as u64, flags) }
            .doing(format!("plug in guest memory at {guest:#x}"))
    }
}
