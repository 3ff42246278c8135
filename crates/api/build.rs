//! The description of the API, without the white space that people need.

use std::path::Path;

fn main() {
    let source = "../../resources/openapi.json";
    println!("cargo::rerun-if-changed={source}");
    let text = std::fs::read_to_string(source).expect("resources/openapi.json is there");
    let document: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let folder = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let target = Path::new(&folder).join("openapi.json");
    std::fs::write(target, document.to_string()).expect("OUT_DIR can be written");
}
