//! One report line: a flat JSON object, composed in place. Pure.

use core::fmt::Write;

pub struct Line {
    bytes: [u8; Line::CAPACITY],
    used: usize,
}

impl Line {
    pub const CAPACITY: usize = 1024;

    pub const fn new() -> Self {
        Line {
            bytes: [0; Line::CAPACITY],
            used: 0,
        }
    }

    /// Closes the object and gives the bytes to send, newline included.
    pub fn finish(&mut self) -> &[u8] {
        if self.used == 0 {
            self.push(b'{');
        }
        self.used = self.used.min(Line::CAPACITY - 2);
        self.push(b'}');
        self.push(b'\n');
        &self.bytes[..self.used]
    }

    pub fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        let _ = write!(self, "{value}");
        self
    }

    pub fn numbers(&mut self, key: &str, values: impl Iterator<Item = u64>) -> &mut Self {
        self.key(key);
        self.push(b'[');
        for (i, value) in values.enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(self, "{comma}{value}");
        }
        self.push(b']');
        self
    }

    pub fn flag(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key);
        let _ = self.write_str(if value { "true" } else { "false" });
        self
    }

    /// Addresses are written as hexadecimal strings, because JSON numbers are not exact above 2^53.
    pub fn hex(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        let _ = write!(self, "\"{value:#x}\"");
        self
    }

    pub fn word(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        self.text(value);
        self
    }

    /// A list of address ranges: `[["0x0","0x1000"],...]`, ends exclusive.
    pub fn ranges(&mut self, key: &str, ranges: &[(u64, u64)]) -> &mut Self {
        self.key(key);
        self.push(b'[');
        for (i, (from, to)) in ranges.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(self, "{comma}[\"{from:#x}\",\"{to:#x}\"]");
        }
        self.push(b']');
        self
    }

    fn key(&mut self, key: &str) {
        self.push(if self.used == 0 { b'{' } else { b',' });
        self.text(key);
        self.push(b':');
    }

    fn text(&mut self, value: &str) {
        self.push(b'"');
        for byte in value.bytes() {
            match byte {
                b'"' | b'\\' => {
                    self.push(b'\\');
                    self.push(byte);
                }
                0x20..=0x7e => self.push(byte),
                _ => self.push(b'?'),
            }
        }
        self.push(b'"');
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.used) {
            *place = byte;
            self.used += 1;
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            self.push(byte);
        }
        Ok(())
    }
}
