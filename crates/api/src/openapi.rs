//! The description of this API.

/// OpenAPI 3.1, in JSON.
pub const DOCUMENT: &str = include_str!("../../../resources/openapi.json");
