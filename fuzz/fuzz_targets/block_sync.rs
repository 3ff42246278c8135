//! A disk whose requests are made one by one.
#![no_main]

use husk_fuzz::block::{Host, Request, Sync};
use husk_fuzz::guest::{Program, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: Program<Request, Host>| run::<Sync>(program));
