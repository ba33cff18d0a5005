//! The CMOS clock (MC146818). It shows the caller's wall clock, shifted by what the guest has set.
//!
//! It raises no interrupt: the DSDT must not give it one.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::calendar::{Calendar, REGISTERS};
use crate::bus::BusDevice;
use crate::clock::Clock;
use crate::log_once::LogOnce;
use crate::state::{Record, RecordKey, StateError, Stateful};

pub const PORTS: Range<u64> = 0x70..0x72;
/// For the FADT: where the century is.
pub const CENTURY_INDEX: u8 = 0x32;
const INDEX: u64 = 0;
const DATA: u64 = 1;

const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_DIVIDER_RESET: u8 = 0b110 << 4;
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_DEFAULT: u8 = 0x02;
const D_VALID: u8 = 1 << 7;

/// The registers change within this time before a full second, and UIP warns of it.
const UPDATE_US: i64 = 244;
const SECOND_US: i64 = 1_000_000;
const CMOS_LEN: usize = 128;

pub struct Rtc {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    bad_time: LogOnce,
}

#[derive(Serialize, Deserialize, Clone)]
struct State {
    index: u8,
    a: u8,
    b: u8,
    /// Guest time minus the caller's wall clock.
    offset_us: i64,
    /// The time registers while the guest holds them still (SET) to write them.
    held: Option<[u8; REGISTERS.len()]>,
    /// Alarm registers and the memory behind the clock.
    cmos: Vec<u8>,
}

impl Rtc {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let state = State {
            index: 0,
            a: A_DEFAULT,
            b: B_DEFAULT,
            offset_us: 0,
            held: None,
            cmos: vec![0; CMOS_LEN],
        };
        Self {
            state: Mutex::new(state),
            clock,
            bad_time: LogOnce::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wall_us(&self) -> i64 {
        i64::try_from(self.clock.wall().as_micros()).unwrap_or(i64::MAX)
    }

    fn set_time(&self, state: &mut State, registers: &[u8; REGISTERS.len()]) {
        match Calendar::from_registers(registers, state.b) {
            Some(calendar) => {
                let guest_us = calendar.seconds_since_epoch().saturating_mul(SECOND_US);
                state.offset_us = guest_us.saturating_sub(self.wall_us());
            }
            None => self
                .bad_time
                .warn(|| "the guest set its clock to a date that does not exist".to_owned()),
        }
    }
}

impl State {
    fn read(&self, wall_us: i64) -> u8 {
        let guest_us = wall_us.saturating_add(self.offset_us);
        if let Some(position) = REGISTERS.iter().position(|register| *register == self.index) {
            let registers = self.held.unwrap_or_else(|| self.registers(guest_us));
            return registers.get(position).copied().unwrap_or(0);
        }
        match self.index {
            REG_A => {
                let late = guest_us.rem_euclid(SECOND_US) >= SECOND_US - UPDATE_US;
                self.a
                    | if late && self.held.is_none() {
                        A_UPDATE_IN_PROGRESS
                    } else {
                        0
                    }
            }
            REG_B => self.b,
            REG_C => 0,
            REG_D => D_VALID,
            index => self.cmos.get(usize::from(index)).copied().unwrap_or(0xff),
        }
    }

    fn registers(&self, guest_us: i64) -> [u8; REGISTERS.len()] {
        Calendar::from_seconds(guest_us.div_euclid(SECOND_US)).to_registers(self.b)
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA, [value]) = (offset, data) {
            let wall_us = self.wall_us();
            *value = self.lock().read(wall_us);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let mut guard = self.lock();
        let state = &mut *guard;
        if offset == INDEX {
            // The top bit masks NMI on a PC, and there are none here.
            state.index = value & 0x7f;
            return;
        }
        let guest_us = self.wall_us().saturating_add(state.offset_us);
        if let Some(position) = REGISTERS.iter().position(|register| *register == state.index) {
            let mut registers = state.held.unwrap_or_else(|| state.registers(guest_us));
            if let Some(register) = registers.get_mut(position) {
                *register = value;
            }
            if state.held.is_some() {
                state.held = Some(registers);
            } else {
                self.set_time(state, &registers);
            }
            return;
        }
        match state.index {
            REG_A => {
                let was_reset = state.a & A_DIVIDER_RESET == A_DIVIDER_RESET;
                state.a = value & !A_UPDATE_IN_PROGRESS;
                if was_reset && state.a & A_DIVIDER_RESET != A_DIVIDER_RESET {
                    // The first update comes half a second after the divider is let go.
                    let phase = guest_us.rem_euclid(SECOND_US);
                    state.offset_us = state.offset_us.saturating_add(SECOND_US / 2 - phase);
                }
            }
            REG_B => {
                let (set, registers) = (value & B_SET != 0, state.held);
                match (set, registers) {
                    (true, None) => state.held = Some(state.registers(guest_us)),
                    (false, Some(registers)) => {
                        state.held = None;
                        state.b = value;
                        self.set_time(state, &registers);
                    }
                    _ => {}
                }
                state.b = value;
            }
            REG_C | REG_D => {}
            index => {
                if let Some(byte) = state.cmos.get_mut(usize::from(index)) {
                    *byte = value;
                }
            }
        }
    }
}

impl Stateful for Rtc {
    fn key(&self) -> RecordKey {
        RecordKey::new("rtc", 0)
    }

