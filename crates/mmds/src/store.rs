//! What the host has stored.

use serde_json::{Map, Value};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that the store holds unless something else is asked for. Firecracker's default.
pub const DEFAULT_LIMIT: usize = 51_200;

/// Why the store does not change. The texts are Firecracker's, which its clients may look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was ever put.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// The result would be larger than the limit; 413 over the API.
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
}

/// The data store of one monitor: any JSON. Requests change it on one thread while guests read it on others.
#[derive(Debug)]
pub struct Mmds {
    limit: usize,
    /// None until the first put. Replaced as a whole, so that a reader holds the lock for a moment only, and sees all of a
    /// change or nothing of it.
    value: Mutex<Option<Arc<Value>>>,
}

impl Mmds {
    /// An empty store that takes up to `limit` bytes of JSON, as it is written without spaces.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            value: Mutex::new(None),
        })
    }

    /// How many bytes it takes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Replace everything. An error changes nothing.
    pub fn put(&self, value: Value) -> Result<(), StoreError> {
        self.check(&value)?;
        *self.lock() = Some(Arc::new(value));
        Ok(())
    }

    /// Change it by a JSON merge patch (RFC 7396). An error changes nothing.
    pub fn patch(&self, patch: Value) -> Result<(), StoreError> {
        let mut stored = self.lock();
        let before = stored.as_ref().ok_or(StoreError::NotInitialized)?;
        let mut after = Value::clone(before);
        merge(&mut after, patch);
        self.check(&after)?;
        *stored = Some(Arc::new(after));
        Ok(())
    }

    /// What is stored; `{}` when nothing is.
    pub fn get(&self) -> Value {
        match self.snapshot().as_deref() {
            None | Some(Value::Null) => Value::Object(Map::new()),
            Some(value) => value.clone(),
        }
    }

    /// What is stored now. None before the first put.
    pub(crate) fn snapshot(&self) -> Option<Arc<Value>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Value>>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, value: &Value) -> Result<(), StoreError> {
        // Counts, and ends when there is no more room: what is too large is never written anywhere.
        serde_json::to_writer(Room(self.limit), value).map_err(|_| StoreError::TooLarge)
    }
}

/// As many bytes as may still be written.
struct Room(usize);

impl std::io::Write for Room {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let left = self.0.checked_sub(data.len());
        self.0 = left.ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// RFC 7396, 2. It goes as deep as `patch` does, which a parser has bounded.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return;
    };
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(&key)),
            value => merge(target.entry(key).or_insert(Value::Null), value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_patch_does_what_the_rfc_says() {
        // Appendix A.
        for (before, patch, after) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, "{}"),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (
                r#"{"a":{"b":"c"}}"#,
                r#"{"a":{"b":"d","c":null}}"#,
                r#"{"a":{"b":"d"}}"#,
            ),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"a":"foo"}"#, "null", "null"),
            (r#"{"a":"foo"}"#, r#""bar""#, r#""bar""#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            ("[1,2]", r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            ("{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            let parse = |text| serde_json::from_str::<Value>(text).unwrap();
            let mut target = parse(before);
            merge(&mut target, parse(patch));
            assert_eq!(target, parse(after), "{before} by {patch}");
        }
    }

    #[test]
    fn a_patch_needs_something_to_change() {
        let mmds = Mmds::new(DEFAULT_LIMIT);
        assert_eq!(mmds.get(), json!({}));
        let error = mmds.patch(json!({"a": 1})).unwrap_err();
        assert_eq!(error.to_string(), "The MMDS data store is not initialized.");
        assert_eq!(mmds.get(), json!({}));
        mmds.put(json!({})).unwrap();
        mmds.patch(json!({"a": 1})).unwrap();
        assert_eq!(mmds.get(), json!({"a": 1}));
        mmds.put(json!(["b"])).unwrap();
        assert_eq!(mmds.get(), json!(["b"]));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let small = json!({"a": "12345678"});
        let mmds = Mmds::new(small.to_string().len());
        mmds.put(small.clone()).unwrap();
        assert_eq!(
            mmds.put(json!({"a": "123456789"})),
            Err(StoreError::TooLarge)
        );
        assert_eq!(mmds.patch(json!({"b": 1})), Err(StoreError::TooLarge));
        assert_eq!(mmds.get(), small);
        mmds.patch(json!({"a": null, "b": "12345678"})).unwrap();
        // Bytes count, not characters.
        assert_eq!(
            mmds.patch(json!({"b": "1234567ä"})),
            Err(StoreError::TooLarge)
        );
    }
}
