//! Devices that are loaded from a state which somebody has changed.
#![no_main]

use husk_fuzz::net::prepare;
use husk_fuzz::saved::{Input, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: prepare(), |input: Input| run(input));
