//! The ACPI power management block: power button, sleep (power-off), and the 3.58 MHz timer.
//!
//! The SCI is edge triggered here: the MADT must say so for its line. An edge is sent for every event that arrives
//! enabled, and again when a register write leaves one pending, so none is lost between two reads of the handler.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::clock::Clock;
use crate::irq::IrqLine;
use crate::log_once::LogOnce;
use crate::request::{MachineEvents, MachineRequest};
use crate::state::{Record, RecordKey, StateError, Stateful};

pub const PORTS: Range<u64> = 0x600..0x610;
/// For the FADT: PM1a_EVT_BLK (4 bytes), PM1a_CNT_BLK (2 bytes), PM_TMR_BLK (4 bytes, 32 bits wide).
pub const PM1A_EVT_PORT: u16 = 0x600;
pub const PM1A_CNT_PORT: u16 = 0x604;
pub const PM_TMR_PORT: u16 = 0x608;
/// What the DSDT's \_S5 package must name as SLP_TYPa.
pub const SLP_TYP_S5: u8 = 5;
pub const PM_TIMER_HZ: u64 = 3_579_545;

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const TIMER: u64 = 8;

const POWER_BUTTON: u16 = 1 << 8;
/// TMR, GBL, PWRBTN, SLPBTN, RTC.
const ENABLE_BITS: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
const CONTROL_SCI_EN: u16 = 1 << 0;
/// What reads back of the control register besides SCI_EN: BM_RLD and SLP_TYP.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << 10;
const CONTROL_SLP_EN: u16 = 1 << 13;

pub struct AcpiPm {
    registers: Mutex<Registers>,
    clock: Arc<dyn Clock>,
    sci: Arc<dyn IrqLine>,
    events: Arc<dyn MachineEvents>,
    strange_sleep: LogOnce,
}

struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    /// The timer's value when the clock showed `timer_since`.
    timer_ticks: u64,
    timer_since: Duration,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    status: u16,
    enable: u16,
    control: u16,
    timer_ticks: u64,
}

impl AcpiPm {
    pub fn new(clock: Arc<dyn Clock>, sci: Arc<dyn IrqLine>, events: Arc<dyn MachineEvents>) -> Self {
        let timer_since = clock.monotonic();
        let registers = Registers {
            status: 0,
            enable: 0,
            control: 0,
            timer_ticks: 0,
            timer_since,
        };
        Self {
            registers: Mutex::new(registers),
            clock,
            sci,
            events,
            strange_sleep: LogOnce::new(),
        }
    }

    /// Presses the power button: the polite way to stop a guest. False if the guest does not listen for it yet
    /// (it will find the press when it begins to).
    pub fn press_power_button(&self) -> bool {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.raise_if_pending(&registers);
        registers.enable & POWER_BUTTON != 0
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise_if_pending(&self, registers: &Registers) {
        if registers.status & registers.enable != 0 {
            self.sci.trigger();
        }
    }

    fn sleep(&self, control: u16) {
        let sleep_type = (control >> 10 & 7) as u8;
        if sleep_type == SLP_TYP_S5 {
            self.events.request(MachineRequest::PowerOff);
        } else {
            self.strange_sleep.warn(|| {
                format!("the guest asked for sleep type {sleep_type}, which this machine does not have")
            });
        }
    }
}

impl Registers {
    fn ticks(&self, now: Duration) -> u64 {
        let passed = now.saturating_sub(self.timer_since).as_nanos();
        let ticks = passed * u128::from(PM_TIMER_HZ) / 1_000_000_000;
        self.timer_ticks.wrapping_add(ticks as u64)
    }

    /// All sixteen ports as they read now.
    fn image(&self, now: Duration) -> [u8; 16] {
        let low = u64::from(self.status)
            | u64::from(self.enable) << 16
            | u64::from(self.control | CONTROL_SCI_EN) << 32;
        let high = u64::from(self.ticks(now) as u32);
        let mut image = [0; 16];
        let (first, second) = image.split_at_mut(TIMER as usize);
        first.copy_from_slice(&low.to_le_bytes());
        second.copy_from_slice(&high.to_le_bytes());
        image
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.lock().image(self.clock.monotonic());
        for (at, byte) in data.iter_mut().enumerate() {
            let from = usize::try_from(offset)
                .ok()
                .and_then(|offset| image.get(offset.checked_add(at)?));
            *byte = from.copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Registers are 16 bits wide; each byte of an access goes to its half of its register.
        let mut registers = self.lock();
        let mut slept = None;
        for (at, byte) in (offset..).zip(data) {
            let shift = if at & 1 == 0 { 0 } else { 8 };
            let (mask, value) = (0xff << shift, u16::from(*byte) << shift);
            match at & !1 {
                // Written ones clear.
                STATUS => registers.status &= !value,
                ENABLE => registers.enable = registers.enable & !mask | value & ENABLE_BITS,
                CONTROL => {
                    registers.control = registers.control & !mask | value & CONTROL_KEPT;
                    if value & CONTROL_SLP_EN != 0 {
                        slept = Some(registers.control);
                    }
                }
                _ => {}
            }
        }
        if offset < CONTROL {
            self.raise_if_pending(&registers);
        }
        drop(registers);
        if let Some(control) = slept {
            self.sleep(control);
        }
    }
}

impl Stateful for AcpiPm {
    fn key(&self) -> RecordKey {
        RecordKey::new("acpi-pm", 0)
    }

