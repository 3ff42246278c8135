//! A request to the API: a method, a path and a body, of which anything is a client's.
//!
//! An input is text: the method, a space, the path, a line feed, the body.
#![no_main]

use husk_api::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let end = input.iter().position(|&byte| byte == b'\n');
    let (line, body) = match end {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[][..]),
    };
    let Ok(line) = std::str::from_utf8(line) else {
        return;
    };
    let (method, path) = line.split_once(' ').unwrap_or((line, ""));
    match parse(method, path, body) {
        // What goes to the log and to the monitor.
        Ok(parsed) => {
            let said = format!("{parsed:?}");
            let again = parse(method, path, body).expect("it was understood before");
            assert_eq!(said, format!("{again:?}"), "a request means one thing");
        }
        // What goes back to the client.
        Err(refused) => assert!(!refused.to_string().is_empty()),
    }
});
