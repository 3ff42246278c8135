//! Husk's binary (skeleton).
fn main() {}
