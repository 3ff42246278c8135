//! Changes of JSON that was sound: what is made up has nothing that is looked at.

use crate::bytes::{Bytes, Few};
use arbitrary::Arbitrary;
use serde_json::Value;

/// One place becomes something else.
#[derive(Clone, Debug, Arbitrary)]
pub struct Change {
    /// On the way from the root: which field or element, modulo how many there are. It ends at a leaf, or where this does.
    path: Few<u16, 8>,
    how: How,
}

#[derive(Clone, Debug, Arbitrary)]
enum How {
    Number(Interesting),
    /// A little more, or less.
    Add(i8),
    Bit(u8),
    Bool(bool),
    Null,
    Text(Bytes),
    /// A part of a text, or the elements from one on, are others.
    Splice {
        at: u16,
        out: u8,
        bytes: Bytes,
    },
    /// A list has fewer elements, or those that it has so often.
    Shorten(u16),
    Repeat(u8),
    Clear,
    /// A field or an element goes.
    Remove(u16),
    /// A new field with this name, or an element.
    Insert(Bytes, Interesting),
    /// What lies on another way.
    Copy(Few<u16, 8>),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Interesting {
    Small(u8),
    Any(u64),
    /// A power of two, and a little more or less.
    Near {
        bit: u8,
        off: i8,
    },
    Negative(i64),
    Float(f64),
}

impl Interesting {
    fn value(self) -> Value {
        match self {
            Interesting::Small(number) => number.into(),
            Interesting::Any(number) => number.into(),
            Interesting::Near { bit, off } => {
                (1u64 << (bit % 64)).wrapping_add_signed(off.into()).into()
            }
            Interesting::Negative(number) => number.into(),
            Interesting::Float(number) => number.into(),
        }
    }
}

/// Where a way ends.
fn find<'a>(mut at: &'a mut Value, path: &[u16]) -> &'a mut Value {
    for &step in path {
        let count = match at {
            Value::Array(all) => all.len(),
            Value::Object(all) => all.len(),
            _ => 0,
        };
        if count == 0 {
            break;
        }
        let step = usize::from(step) % count;
        at = match at {
            Value::Array(all) => &mut all[step],
            Value::Object(all) => all.values_mut().nth(step).expect("one of them"),
            _ => break,
        };
    }
    at
}

/// Make the changes, one after the other.
pub fn change(root: &mut Value, changes: &[Change]) {
    for Change { path, how } in changes {
        let other = match how {
            How::Copy(path) => find(root, &path.0).clone(),
            _ => Value::Null,
        };
        apply(find(root, &path.0), how, other);
    }
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(&bytes.0).into_owned()
}

fn apply(at: &mut Value, how: &How, other: Value) {
    match (how, at) {
        (How::Number(number), at) => *at = number.value(),
        (How::Add(more), Value::Number(number)) => {
            let old = number.as_u64().unwrap_or(0);
            *number = old.wrapping_add_signed((*more).into()).into();
        }
        (How::Bit(bit), Value::Number(number)) => {
            *number = (number.as_u64().unwrap_or(0) ^ 1 << (bit % 64)).into();
        }
        (How::Bool(value), at) => *at = (*value).into(),
        (How::Null, at) => *at = Value::Null,
        (How::Text(bytes), at) => *at = text(bytes).into(),
        (How::Splice { at, out, bytes }, Value::String(old)) => {
            let mut all = std::mem::take(old).into_bytes();
            let start = usize::from(*at) % (all.len() + 1);
            let end = (start + usize::from(*out)).min(all.len());
            all.splice(start..end, bytes.0.iter().copied());
            *old = String::from_utf8_lossy(&all).into_owned();
        }
        (How::Splice { at, out, bytes }, Value::Array(all)) => {
            let start = usize::from(*at) % (all.len() + 1);
            let end = (start + usize::from(*out)).min(all.len());
            all.splice(start..end, bytes.0.iter().map(|&byte| byte.into()));
        }
        (How::Shorten(length), Value::Array(all)) => all.truncate((*length).into()),
        // As much as one input may take.
        (How::Repeat(times), Value::Array(all)) if all.len() < 10_000 => {
            let count = all.len() * usize::from(*times);
            *all = all.iter().cycle().take(count).cloned().collect();
        }
        (How::Repeat(times), Value::String(all)) if all.len() < 100_000 => {
            *all = all.repeat(usize::from(*times));
        }
        (How::Clear, Value::Array(all)) => all.clear(),
        (How::Clear, Value::Object(all)) => all.clear(),
        (How::Clear, Value::String(all)) => all.clear(),
        (How::Remove(which), Value::Array(all)) if !all.is_empty() => {
            all.remove(usize::from(*which) % all.len());
        }
        (How::Remove(which), Value::Object(all)) if !all.is_empty() => {
            let key = all.keys().nth(usize::from(*which) % all.len()).cloned();
            all.remove(&key.expect("one of them"));
        }
        (How::Insert(_, number), Value::Array(all)) => all.push(number.value()),
        (How::Insert(name, number), Value::Object(all)) => {
            all.insert(text(name), number.value());
        }
        (How::Copy(_), at) => *at = other,
        _ => {}
    }
}
