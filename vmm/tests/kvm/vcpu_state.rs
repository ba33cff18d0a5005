//! Every field of a vCPU's state, changed alone: restored into a new vCPU and saved again it must come back changed, and
//! nothing else with it. A field that save or restore forgets fails here by name.

use ferry_vmm::config::MachineConfig;
use ferry_vmm::kvm::vm::Vm;
use ferry_vmm::kvm::{self, Capabilities};
use ferry_vmm::state::vcpu::{self, VcpuState};
use ferry_vmm::state::{clock, msrs};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::harness::{config, skip};

type Change<'a> = &'a dyn Fn(&mut VcpuState);

struct Bench {
    kvm: Kvm,
    caps: Capabilities,
    msrs: Vec<u32>,
    ram: ferry_devices::ram::Ram,
}

impl Bench {
    fn new() -> Bench {
        let kvm = kvm::open().unwrap();
        let caps = Capabilities::probe(&kvm).unwrap();
        let ram = ferry_vmm::memory::allocate(&MachineConfig { ..config(1, "") }).unwrap();
        let mut bench = Bench {
            kvm,
            caps,
            msrs: Vec::new(),
            ram,
        };
        let (_vm, vcpu) = bench.vcpu();
        bench.msrs = msrs::readable(&vcpu, &msrs::candidates(&bench.kvm).unwrap()).unwrap();
        bench
    }

    fn vcpu(&self) -> (std::sync::Arc<Vm>, VcpuFd) {
        let vm = Vm::create(&self.kvm, &self.caps, &self.ram, None).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&self.kvm.get_supported_cpuid(256).unwrap())
            .unwrap();
        (vm, vcpu)
    }

    fn save(&self, vcpu: &VcpuFd) -> VcpuState {
        vcpu::save(vcpu, &self.caps, &self.msrs).unwrap()
    }

    /// What a new vCPU says after it was given this state.
    fn through(&self, state: &VcpuState) -> VcpuState {
        let (_vm, vcpu) = self.vcpu();
        vcpu::restore(&vcpu, &self.caps, state).unwrap();
        self.save(&vcpu)
    }
}

/// The names of the fields that differ. The TSC runs, and is the clock's to restore.
fn differing(a: &VcpuState, b: &VcpuState) -> Vec<&'static str> {
    let VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        msrs,
        lapic,
        events,
        tsc: _,
    } = a;
    [
        ("mp_state", *mp_state == b.mp_state),
        ("regs", *regs == b.regs),
        ("sregs", *sregs == b.sregs),
        ("xsave", *xsave == b.xsave),
        ("xcrs", *xcrs == b.xcrs),
        ("debug_regs", *debug_regs == b.debug_regs),
        ("msrs", *msrs == b.msrs),
        ("lapic", *lapic == b.lapic),
        ("events", *events == b.events),
    ]
    .into_iter()
    .filter(|(_, same)| !same)
    .map(|(name, _)| name)
    .collect()
}

#[test]
fn each_field_of_a_cpu_is_saved_and_restored_by_itself() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    let (_vm, vcpu) = bench.vcpu();
    let base = bench.through(&bench.save(&vcpu));
    assert_eq!(
        differing(&base, &bench.through(&base)),
        [""; 0],
        "a state must survive unchanged"
    );

    const SYSENTER_EIP: u32 = 0x176;
    let changes: [(&str, Change); 9] = [
        ("mp_state", &|s| {
            s.mp_state.0.mp_state = kvm_bindings::KVM_MP_STATE_HALTED
        }),
        ("regs", &|s| s.regs.0.r13 = 0x1234_5678_9abc),
        ("sregs", &|s| s.sregs.0.gs.base = 0x77_0000),
        // ST0, a whole XMM register and the bit that says that they are there.
        ("xsave", &|s| {
            s.xsave.0[40] ^= 0x5555;
            s.xsave.0[128] |= 3;
        }),
        ("xcrs", &|s| {
            s.xcrs.0.xcrs[0].value = if s.xcrs.0.xcrs[0].value == 1 { 3 } else { 1 }
        }),
        ("debug_regs", &|s| s.debug_regs.0.db[2] = 0x4000),
        ("msrs", &|s| {
            s.msrs
                .iter_mut()
                .find(|msr| msr.index == SYSENTER_EIP)
                .unwrap()
                .value = 0xfee1
        }),
        // The spurious-interrupt vector.
        ("lapic", &|s| s.lapic.0.regs[0xf0] = 0x3f),
        ("events", &|s| {
            s.events.0.nmi.masked = 1;
            s.events.0.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
        }),
    ];
    for (field, change) in changes {
        let mut changed = base.clone();
        change(&mut changed);
        assert_eq!(
            differing(&base, &changed),
            [field],
            "the test changes another field"
        );
        assert_eq!(
            differing(&changed, &bench.through(&changed)),
            [""; 0],
            "{field} did not survive"
        );
    }
}

#[test]
fn the_clock_and_the_tsc_go_on_from_where_they_were() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    let (vm, vcpu) = bench.vcpu();
    let saved = bench.save(&vcpu);
    let mut then = clock::save(&vm.fd).unwrap();
    then.kvm.0.clock += 3_600_000_000_000;
    let (other, new) = bench.vcpu();
    let now = clock::restore(&other.fd, &bench.caps, &then).unwrap();
    assert!(now.clock >= then.kvm.0.clock, "kvm-clock went back");
    assert!(now.clock < then.kvm.0.clock + 60_000_000_000, "kvm-clock leapt");
    clock::restore_tsc(&new, &bench.caps, &saved.tsc, &then, &now).unwrap();
    let tsc = bench.save(&new).tsc.value;
    assert!(
        tsc >= saved.tsc.value,
        "the TSC went back: {tsc} after {}",
        saved.tsc.value
    );
    assert!(
        tsc < saved.tsc.value + u64::from(saved.tsc.khz) * 60_000,
        "the TSC leapt"
    );
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    let (_vm, vcpu) = bench.vcpu();
    let base = bench.save(&vcpu);
    let refused = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = base.clone();
        change(&mut state);
        let (_vm, vcpu) = bench.vcpu();
        vcpu::restore(&vcpu, &bench.caps, &state).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.xsave.0.truncate(8)).contains("XSAVE"));
    assert!(refused(&|s| s.xsave.0.extend([0, 0, 1])).contains("XSAVE"));
    assert!(
        refused(&|s| s.msrs.push(msrs::Msr {
            index: 0xdead_beef,
            value: 1
        }))
        .contains("0xdeadbeef")
    );
    assert!(refused(&|s| s.sregs.0.cr0 = 1 << 31).contains("segment registers"));
    // Bytes of a wrong length do not become a state at all.
    let mut record = vcpu::to_record(0, &base).unwrap();
    record.body.truncate(record.body.len() - 1);
    assert!(vcpu::from_record(0, &record).is_err());
    assert!(
        vcpu::from_record(1, &vcpu::to_record(0, &base).unwrap()).is_err(),
        "another CPU's state"
    );
}
