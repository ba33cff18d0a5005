//! Time: kvm-clock and the TSCs.
//!
//! The guest's clocks go on while it stands still, as far as KVM lets us: after the switch its idea of the time is right,
//! and it sees a gap where it did not run, instead of a clock that is late for ever after.
//!
//! kvm-clock carries the host's wall time with it (KVM_CLOCK_REALTIME), so KVM itself adds what has passed. The TSCs follow
//! by the same amount. Where KVM tells the host's TSC that belongs to a reading of the clock, and lets us set the offset of
//! each vCPU, the TSCs are exact and keep their distance from each other (which is nought on a sane machine). Otherwise we
//! write the value, and KVM makes those of one machine equal when they are written within a second.

use ferry_devices::state::{Record, RecordKey};
use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use super::msrs::{self, Msr};
use super::saved;
use super::vcpu::Tsc;
use crate::error::{Doing, MachineError, Result};
use crate::kvm::{Capabilities, raw};

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    pub kvm: Blob<kvm_clock_data>,
}

pub fn save(vm: &VmFd) -> Result<Clock> {
    Ok(Clock {
        kvm: Blob(vm.get_clock().doing("read the guest's clock")?),
    })
}

/// Sets the machine's clock; the answer is a reading of it, for the TSCs.
pub fn restore(vm: &VmFd, caps: &Capabilities, clock: &Clock) -> Result<kvm_clock_data> {
    let Clock { kvm: Blob(then) } = clock;
    let with_realtime = caps.clock_realtime && then.flags & KVM_CLOCK_REALTIME != 0;
    let set = kvm_clock_data {
        clock: then.clock,
        flags: if with_realtime { KVM_CLOCK_REALTIME } else { 0 },
        realtime: if with_realtime { then.realtime } else { 0 },
        ..Default::default()
    };
    vm.set_clock(&set).doing("set the guest's clock")?;
    vm.get_clock().doing("read the guest's clock")
}

/// How far the clock is behind the wall clock since it was saved; None where KVM does not say which wall time belongs to
/// a reading.
pub fn behind(then: &Clock, now: &kvm_clock_data) -> Option<Duration> {
    let then = &then.kvm.0;
    if then.flags & now.flags & KVM_CLOCK_REALTIME == 0 {
        return None;
    }
    let wall = now.realtime.saturating_sub(then.realtime);
    let guest = now.clock.saturating_sub(then.clock);
    Some(Duration::from_nanos(wall.saturating_sub(guest)))
}

/// How to set one vCPU's TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TscPlan {
    Offset(u64),
    Value(u64),
}

/// What the TSC of a vCPU must become, from the clock as it was saved and as it reads here now.
pub fn plan(then: &kvm_clock_data, now: &kvm_clock_data, tsc: &Tsc, can_set_offset: bool) -> TscPlan {
    let passed_ns = u128::from(now.clock.saturating_sub(then.clock));
    let passed_ticks = (passed_ns * u128::from(tsc.khz) / 1_000_000) as u64;
    let has_host_tsc = |clock: &kvm_clock_data| clock.flags & KVM_CLOCK_HOST_TSC != 0;
    match tsc.offset {
        Some(offset) if can_set_offset && has_host_tsc(then) && has_host_tsc(now) => {
            let guest_then = then.host_tsc.wrapping_add(offset);
            TscPlan::Offset(guest_then.wrapping_add(passed_ticks).wrapping_sub(now.host_tsc))
        }
        _ => TscPlan::Value(tsc.value.wrapping_add(passed_ticks)),
    }
}

/// Sets a vCPU's TSC: its frequency, then its value or offset.
pub fn restore_tsc(
    vcpu: &VcpuFd,
    caps: &Capabilities,
    tsc: &Tsc,
    then: &Clock,
    now: &kvm_clock_data,
) -> Result<()> {
    let here = vcpu.get_tsc_khz().doing("read the TSC's frequency")?;
    let same = tsc_is_close(tsc.khz, here);
    if !same {
        if !caps.tsc_control {
            return Err(MachineError::Saved(format!(
                "the guest's TSC runs at {} kHz, this host's at {here} kHz, and its KVM cannot scale it",
                tsc.khz
            )));
        }
        vcpu.set_tsc_khz(tsc.khz).doing("set the TSC's frequency")?;
    }
    match plan(&then.kvm.0, now, tsc, caps.tsc_offset && same) {
        TscPlan::Offset(offset) => raw::set_tsc_offset(vcpu, offset).doing("set the TSC's offset"),
        TscPlan::Value(value) => msrs::write(
            vcpu,
            &[Msr {
                index: msrs::IA32_TSC,
                value,
            }],
        ),
    }
}

