//! `husk serve`: a VM that is configured and steered over a socket.

use crate::Failure;
use crate::cli::ServeArgs;
use crate::run::{filters, identity};
use crate::session::{First, Options, Session};
use crate::socket::ApiSocket;
use husk_config::VmConfig;
use husk_mmds::Mmds;
use std::time::Instant;

/// Memory of a VM whose client does not say, in MiB. As Firecracker's.
const MEMORY_MIB: u64 = 128;

/// Serve until the VM has ended. The exit status, unless something failed.
pub fn serve(arguments: &ServeArgs, start: Instant) -> Result<u8, Failure> {
    let mut config = VmConfig {
        pci: arguments.pci,
        // For SendCtrlAltDel.
        keyboard: true,
        ..VmConfig::default()
    };
    config.machine_config.mem_size_mib = MEMORY_MIB;
    let filters = filters(&arguments.seccomp)?;
    let options = Options {
        user_networks: arguments.user_networks,
        mmds: Mmds::new(arguments.mmds_size_limit.unwrap_or(arguments.max_payload)),
        api: Some(ApiSocket {
            path: arguments.api_sock.clone(),
            max_body: arguments.max_payload,
            tidy: true,
        }),
        ..Options::new(start, filters, identity(&arguments.id))
    };
    Session::go(options, First::Serve(Box::new(config)))
}
