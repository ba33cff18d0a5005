//! The state of devices as records: a name, an instance, a version and a body of named fields.
//!
//! A list of records travels between hosts and versions, so its reader trusts nothing: lengths are bounded,
//! every record has a checksum, and a record that nobody asked for is refused if it says it is required.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// One device's (or vCPU's, or chip's) saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub name: String,
    pub instance: u32,
    pub version: u32,
    /// A reader that does not know this record must refuse the whole state.
    pub required: bool,
    /// Named-field MessagePack.
    pub body: Vec<u8>,
}

/// Which record a device writes and reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKey {
    pub name: String,
    pub instance: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    #[error("the state of {name} could not be written: {why}")]
    Encode { name: String, why: String },
    #[error("the state of {name} could not be read: {why}")]
    Decode { name: String, why: String },
    #[error(
        "the state of {name} has version {found}, and this program reads up to {known}; use a newer ferry here"
    )]
    Version { name: String, found: u32, known: u32 },
    #[error("the state of {name} does not fit this machine: {why}")]
    Mismatch { name: String, why: String },
    #[error("the state has no record {name} {instance}, which this machine needs")]
    Missing { name: String, instance: u32 },
    #[error(
        "the state has a record {name} {instance} that this machine has no place for; \
        it is required, so the machine cannot continue without it"
    )]
    Unknown { name: String, instance: u32 },
    #[error("the list of state records is damaged: {0}")]
    Damaged(String),
}

/// Something whose state can be saved and put back. No default bodies: nothing may forget.
///
/// Devices are shared with vCPU threads, so restore takes `&self`. Both are called while no vCPU runs.
pub trait Stateful: Send + Sync {
    fn key(&self) -> RecordKey;
    fn save(&self) -> Result<Record, StateError>;
    fn restore(&self, record: &Record) -> Result<(), StateError>;
}

/// Writes a body as named-field MessagePack.
pub fn encode_body<T: Serialize>(name: &str, body: &T) -> Result<Vec<u8>, StateError> {
    rmp_serde::to_vec_named(body).map_err(|error| StateError::Encode {
        name: name.to_owned(),
        why: error.to_string(),
    })
}

/// Reads a body; bytes left over are an error.
pub fn decode_body<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T, StateError> {
    let wrong = |why: String| StateError::Decode {
        name: name.to_owned(),
        why,
    };
    let mut reader = rmp_serde::Deserializer::new(body);
    reader.set_max_depth(32);
    let value = T::deserialize(&mut reader).map_err(|error| wrong(error.to_string()))?;
    if !reader.into_inner().is_empty() {
        return Err(wrong("bytes are left over at its end".to_owned()));
    }
    Ok(value)
}

impl Record {
    /// A record that must be understood by whoever restores.
    pub fn required<T: Serialize>(key: RecordKey, version: u32, body: &T) -> Result<Self, StateError> {
        let RecordKey { name, instance } = key;
        let body = encode_body(&name, body)?;
        Ok(Self {
            name,
            instance,
            version,
            required: true,
            body,
        })
    }

    /// Decodes the body after checking that the record is `key`'s and of a version up to `known`.
    pub fn read<T: DeserializeOwned>(&self, key: &RecordKey, known: u32) -> Result<T, StateError> {
        if self.name != key.name || self.instance != key.instance {
            return Err(StateError::Missing {
                name: key.name.clone(),
                instance: key.instance,
            });
        }
        if self.version > known {
            return Err(StateError::Version {
                name: self.name.clone(),
                found: self.version,
                known,
            });
        }
        decode_body(&self.name, &self.body)
    }
}

impl RecordKey {
    pub fn new(name: impl Into<String>, instance: u32) -> Self {
        Self {
            name: name.into(),
            instance,
        }
    }
}
