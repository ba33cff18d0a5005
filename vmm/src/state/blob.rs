//! KVM's structs as they are, byte by byte. The kernel's ABI fixes their layout, so bytes are the truest form; their
//! length is checked before they are believed.

use std::fmt;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// One KVM struct.
#[derive(Clone, Copy)]
pub struct Blob<T>(pub T);

impl<T: IntoBytes + Immutable> PartialEq for Blob<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: IntoBytes + Immutable> Eq for Blob<T> {}

impl<T: IntoBytes + Immutable> fmt::Debug for Blob<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0x")?;
        self.0
            .as_bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(self.0.as_bytes())
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<T: FromBytes> serde::de::Visitor<'_> for Visitor<T> {
            type Value = Blob<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "exactly {} bytes", size_of::<T>())
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Blob<T>, E> {
                T::read_from_bytes(bytes)
                    .map(Blob)
                    .map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }
        from.deserialize_bytes(Visitor(PhantomData))
    }
}

/// Words of a length that the host decides (XSAVE). Bounded, so that a peer cannot make us allocate more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Words(pub Vec<u32>);

/// Far beyond any processor's XSAVE area (AMX has 8 KiB).
const MAX_WORDS: usize = 64 << 10;

impl Serialize for Words {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(self.0.as_bytes())
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("words of 4 bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Words, E> {
                let (words, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() || words.len() > MAX_WORDS {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Words(
                    words.iter().map(|word| u32::from_le_bytes(*word)).collect(),
                ))
            }
        }
        from.deserialize_bytes(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_devices::state::{decode_body, encode_body};
    use kvm_bindings::kvm_regs;

    #[test]
    fn a_blob_of_another_length_is_refused_not_padded() {
        let regs = Blob(kvm_regs {
            rax: 7,
            rflags: 2,
            ..Default::default()
        });
        let body = encode_body("x", &regs).unwrap();
        assert_eq!(decode_body::<Blob<kvm_regs>>("x", &body).unwrap(), regs);
        for len in [0, 3, size_of::<kvm_regs>() - 1, size_of::<kvm_regs>() + 1, 3000] {
            let wrong = encode_body("x", &Words(vec![0; len.div_ceil(4)])).unwrap();
            if len.div_ceil(4) * 4 != size_of::<kvm_regs>() {
                assert!(decode_body::<Blob<kvm_regs>>("x", &wrong).is_err(), "{len}");
            }
        }
        assert!(decode_body::<Words>("x", &encode_body("x", &Blob([1u8, 2, 3])).unwrap()).is_err());
    }
}
