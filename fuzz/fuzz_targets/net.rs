//! A network interface.
#![no_main]

use husk_fuzz::guest::{Program, run};
use husk_fuzz::net::{Host, Net, Request, prepare};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: prepare(),
    |program: Program<Request, Host>| run::<Net>(program)
);
