//! The description of this API. It is generated from the types, by a test (`generate.rs`), and checked in.

/// OpenAPI 3.1, in JSON.
pub const DOCUMENT: &str = include_str!(concat!(env!("OUT_DIR"), "/openapi.json"));

#[cfg(test)]
mod generate;
#[cfg(test)]
pub(crate) mod routes;
