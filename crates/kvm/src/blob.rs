//! Structures of KVM's as text.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The bytes of one of KVM's structures, or of several of one kind; in hexadecimal when serialised.
///
/// One type for all of them, so that there is one piece of code that reads and writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob(Vec<u8>);

impl Blob {
    pub fn of<T: IntoBytes + Immutable + ?Sized>(value: &T) -> Self {
        Self(value.as_bytes().to_vec())
    }

    /// The structure. What was not told when it was shorter is zero; what it does not have any more is left out.
    pub fn to<T: FromBytes + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        copy(&self.0, value.as_mut_bytes());
        value
    }

    /// All of them.
    pub fn to_all<T: FromBytes + IntoBytes>(&self) -> Vec<T> {
        let parts = self.0.chunks(size_of::<T>().max(1));
        let one = |bytes| {
            let mut value = T::new_zeroed();
            copy(bytes, value.as_mut_bytes());
            value
        };
        parts.map(one).collect()
    }
}

fn copy(from: &[u8], to: &mut [u8]) {
    let length = from.len().min(to.len());
    if let (Some(from), Some(to)) = (from.get(..length), to.get_mut(..length)) {
        to.copy_from_slice(from);
    }
}

/// What a character is worth, 16 or more: no digit. Restoring a VM reads tens of thousands of them.
static VALUES: [u8; 256] = {
    let mut values = [u8::MAX; 256];
    let mut digit = 0;
    while digit < 10 {
        values[b'0' as usize + digit] = digit as u8;
        digit += 1;
    }
    while digit < 16 {
        values[b'a' as usize + digit - 10] = digit as u8;
        values[b'A' as usize + digit - 10] = digit as u8;
        digit += 1;
    }
    values
};

const DIGITS: &[u8; 16] = b"0123456789abcdef";

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |number: u8| char::from(DIGITS[usize::from(number & 15)]);
        let text: String = self
            .0
            .iter()
            .flat_map(|&byte| [digit(byte >> 4), digit(byte)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => {
                let value = |digit: u8| VALUES.get(usize::from(digit)).copied().filter(|v| *v < 16);
                Some(value(*high)? << 4 | value(*low)?)
            }
            _ => None,
        });
        let bytes: Option<Vec<u8>> = pairs.collect();
        bytes
            .map(Self)
            .ok_or_else(|| D::Error::custom("this is not hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_text_and_back() {
        let blob = Blob::of(&[0x00u8, 0x7f, 0xff][..]);
        let text = serde_json::to_string(&blob).unwrap();
        assert_eq!(text, "\"007fff\"");
        assert_eq!(serde_json::from_str::<Blob>(&text).unwrap(), blob);
        for bad in ["\"0\"", "\"zz\"", "1", "\"é\""] {
            assert!(serde_json::from_str::<Blob>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn structures_grow_and_shrink_at_their_end() {
        let blob = Blob::of(&[1u32, 2]);
        assert_eq!(blob.to::<u32>(), 1);
        assert_eq!(blob.to::<[u32; 3]>(), [1, 2, 0]);
        assert_eq!(blob.to_all::<u32>(), [1, 2]);
    }
}