/// Two processors of the same nominal frequency differ by some parts in a million; KVM and NTP live with 250.
pub fn tsc_is_close(a_khz: u32, b_khz: u32) -> bool {
    u64::from(a_khz.abs_diff(b_khz)) * 1_000_000 <= u64::from(a_khz.max(b_khz)) * 250
}

pub fn key() -> RecordKey {
    RecordKey::new("clock", 0)
}

pub fn to_record(clock: &Clock) -> Result<Record> {
    Record::required(key(), VERSION, clock).map_err(saved)
}

pub fn from_record(record: &Record) -> Result<Clock> {
    record.read(&key(), VERSION).map_err(saved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(clock: u64, host_tsc: u64, flags: u32) -> kvm_clock_data {
        kvm_clock_data {
            clock,
            host_tsc,
            flags,
            ..Default::default()
        }
    }

    const TSC: Tsc = Tsc {
        khz: 2_000_000,
        value: 1_000,
        offset: Some(500u64.wrapping_neg()),
    };

    #[test]
    fn a_clock_that_stood_still_is_behind_by_what_passed() {
        let reading = |clock, realtime, flags| kvm_clock_data {
            clock,
            realtime,
            flags,
            ..Default::default()
        };
        let then = Clock {
            kvm: Blob(reading(1_000, 50_000, KVM_CLOCK_REALTIME)),
        };
        let ns = |count| Some(Duration::from_nanos(count));
        assert_eq!(
            behind(&then, &reading(1_000, 58_000, KVM_CLOCK_REALTIME)),
            ns(8_000)
        );
        assert_eq!(
            behind(&then, &reading(8_900, 58_000, KVM_CLOCK_REALTIME)),
            ns(100)
        );
        // The wall clock there is behind ours: the guest's is not.
        assert_eq!(behind(&then, &reading(1_000, 20_000, KVM_CLOCK_REALTIME)), ns(0));
        assert_eq!(behind(&then, &reading(1_000, 0, 0)), None);
    }

    #[test]
    fn the_tsc_goes_on_by_what_the_clock_went_on() {
        // 3 ms at 2 GHz are 6,000,000 ticks.
        let then = clock(10, 1_500, KVM_CLOCK_HOST_TSC);
        let now = clock(10 + 3_000_000, 77, KVM_CLOCK_HOST_TSC);
        let TscPlan::Offset(offset) = plan(&then, &now, &TSC, true) else {
            panic!("the host's TSC is known")
        };
        assert_eq!(now.host_tsc.wrapping_add(offset), 1_000 + 6_000_000);
    }

    #[test]
    fn without_offset_or_host_tsc_the_value_is_written() {
        let known = clock(0, 5, KVM_CLOCK_HOST_TSC);
        let unknown = clock(0, 0, 0);
        assert_eq!(plan(&known, &known, &TSC, false), TscPlan::Value(1_000));
        assert_eq!(plan(&known, &unknown, &TSC, true), TscPlan::Value(1_000));
        assert_eq!(plan(&unknown, &known, &TSC, true), TscPlan::Value(1_000));
        let no_offset = Tsc { offset: None, ..TSC };
        assert_eq!(
            plan(&known, &clock(1_000_000, 9, KVM_CLOCK_HOST_TSC), &no_offset, true),
            TscPlan::Value(2_001_000)
        );
    }

    #[test]
    fn a_clock_that_went_back_does_not_turn_the_tsc_back() {
        let then = clock(5_000_000, 1_500, KVM_CLOCK_HOST_TSC);
        let now = clock(1, 1_500, KVM_CLOCK_HOST_TSC);
        assert_eq!(
            plan(&then, &now, &TSC, true),
            TscPlan::Offset(TSC.offset.unwrap())
        );
    }

    #[test]
    fn frequencies_within_250_ppm_count_as_the_same() {
        assert!(tsc_is_close(2_000_000, 2_000_400));
        assert!(!tsc_is_close(2_000_000, 2_000_600));
        assert!(tsc_is_close(0, 0));
    }
}