    fn save(&self) -> Result<Record, StateError> {
        Record::required(self.key(), 1, &*self.lock())
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let State {
            index,
            a,
            b,
            offset_us,
            held,
            cmos,
        } = record.read(&self.key(), 1)?;
        if cmos.len() != CMOS_LEN {
            return Err(StateError::Mismatch {
                name: "rtc".to_owned(),
                why: format!("its memory has {} bytes instead of {CMOS_LEN}", cmos.len()),
            });
        }
        *self.lock() = State {
            index: index & 0x7f,
            a: a & !A_UPDATE_IN_PROGRESS,
            b,
            offset_us,
            held,
            cmos,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::HandClock;
    use proptest::prelude::*;
    use std::time::Duration;

    /// Sat 21 Nov 2026 13:45:56.25 UTC
    const NOW: Duration = Duration::from_millis(1_795_268_756_250);

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(INDEX, &[index]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        data[0]
    }

    fn put(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(INDEX, &[index | 0x80]);
        rtc.write(DATA, &[value]);
    }

    fn all(rtc: &Rtc) -> [u8; REGISTERS.len()] {
        REGISTERS.map(|index| get(rtc, index))
    }

    fn rtc() -> (Arc<HandClock>, Rtc) {
        let clock = Arc::new(HandClock::at(NOW));
        (clock.clone(), Rtc::new(clock))
    }

    #[test]
    fn it_shows_the_callers_time_in_bcd() {
        let (clock, rtc) = rtc();
        // Seconds, minutes, hours, weekday (Sunday is 1), day, month, year, century.
        assert_eq!(all(&rtc), [0x56, 0x45, 0x13, 7, 0x21, 0x11, 0x26, 0x20]);
        clock.pass(Duration::from_secs(4));
        assert_eq!(all(&rtc)[..2], [0x00, 0x46]);
        assert_eq!(get(&rtc, REG_D), D_VALID);
    }

    #[test]
    fn binary_and_twelve_hours_work() {
        let (_, rtc) = rtc();
        put(&rtc, REG_B, 0x04);
        assert_eq!(all(&rtc)[..3], [56, 45, 0x81]);
    }

    #[test]
    fn update_in_progress_warns_just_before_the_second() {
        let (clock, rtc) = rtc();
        assert_eq!(get(&rtc, REG_A), A_DEFAULT);
        clock.pass(Duration::from_micros(749_900));
        assert_eq!(get(&rtc, REG_A), A_DEFAULT | A_UPDATE_IN_PROGRESS);
        put(&rtc, REG_B, B_DEFAULT | B_SET);
        assert_eq!(get(&rtc, REG_A), A_DEFAULT);
    }

    /// As Linux does it: SET, divider reset, registers, SET off, divider on.
    fn set_like_linux(rtc: &Rtc, registers: [u8; REGISTERS.len()]) {
        put(rtc, REG_B, B_DEFAULT | B_SET);
        put(rtc, REG_A, A_DEFAULT | 0x70);
        REGISTERS
            .iter()
            .zip(registers)
            .for_each(|(index, value)| put(rtc, *index, value));
        put(rtc, REG_B, B_DEFAULT);
        put(rtc, REG_A, A_DEFAULT);
    }

    #[test]
    fn a_time_the_guest_sets_runs_on_and_survives_in_a_new_device_on_another_clock() {
        let (clock, rtc) = rtc();
        let set = [0x59, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19];
        set_like_linux(&rtc, set);
        assert_eq!(all(&rtc), set);
        clock.pass(Duration::from_millis(499));
        assert_eq!(all(&rtc), set);
        clock.pass(Duration::from_millis(2));
        assert_eq!(all(&rtc), [0, 0, 0, 7, 1, 1, 0, 0x20]);

        put(&rtc, 0x40, 0x77);
        let saved = rtc.save().unwrap();
        clock.pass(Duration::from_secs(3600));
        let new = Rtc::new(clock.clone());
        new.restore(&saved).unwrap();
        assert_eq!(new.save().unwrap(), saved);
        assert_eq!(all(&new), [0, 0, 1, 7, 1, 1, 0, 0x20]);
        assert_eq!(get(&new, 0x40), 0x77);
    }

    #[test]
    fn a_crossing_in_the_middle_of_setting_the_time_loses_nothing() {
        let (clock, rtc) = rtc();
        put(&rtc, REG_B, B_DEFAULT | B_SET);
        put(&rtc, 0, 0x11);
        let saved = rtc.save().unwrap();
        let new = Rtc::new(clock);
        new.restore(&saved).unwrap();
        put(&new, 2, 0x22);
        put(&new, REG_B, B_DEFAULT);
        assert_eq!(all(&new), [0x11, 0x22, 0x13, 7, 0x21, 0x11, 0x26, 0x20]);
    }

    #[test]
    fn a_date_that_does_not_exist_changes_nothing() {
        let (_, rtc) = rtc();
        let before = all(&rtc);
        set_like_linux(&rtc, [0x99, 0xff, 0x77, 0, 0x31, 0x02, 0xaa, 0xbb]);
        assert_eq!(all(&rtc), before);
    }

    #[test]
    fn a_state_with_a_wrong_memory_is_refused() {
        let (_, rtc) = rtc();
        let state = State {
            cmos: vec![0; 3],
            ..rtc.lock().clone()
        };
        let record = Record::required(rtc.key(), 1, &state).unwrap();
        assert!(rtc.restore(&record).unwrap_err().to_string().contains("3 bytes"));
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(accesses in prop::collection::vec(
            (any::<bool>(), 0..4u64, prop::collection::vec(any::<u8>(), 0..4)), 0..200)) {
            let (clock, rtc) = rtc();
            for (is_write, offset, mut data) in accesses {
                if is_write { rtc.write(offset, &data) } else { rtc.read(offset, &mut data) }
            }
            let saved = rtc.save().unwrap();
            let new = Rtc::new(clock);
            new.restore(&saved).unwrap();
            prop_assert_eq!(new.save().unwrap(), saved);
        }
    }
}
