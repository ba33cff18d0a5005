//! Dates for the CMOS clock: seconds since 1970 to its eight registers and back, in BCD or binary.

/// Where seconds, minutes, hours, weekday, day, month, year and century are.
pub(super) const REGISTERS: [u8; 8] = [0, 2, 4, 6, 7, 8, 9, 0x32];

const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const AFTERNOON: u8 = 1 << 7;
const DAY: i64 = 86_400;
/// 0000-01-01 and the last second of 9999: two digits of century cannot say more.
const FIRST: i64 = -62_167_219_200;
const LAST: i64 = 253_402_300_799;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Calendar {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// Times outside the years 0 to 9999 become the nearest one inside.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST, LAST);
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = civil_from_days(days);
        let (hour, minute, second) = ((rest / 3600) as u8, (rest / 60 % 60) as u8, (rest % 60) as u8);
        Self {
            year,
            month,
            day,
            hour,
            minute,
            second,
        }
    }

    pub(super) fn seconds_since_epoch(&self) -> i64 {
        let Self {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = *self;
        let in_day = i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second);
        days_from_civil(year, month, day) * DAY + in_day
    }

    /// The registers as register B says they are written.
    pub(super) fn to_registers(self, b: u8) -> [u8; REGISTERS.len()] {
        let Self {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = self;
        let number = |value: u8| {
            if b & B_BINARY != 0 {
                value
            } else {
                ((value / 10) << 4) | (value % 10)
            }
        };
        let hour = match b & B_24_HOURS {
            0 => number((hour + 11) % 12 + 1) | if hour >= 12 { AFTERNOON } else { 0 },
            _ => number(hour),
        };
        // Day 0 of the epoch was a Thursday; the clock counts from Sunday = 1.
        let weekday = (days_from_civil(year, month, day) + 4).rem_euclid(7) as u8 + 1;
        let (century, year) = ((year / 100) as u8, (year % 100) as u8);
        let rest = [weekday, number(day), number(month), number(year), number(century)];
        let [weekday, day, month, year, century] = rest;
        [
            number(second),
            number(minute),
            hour,
            weekday,
            day,
            month,
            year,
            century,
        ]
    }

    /// None if this is no date. The weekday is not looked at.
    pub(super) fn from_registers(registers: &[u8; REGISTERS.len()], b: u8) -> Option<Self> {
        let number = |value: u8| match b & B_BINARY {
            0 if value >> 4 > 9 || value & 15 > 9 => None,
            0 => Some((value >> 4) * 10 + (value & 15)),
            _ => Some(value),
        };
        let [second, minute, hour, _, day, month, year, century] = *registers;
        let hour = match b & B_24_HOURS {
            0 => {
                let twelve = number(hour & !AFTERNOON).filter(|hour| (1..=12).contains(hour))?;
                twelve % 12 + if hour & AFTERNOON != 0 { 12 } else { 0 }
            }
            _ => number(hour)?,
        };
        let (century, year) = (number(century)?, number(year)?);
        let date = Self {
            year: i64::from(century) * 100 + i64::from(year),
            month: number(month)?,
            day: number(day)?,
            hour,
            minute: number(minute)?,
            second: number(second)?,
        };
        let fits = century < 100
            && year < 100
            && (1..=12).contains(&date.month)
            && (1..=31).contains(&date.day)
            && date.hour < 24
            && date.minute < 60
            && date.second < 60;
        // 31 February would come back as another date.
        (fits && Self::from_seconds(date.seconds_since_epoch()) == date).then_some(date)
    }
}

/// Days since 1970-01-01 to a date, counting years from March so that the leap day comes last.
fn civil_from_days(days: i64) -> (i64, u8, u8) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    } as u8;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn days_from_civil(year: i64, month: u8, day: u8) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (i64::from(month) + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(day) - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        for (seconds, year, month, day) in [
            (0, 1970, 1, 1),
            (951_782_400, 2000, 2, 29),
            (FIRST, 0, 1, 1),
            (LAST, 9999, 12, 31),
        ] {
            let date = Calendar::from_seconds(seconds);
            assert_eq!((date.year, date.month, date.day), (year, month, day));
        }
    }

    proptest! {
        #[test]
        fn every_second_survives_the_registers_in_every_mode(seconds in FIRST..=LAST, mode in 0..4u8) {
            let date = Calendar::from_seconds(seconds);
            let b = mode << 1;
            prop_assert_eq!(date.seconds_since_epoch(), seconds);
            prop_assert_eq!(Calendar::from_registers(&date.to_registers(b), b), Some(date));
        }

        #[test]
        fn any_registers_are_a_date_or_nothing(registers in any::<[u8; 8]>(), b in any::<u8>()) {
            if let Some(date) = Calendar::from_registers(&registers, b) {
                let again = Calendar::from_registers(&date.to_registers(b), b);
                prop_assert_eq!(again, Some(date));
            }
        }
    }
}
