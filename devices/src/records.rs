//! The list of state records as bytes, and its reader that lets no required record go unread.
//!
//! Layout, little endian: magic, count u32, then for each record: payload length u32, payload, crc32c of the
//! payload u32. Payload: name length u16, name, instance u32, version u32, flags u8, body to the end.

use std::collections::BTreeMap;

use crate::state::{Record, RecordKey, StateError, Stateful};

const MAGIC: &[u8; 8] = b"FERRYST1";
const FLAG_REQUIRED: u8 = 1;
/// Limits on what a reader accepts. A machine has some dozens of records of some kilobytes.
pub const MAX_RECORDS: u32 = 4096;
pub const MAX_NAME_LEN: usize = 64;
pub const MAX_BODY_LEN: usize = 16 << 20;
/// Name length, instance, version and flags.
const PAYLOAD_HEAD: usize = 2 + 4 + 4 + 1;

/// Writes the list. Fails where the reader would refuse, so that the error comes before the crossing.
pub fn encode(records: &[Record]) -> Result<Vec<u8>, StateError> {
    let count = u32::try_from(records.len())
        .ok()
        .filter(|count| *count <= MAX_RECORDS)
        .ok_or_else(|| {
            damaged(format!(
                "it would have {} records, more than {MAX_RECORDS}",
                records.len()
            ))
        })?;
    let mut keys = BTreeMap::new();
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&count.to_le_bytes());
    for record in records {
        let Record {
            name,
            instance,
            version,
            required,
            body,
        } = record;
        check_lengths(name, body.len())?;
        if keys.insert((name, instance), ()).is_some() {
            return Err(damaged(format!("it would have {name} {instance} twice")));
        }
        let start = out.len() + 4;
        // Both lengths were checked just now.
        out.extend_from_slice(&((PAYLOAD_HEAD + name.len() + body.len()) as u32).to_le_bytes());
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&instance.to_le_bytes());
        out.extend_from_slice(&version.to_le_bytes());
        out.push(if *required { FLAG_REQUIRED } else { 0 });
        out.extend_from_slice(body);
        let crc = crc32c::crc32c(out.get(start..).unwrap_or_default());
        out.extend_from_slice(&crc.to_le_bytes());
    }
    Ok(out)
}

/// Reads the list. Allocates no more than the bytes that are there.
pub fn decode(bytes: &[u8]) -> Result<Vec<Record>, StateError> {
    let mut rest = Cursor { bytes };
    if rest.take(MAGIC.len(), "its first bytes")? != MAGIC {
        return Err(damaged(
            "it does not start as a list of state records does".to_owned(),
        ));
    }
    let count = rest.u32("the number of records")?;
    if count > MAX_RECORDS {
        return Err(damaged(format!(
            "it claims {count} records, more than {MAX_RECORDS}"
        )));
    }
    let mut records: Vec<Record> = Vec::new();
    let mut keys = BTreeMap::new();
    for index in 0..count {
        let len = rest.u32("a record's length")? as usize;
        let payload = rest.take(len, "a record")?;
        if rest.u32("a record's checksum")? != crc32c::crc32c(payload) {
            return Err(damaged(format!("the checksum of record {index} is wrong")));
        }
        let record = decode_payload(payload)?;
        if keys
            .insert(RecordKey::new(record.name.clone(), record.instance), ())
            .is_some()
        {
            return Err(damaged(format!(
                "it has {} {} twice",
                record.name, record.instance
            )));
        }
        records.push(record);
    }
    if !rest.bytes.is_empty() {
        return Err(damaged(format!(
            "{} bytes are left over at its end",
            rest.bytes.len()
        )));
    }
    Ok(records)
}

fn decode_payload(payload: &[u8]) -> Result<Record, StateError> {
    let mut rest = Cursor { bytes: payload };
    let name_len = usize::from(rest.u16("a name's length")?);
    let name = std::str::from_utf8(rest.take(name_len, "a name")?)
        .map_err(|_| damaged("a record's name is no text".to_owned()))?
        .to_owned();
    let instance = rest.u32("an instance")?;
    let version = rest.u32("a version")?;
    let flags = rest.take(1, "flags")?;
    let required = match flags {
        [0] => false,
        [FLAG_REQUIRED] => true,
        _ => {
            return Err(damaged(format!(
                "record {name} {instance} has flags this program does not know"
            )));
        }
    };
    check_lengths(&name, rest.bytes.len())?;
    Ok(Record {
        name,
        instance,
        version,
        required,
        body: rest.bytes.to_vec(),
    })
}

fn check_lengths(name: &str, body_len: usize) -> Result<(), StateError> {
    if name.is_empty() || name.len() > MAX_NAME_LEN {
        return Err(damaged(format!(
            "a record's name has {} bytes instead of 1 to {MAX_NAME_LEN}",
            name.len()
        )));
    }
    if body_len > MAX_BODY_LEN {
        return Err(damaged(format!(
            "record {name} has {body_len} bytes, more than {MAX_BODY_LEN}"
        )));
    }
    Ok(())
}

fn damaged(what: String) -> StateError {
    StateError::Damaged(what)
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], StateError> {
        let (head, tail) = self
            .bytes
            .split_at_checked(len)
            .ok_or_else(|| damaged(format!("it ends in the middle of {what}")))?;
        self.bytes = tail;
        Ok(head)
    }

    fn u16(&mut self, what: &str) -> Result<u16, StateError> {
        let bytes = self.take(2, what)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u16::from(*byte)))
    }

    fn u32(&mut self, what: &str) -> Result<u32, StateError> {
        let bytes = self.take(4, what)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }
}

