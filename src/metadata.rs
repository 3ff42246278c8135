//! `--metadata` and `--mmds-size-limit`: what the guest's metadata service begins with.

use crate::Failure;
use crate::cli::RunArgs;
use husk_config::{MmdsConfig, VmConfig};
use husk_mmds::{DEFAULT_LIMIT, Mmds};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// No file with JSON that would fit is longer, spaces and all.
const MOST_BYTES: u64 = 64 << 20;

/// The store, with what the command line gives. Unless `config` says how the guest reaches it, that is through the first
/// network interface, by version 1, which takes requests with a session token and without.
pub fn store(arguments: &RunArgs, config: &mut VmConfig) -> Result<Arc<Mmds>, Failure> {
    let mmds = Mmds::new(arguments.mmds_size_limit.unwrap_or(DEFAULT_LIMIT));
    let Some(path) = &arguments.metadata else {
        return Ok(mmds);
    };
    fill(&mmds, path).map_err(|why| {
        Failure::usage(format!(
            "--metadata {} cannot be used: {why}",
            path.display()
        ))
    })?;
    if config.mmds_config.is_none() {
        let first = config.network_interfaces.first().ok_or_else(|| {
            Failure::usage("--metadata needs a network interface that leads to it: add --net")
        })?;
        config.mmds_config = Some(MmdsConfig::new([&first.iface_id]));
    }
    Ok(mmds)
}

/// Put the JSON of the file at `path` into the store; why not, if not.
pub fn fill(mmds: &Mmds, path: &Path) -> Result<(), String> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut text))
        .map_err(|e| e.to_string())?;
    if text.len() as u64 > MOST_BYTES {
        return Err("it is larger than 64 MiB; is it the right file?".into());
    }
    let value = serde_json::from_slice(&text).map_err(|e| format!("it is no JSON: {e}"))?;
    mmds.put(value)
        .map_err(|_| "it is larger than --mmds-size-limit allows".into())
}
