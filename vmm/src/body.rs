//! Everything of a machine but its memory: the part that a pulse throws away and makes anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_devices::records::RecordReader;
use ferry_devices::state::Record;

use crate::cpu::cpuid::{self, Leaf};
use crate::devices::{Around, Devices};
use crate::error::{Doing, MachineError, Result};
use crate::kvm::Capabilities;
use crate::kvm::vm::Vm;
use crate::state::{chips, clock, vcpu};
use crate::vcpu::{EndSink, Surroundings, Vcpu};

pub(crate) struct Body {
    // Dropped in this order: CPUs stop before their devices go.
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) devices: Devices,
    pub(crate) vm: Arc<Vm>,
}

impl Body {
    /// vCPUs with their CPUID, parked, and new devices, around a new VM.
    pub(crate) fn build(around: &Around, cpuid: &[Leaf], end: &Arc<dyn EndSink>) -> Result<Body> {
        let devices = Devices::create(around)?;
        let vm = around.vm.clone();
        let surroundings = Surroundings {
            ports: devices.ports.clone(),
            memory: devices.memory.clone(),
            end: end.clone(),
        };
        let mut vcpus = Vec::new();
        for index in 0..around.config.cpus {
            let fd = vm
                .fd
                .create_vcpu(u64::from(index))
                .doing(format!("create CPU {index}"))?;
            vm.add_vcpu(&fd)?;
            fd.set_cpuid2(&cpuid::for_vcpu(cpuid, index)?)
                .doing(format!("set the CPUID of CPU {index}"))?;
            vcpus.push(Vcpu::spawn(index, fd, vm.clone(), surroundings.clone())?);
        }
        Ok(Body { vcpus, devices, vm })
    }

    /// Stops every vCPU, then every device's work. The answer is how long the vCPUs took.
    pub(crate) fn pause(&self) -> Result<Duration> {
        let begun = Instant::now();
        self.vcpus.iter().for_each(Vcpu::ask_park);
        self.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
        let taken = begun.elapsed();
        self.devices.pci.root.pause();
        Ok(taken)
    }

    pub(crate) fn run(&self, caps: &Capabilities, was_paused: bool) {
        self.devices.pci.root.resume();
        for vcpu in &self.vcpus {
            if was_paused
                && caps.kvmclock_ctrl
                && let Err(errno) = vcpu.fd().kvmclock_ctrl()
            {
                // Tells the guest's watchdog that it stood still. A guest without kvm-clock has none to tell.
                tracing::trace!("CPU {} was not told about the pause: {errno}", vcpu.index());
            }
        }
        self.vcpus.iter().for_each(Vcpu::run);
    }

    /// Everything but memory and disks. All is paused.
    pub(crate) fn save(&self, caps: &Capabilities, msrs: &[u32]) -> Result<Vec<Record>> {
        let mut records = vec![clock::to_record(&clock::save(&self.vm.fd)?)?];
        for vcpu in &self.vcpus {
            records.push(vcpu::to_record(
                vcpu.index(),
                &vcpu::save(&vcpu.fd(), caps, msrs)?,
            )?);
        }
        records.push(chips::to_record(&chips::save(&self.vm.fd, caps)?)?);
        records.extend(self.devices.save()?);
        Ok(records)
    }

    /// Puts saved state into vCPUs and devices that have not run yet. Every record is decoded before the first is used.
    /// Tells how far the guest's clock is behind, where that can be measured.
    pub(crate) fn restore(&self, caps: &Capabilities, records: Vec<Record>) -> Result<Option<Duration>> {
        let mut reader = RecordReader::new(records);
        let mut take = |key| reader.take(&key).map_err(crate::state::saved);
        let then = clock::from_record(&take(clock::key())?)?;
        let chips = chips::from_record(&take(chips::key())?)?;
        let mut states = Vec::new();
        for vcpu in &self.vcpus {
            states.push(vcpu::from_record(vcpu.index(), &take(vcpu::key(vcpu.index()))?)?);
        }
        let cannot = |index: u32, error: MachineError| {
            MachineError::Saved(format!("CPU {index} cannot be restored here: {error}"))
        };
        let now = clock::restore(&self.vm.fd, caps, &then)?;
        for (vcpu, state) in self.vcpus.iter().zip(&states) {
            let fd = vcpu.fd();
            clock::restore_tsc(&fd, caps, &state.tsc, &then, &now).map_err(|e| cannot(vcpu.index(), e))?;
        }
        for (vcpu, state) in self.vcpus.iter().zip(&states) {
            vcpu::restore(&vcpu.fd(), caps, state).map_err(|e| cannot(vcpu.index(), e))?;
        }
        chips::restore(&self.vm.fd, caps, &chips)?;
        self.devices.restore(&mut reader)?;
        reader.finish().map_err(crate::state::saved)?;
        Ok(clock::behind(&then, &now))
    }
}
