//! Taking values out of bytes that nobody vouches for: a value or a typed error, never an index, never an
//! allocation that the peer sizes.

/// The bytes are not what they should be; `what` names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the message ends before its {0}")]
    Short(&'static str),
    #[error("the message goes on after its end by {0} bytes")]
    Long(usize),
    #[error("the {what} is {got}, and at most {most} is allowed")]
    TooMuch { what: &'static str, got: u64, most: u64 },
    #[error("the {what} has the unknown value {got}")]
    Unknown { what: &'static str, got: u64 },
    #[error("the {0} is not text")]
    NotText(&'static str),
    #[error("the {0} does not match its checksum")]
    Checksum(&'static str),
}

pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(crate) fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(Malformed::Short(what))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::Short(what))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, Malformed> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            got => Err(Malformed::Unknown {
                what,
                got: u64::from(got),
            }),
        }
    }

    /// A count that was checked against its limit and against what can still follow (`each` bytes apiece).
    pub(crate) fn count(&mut self, most: usize, each: usize, what: &'static str) -> Result<usize, Malformed> {
        let count = self.u32(what)? as usize;
        if count > most {
            return Err(Malformed::TooMuch {
                what,
                got: count as u64,
                most: most as u64,
            });
        }
        if count.saturating_mul(each) > self.rest.len() {
            return Err(Malformed::Short(what));
        }
        Ok(count)
    }

    pub(crate) fn bytes(&mut self, most: usize, what: &'static str) -> Result<Vec<u8>, Malformed> {
        let count = self.count(most, 1, what)?;
        Ok(self.take(count, what)?.to_vec())
    }

    pub(crate) fn text(&mut self, most: usize, what: &'static str) -> Result<String, Malformed> {
        String::from_utf8(self.bytes(most, what)?).map_err(|_| Malformed::NotText(what))
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Malformed::Long(self.rest.len()))
        }
    }
}

/// The other direction; it cannot fail. Text longer than its limit is cut, at a character.
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Writer {
            bytes: Vec::with_capacity(256),
        }
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn flag(&mut self, value: bool) -> &mut Self {
        self.u8(u8::from(value))
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32).raw(bytes)
    }

    pub(crate) fn text(&mut self, text: &str, most: usize) -> &mut Self {
        let mut end = text.len().min(most);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&text.as_bytes()[..end])
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}