/// Hands records to the devices that want them and refuses at the end if a required one is left.
#[derive(Debug)]
pub struct RecordReader {
    records: BTreeMap<RecordKey, Record>,
}

impl RecordReader {
    pub fn new(records: Vec<Record>) -> Self {
        let keyed = records
            .into_iter()
            .map(|record| (RecordKey::new(record.name.clone(), record.instance), record));
        Self {
            records: keyed.collect(),
        }
    }

    /// The record of this key, which must be there.
    pub fn take(&mut self, key: &RecordKey) -> Result<Record, StateError> {
        self.take_optional(key).ok_or_else(|| StateError::Missing {
            name: key.name.clone(),
            instance: key.instance,
        })
    }

    /// The record of this key, if it is there.
    pub fn take_optional(&mut self, key: &RecordKey) -> Option<Record> {
        self.records.remove(key)
    }

    /// Takes a device's record and puts it into the device.
    pub fn restore(&mut self, device: &dyn Stateful) -> Result<(), StateError> {
        let record = self.take(&device.key())?;
        device.restore(&record)
    }

    /// Every required record must have been taken by now; the others are named in the log.
    pub fn finish(self) -> Result<(), StateError> {
        for record in self.records.into_values() {
            let Record {
                name,
                instance,
                required,
                ..
            } = record;
            if required {
                return Err(StateError::Unknown { name, instance });
            }
            tracing::info!(
                "the state has an optional record {name} {instance} that this machine does not use"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(name: &str, instance: u32, required: bool) -> Record {
        Record {
            name: name.to_owned(),
            instance,
            version: 3,
            required,
            body: vec![1, 2, 3],
        }
    }

    fn any_records() -> impl Strategy<Value = Vec<Record>> {
        let body = proptest::collection::vec(any::<u8>(), 0..300);
        let one = ("[a-z0-9-]{1,64}", any::<u32>(), any::<u32>(), any::<bool>(), body);
        proptest::collection::vec(one, 0..20).prop_map(|list| {
            let unique: BTreeMap<_, _> = list
                .into_iter()
                .map(|(name, instance, version, required, body)| {
                    (
                        (name.clone(), instance),
                        Record {
                            name,
                            instance,
                            version,
                            required,
                            body,
                        },
                    )
                })
                .collect();
            unique.into_values().collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(records in any_records()) {
            prop_assert_eq!(decode(&encode(&records).unwrap()).unwrap(), records);
        }

        #[test]
        fn a_cut_anywhere_is_noticed(records in any_records(), cut in any::<prop::sample::Index>()) {
            let bytes = encode(&records).unwrap();
            prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
        }

        #[test]
        fn a_changed_bit_is_noticed(records in any_records(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = encode(&records).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn garbage_is_refused_without_panic(tail in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&tail);
            let mut bytes = MAGIC.to_vec();
            bytes.extend(tail);
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn lengths_that_lie_allocate_nothing() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u32::MAX.to_le_bytes());
        assert!(
            decode(&bytes)
                .unwrap_err()
                .to_string()
                .contains("4294967295 records")
        );
        let mut bytes = MAGIC.to_vec();
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(u32::MAX.to_le_bytes());
        assert!(
            decode(&bytes)
                .unwrap_err()
                .to_string()
                .contains("ends in the middle")
        );
    }

    #[test]
    fn a_second_record_of_one_key_is_refused_by_writer_and_reader() {
        let twice = [record("rtc", 0, true), record("rtc", 0, true)];
        assert!(encode(&twice).unwrap_err().to_string().contains("rtc 0 twice"));
        let mut one = encode(&twice[..1]).unwrap();
        let payload = one[12..].to_vec();
        one.extend(payload);
        one[8] = 2;
        assert!(decode(&one).unwrap_err().to_string().contains("rtc 0 twice"));
    }

    #[test]
    fn an_unknown_required_record_is_refused_by_name_and_an_optional_one_is_not() {
        let mut reader = RecordReader::new(vec![
            record("rtc", 0, true),
            record("gpu", 7, true),
            record("hint", 0, false),
        ]);
        reader.take(&RecordKey::new("rtc", 0)).unwrap();
        let refusal = reader.finish().unwrap_err();
        assert_eq!(
            refusal,
            StateError::Unknown {
                name: "gpu".to_owned(),
                instance: 7
            }
        );
        assert!(refusal.to_string().contains("gpu 7"));
        RecordReader::new(vec![record("hint", 0, false)])
            .finish()
            .unwrap();
    }

    #[test]
    fn a_missing_record_is_named() {
        let refusal = RecordReader::new(Vec::new())
            .take(&RecordKey::new("rtc", 0))
            .unwrap_err();
        assert!(refusal.to_string().contains("rtc 0"));
    }

    #[test]
    fn names_and_bodies_too_long_are_refused_before_they_travel() {
        assert!(encode(&[record(&"x".repeat(65), 0, true)]).is_err());
        assert!(encode(&[record("", 0, true)]).is_err());
        let big = Record {
            body: vec![0; MAX_BODY_LEN + 1],
            ..record("big", 0, true)
        };
        assert!(encode(&[big]).is_err());
    }
}
