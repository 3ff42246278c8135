//! `husk api`, `pause`, `resume`, `stop` and `info`: requests to a VM that has an API socket, from the shell.

use crate::Failure;
use crate::cli::{ApiArgs, SocketArgs};
use husk_api::client::{self, Response};
use std::io::{Read, Write};
use std::path::Path;

/// Most bytes of a body from stdin: more than any server takes.
const MOST_BODY: u64 = 16 << 20;
/// How often `stop` looks whether the socket is still answered, and how often in all.
const LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// `husk api METHOD PATH [BODY]`. What comes back goes to stdout as it comes, JSON in a readable form.
pub fn api(arguments: &ApiArgs) -> Result<u8, Failure> {
    let body = match arguments.body.as_deref() {
        Some("-") => {
            let mut body = String::new();
            let read = std::io::stdin().take(MOST_BODY).read_to_string(&mut body);
            read.map_err(|e| Failure::usage(format!("cannot read the body from stdin: {e}")))?;
            body
        }
        Some(body) => body.to_owned(),
        None => String::new(),
    };
    let path = arguments.path.as_str();
    if path.split('?').next() == Some("/husk/events") {
        // It never ends by itself.
        let mut broken = None;
        let socket = &arguments.socket.api_sock;
        let status = client::stream(socket, &arguments.method, path, &body, |piece| {
            let mut stdout = std::io::stdout().lock();
            if let Err(e) = stdout.write_all(piece).and_then(|()| stdout.flush()) {
                broken.get_or_insert(e);
            }
            broken.is_none()
        });
        let status = status.map_err(|e| Failure::host(husk_vmm::chain(&e)))?;
        return Ok(u8::from(!(200..300).contains(&status)));
    }
    let response = send(&arguments.socket.api_sock, &arguments.method, path, &body)?;
    print_answer(&response)
}

/// Let the guest stand still, or run again.
pub fn set_state(socket: &SocketArgs, state: &str) -> Result<u8, Failure> {
    let body = format!(r#"{{"state":"{state}"}}"#);
    let response = send(&socket.api_sock, "PATCH", "/vm", &body)?;
    print_answer(&response)
}

/// What the VM is and does.
pub fn info(socket: &SocketArgs) -> Result<u8, Failure> {
    let response = send(&socket.api_sock, "GET", "/", "")?;
    print_answer(&response)
}

/// End the VM: at once, or by its power button. Returns when its process has let go of the socket.
pub fn stop(socket: &SocketArgs, power_button: bool) -> Result<u8, Failure> {
    let action = match power_button {
        true => "PressPowerButton",
        false => "Stop",
    };
    let body = format!(r#"{{"action_type":"{action}"}}"#);
    let response = send(&socket.api_sock, "PUT", "/husk/actions", &body)?;
    let status = print_answer(&response)?;
    while status == 0 && std::os::unix::net::UnixStream::connect(&socket.api_sock).is_ok() {
        std::thread::sleep(LOOK);
    }
    Ok(status)
}

/// Ask the VM at `socket`.
pub fn send(socket: &Path, method: &str, path: &str, body: &str) -> Result<Response, Failure> {
    client::request(socket, method, path, body).map_err(|e| Failure::host(husk_vmm::chain(&e)))
}

/// Success to stdout, a refusal to stderr. The exit status.
pub fn print_answer(response: &Response) -> Result<u8, Failure> {
    if !response.is_success() {
        let fault = response.fault().unwrap_or_else(|| response.body.clone());
        return Err(Failure::host(format!("{fault} (HTTP {})", response.status)));
    }
    let mut text = match serde_json::from_slice::<serde_json::Value>(response.body.as_bytes()) {
        Ok(value) => serde_json::to_string_pretty(&value).unwrap_or_default(),
        Err(_) => response.body.trim_end().to_owned(),
    };
    if !text.is_empty() {
        text.push('\n');
        crate::print(text.as_bytes())?;
    }
    Ok(0)
}