    fn save(&self) -> Result<Record, StateError> {
        let registers = self.lock();
        let ticks = registers.ticks(self.clock.monotonic());
        let Registers {
            status,
            enable,
            control,
            timer_ticks: _,
            timer_since: _,
        } = *registers;
        Record::required(
            self.key(),
            1,
            &Saved {
                status,
                enable,
                control,
                timer_ticks: ticks,
            },
        )
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let Saved {
            status,
            enable,
            control,
            timer_ticks,
        } = record.read(&self.key(), 1)?;
        let timer_since = self.clock.monotonic();
        let enable = enable & ENABLE_BITS;
        let control = control & CONTROL_KEPT;
        *self.lock() = Registers {
            status,
            enable,
            control,
            timer_ticks,
            timer_since,
        };
        // An edge that was on its way when the state was saved travels with the interrupt controller; sending it
        // once more costs a look at the status register, not sending it could cost the event.
        self.raise_if_pending(&self.lock());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HandClock, Line, Requests};
    use proptest::prelude::*;

    struct Bench {
        clock: Arc<HandClock>,
        sci: Arc<Line>,
        requests: Arc<Requests>,
        pm: AcpiPm,
    }

    fn bench() -> Bench {
        let (clock, sci) = (Arc::new(HandClock::default()), Arc::new(Line::default()));
        let requests = Arc::new(Requests::default());
        let pm = AcpiPm::new(clock.clone(), sci.clone(), requests.clone());
        Bench {
            clock,
            sci,
            requests,
            pm,
        }
    }

    fn read<const N: usize>(pm: &AcpiPm, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        pm.read(offset, &mut data);
        data
    }

    #[test]
    fn the_power_button_reaches_a_guest_that_listens() {
        let Bench { sci, pm, .. } = bench();
        pm.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert!(pm.press_power_button());
        assert_eq!(sci.take(), 1);
        assert_eq!(read(&pm, STATUS), POWER_BUTTON.to_le_bytes());
        pm.write(STATUS, &POWER_BUTTON.to_le_bytes());
        assert_eq!((read(&pm, STATUS), sci.take()), ([0, 0], 0));
    }

    #[test]
    fn a_press_before_the_guest_listens_is_found_later() {
        let Bench { sci, pm, .. } = bench();
        assert!(!pm.press_power_button());
        assert_eq!(sci.take(), 0);
        pm.write(ENABLE + 1, &[1]);
        assert_eq!(sci.take(), 1);
    }

    #[test]
    fn s5_powers_off_and_other_sleeps_do_not() {
        let Bench { requests, pm, .. } = bench();
        pm.write(CONTROL, &(3 << 10 | CONTROL_SLP_EN).to_le_bytes());
        pm.write(CONTROL, &(u16::from(SLP_TYP_S5) << 10).to_le_bytes());
        assert_eq!(requests.take(), []);
        pm.write(
            CONTROL,
            &(u16::from(SLP_TYP_S5) << 10 | CONTROL_SLP_EN).to_le_bytes(),
        );
        assert_eq!(requests.take(), [MachineRequest::PowerOff]);
        // SLP_EN never reads back, SCI_EN always does.
        assert_eq!(
            read(&pm, CONTROL),
            (u16::from(SLP_TYP_S5) << 10 | 1).to_le_bytes()
        );
    }

    #[test]
    fn the_timer_runs_at_its_rate_and_wraps() {
        let Bench { clock, pm, .. } = bench();
        clock.pass(Duration::from_secs(1));
        assert_eq!(u32::from_le_bytes(read(&pm, TIMER)), PM_TIMER_HZ as u32);
        clock.pass(Duration::from_secs(1_999));
        assert_eq!(u32::from_le_bytes(read(&pm, TIMER)), (PM_TIMER_HZ * 2_000) as u32);
        pm.write(TIMER, &[0; 4]);
        assert_eq!(u32::from_le_bytes(read(&pm, TIMER)), (PM_TIMER_HZ * 2_000) as u32);
    }

    #[test]
    fn the_state_continues_in_a_new_device() {
        let old = bench();
        old.clock.pass(Duration::from_secs(7));
        old.pm.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        old.pm.press_power_button();
        let saved = old.pm.save().unwrap();
        let new = bench();
        new.clock.pass(Duration::from_secs(1_000));
        new.pm.restore(&saved).unwrap();
        assert_eq!(new.pm.save().unwrap(), saved);
        assert_eq!(new.sci.take(), 1);
        new.clock.pass(Duration::from_secs(1));
        assert_eq!(u32::from_le_bytes(read(&new.pm, TIMER)), PM_TIMER_HZ as u32 * 8);
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(accesses in prop::collection::vec(
            (any::<bool>(), 0..40u64, prop::collection::vec(any::<u8>(), 0..9)), 0..50)) {
            let Bench { pm, .. } = bench();
            for (is_write, offset, mut data) in accesses {
                if is_write { pm.write(offset, &data) } else { pm.read(offset, &mut data) }
            }
            let saved = pm.save().unwrap();
            let new = bench();
            new.pm.restore(&saved).unwrap();
            prop_assert_eq!(new.pm.save().unwrap(), saved);
        }
    }
}
