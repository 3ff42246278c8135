//! The vsock device.
#![no_main]

use husk_fuzz::guest::{Program, run};
use husk_fuzz::vsock::{Host, Request, Vsock};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: Program<Request, Host>| run::<Vsock>(program));
