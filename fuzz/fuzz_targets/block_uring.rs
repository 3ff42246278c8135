//! A disk with io_uring.
#![no_main]

use husk_fuzz::block::{Host, Request, Uring};
use husk_fuzz::guest::{Program, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|program: Program<Request, Host>| run::<Uring>(program));
