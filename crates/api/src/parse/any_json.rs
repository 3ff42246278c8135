//! Arbitrary JSON, for property tests here and, included by its path, of the whole program.

use proptest::prelude::*;
use serde_json::Value;

/// Any JSON with texts that match `text`, not deeper than `depth`, of about `size` values, at most `width` of them in one.
pub fn any_json(
    text: &'static str,
    (depth, size, width): (u32, u32, usize),
) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(depth, size, width as u32, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..width).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..width)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}
