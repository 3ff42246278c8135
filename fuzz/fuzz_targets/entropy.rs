//! The entropy device.
#![no_main]

use husk_fuzz::entropy::{Entropy, Host, Request};
use husk_fuzz::guest::{Program, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: Program<Request, Host>| run::<Entropy>(program));
