//! `husk snapshot` and `husk restore`.

use crate::cli::{ForkArgs, RestoreArgs, SnapshotArgs, SnapshotCommand};
use crate::client::{print_answer, send};
use crate::run::{ANONYMOUS, filters, identity};
use crate::session::{First, Options, Session};
use crate::socket::ApiSocket;
use crate::{Failure, print};
use husk_config::{
    DriveOverride, Fork, LoadSnapshot, MemBackend, MemBackendType, NetworkOverride, VsockOverride,
};
use husk_snapshot::{MEMORY, STATE};
use serde_json::{Value, json};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Beside them, where one was recorded.
const WORKING_SET: &str = "working-set";

/// Keep a VM, or tell of one that is kept. The exit status, unless nobody could be asked.
pub fn snapshot(arguments: &SnapshotArgs) -> Result<u8, Failure> {
    match (&arguments.command, &arguments.api_sock, &arguments.dir) {
        (Some(SnapshotCommand::Info { file }), ..) => info(file),
        (Some(SnapshotCommand::Merge { base, diff, output }), ..) => {
            merge(base, diff, output.as_deref())
        }
        (None, Some(socket), Some(dir)) => keep(socket, dir, arguments.diff),
        (None, ..) => Err(Failure::usage("give --api-sock and a directory")),
    }
}

/// The guest stands still meanwhile, and runs afterwards if it did before.
fn keep(socket: &Path, dir: &Path, diff: bool) -> Result<u8, Failure> {
    let fault = |e| Failure::usage(format!("{}: {e}", dir.display()));
    if !dir.is_dir() {
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700).create(dir).map_err(fault)?;
    }
    // The VM's process is somewhere else.
    let dir = std::fs::canonicalize(dir).map_err(fault)?;
    let about = send(socket, "GET", "/", "")?;
    let about: Value = serde_json::from_slice(about.body.as_bytes()).unwrap_or_default();
    let runs = about["state"] == "Running";
    if runs {
        let paused = send(socket, "PATCH", "/vm", r#"{"state":"Paused"}"#)?;
        if paused.status >= 300 {
            return print_answer(&paused);
        }
    }
    let places = json!({
        "snapshot_path": dir.join(STATE),
        "mem_file_path": dir.join(MEMORY),
        "snapshot_type": if diff { "Diff" } else { "Full" },
    });
    let kept = send(socket, "PUT", "/snapshot/create", &places.to_string());
    if runs {
        send(socket, "PATCH", "/vm", r#"{"state":"Resumed"}"#)?;
    }
    print_answer(&kept?)
}

fn merge(base: &Path, diff: &Path, output: Option<&Path>) -> Result<u8, Failure> {
    let merged = husk_snapshot::merge(base, diff, output);
    let merged = merged.map_err(|e| match e {
        husk_snapshot::Error::Write { .. } => Failure::host(husk_vmm::chain(&e)),
        e => Failure::usage(husk_vmm::chain(&e)),
    })?;
    let kind = match merged.is_diff {
        true => "a diff to the base's own base",
        false => "complete",
    };
    let place = output.unwrap_or(base).display();
    print(
        format!(
            "{place}: {} pages were laid over it, it is {kind}\n",
            merged.pages
        )
        .as_bytes(),
    )
}

fn info(file: &Path) -> Result<u8, Failure> {
    let file = match file.is_dir() {
        true => file.join(STATE),
        false => file.to_owned(),
    };
    let told = husk_vmm::describe_snapshot(&file);
    let text = told.map_err(|e| Failure::usage(husk_vmm::chain(&e)))?;
    // Of a stranger's making: nothing in it moves a terminal's cursor.
    let plain: String = text
        .chars()
        .filter(|&c| c == '\n' || !c.is_control())
        .collect();
    print(plain.as_bytes())
}

/// Start clones of a VM. The exit status, unless nobody could be asked.
pub fn fork(arguments: &ForkArgs) -> Result<u8, Failure> {
    let absolute = |path: &Option<PathBuf>| -> Result<Option<PathBuf>, Failure> {
        // The VM's process is somewhere else.
        let absolute = path.as_deref().map(std::path::absolute).transpose();
        absolute.map_err(|e| Failure::usage(e.to_string()))
    };
    let mut drive_overrides: Vec<_> = arguments.disks.iter().map(disk).collect();
    for own in &mut drive_overrides {
        own.path_on_host = absolute(&Some(own.path_on_host.clone()))?.unwrap_or_default();
    }
    let fork = Fork {
        count: arguments.count,
        template: arguments.template.clone(),
        keep_template: arguments.keep_template,
        resume_vm: !arguments.paused,
        id: arguments.id.clone(),
        console: absolute(&arguments.console)?,
        log: absolute(&arguments.clone_log)?,
        api_sock: absolute(&arguments.clone_sock)?,
        network_overrides: arguments.nets.iter().map(tap).collect(),
        drive_overrides,
        vsock_override: vsock(absolute(&arguments.vsock)?, arguments.cid),
    };
    fork.validate().map_err(|e| Failure::usage(e.to_string()))?;
    let body = json!(fork).to_string();
    let answer = send(&arguments.socket.api_sock, "PUT", "/husk/fork", &body)?;
    let status = print_answer(&answer)?;
    Ok(status.max(u8::from(answer.body.contains("\"error\""))))
}

fn disk((id, path): &(String, String)) -> DriveOverride {
    DriveOverride {
        drive_id: id.clone(),
        path_on_host: path.into(),
    }
}

fn tap((id, name): &(String, String)) -> NetworkOverride {
    NetworkOverride {
        iface_id: id.clone(),
        host_dev_name: Some(name.clone()),
        guest_mac: None,
    }
}

fn vsock(uds_path: Option<PathBuf>, guest_cid: Option<u32>) -> Option<VsockOverride> {
    let is_other = uds_path.is_some() || guest_cid.is_some();
    is_other.then_some(VsockOverride {
        uds_path,
        guest_cid,
    })
}

/// Go on with a VM that was kept, until it ends. The exit status, unless something failed.
pub fn restore(arguments: &RestoreArgs, start: Instant) -> Result<u8, Failure> {
    let working_set = |wanted: bool| wanted.then(|| arguments.dir.join(WORKING_SET));
    let load = LoadSnapshot {
        snapshot_path: arguments.dir.join(STATE),
        mem_backend: arguments.uffd.as_ref().map(|socket| MemBackend {
            backend_type: MemBackendType::Uffd,
            backend_path: socket.clone(),
        }),
        mem_file_path: arguments.uffd.is_none().then(|| arguments.dir.join(MEMORY)),
        track_dirty_pages: arguments.track_dirty_pages,
        resume_vm: !arguments.paused,
        clock_realtime: arguments.clock_realtime,
        huge_pages: None,
        record_working_set: working_set(arguments.record_working_set),
        prefetch: working_set(arguments.prefetch),
        network_overrides: arguments.nets.iter().map(tap).collect(),
        drive_overrides: arguments.disks.iter().map(disk).collect(),
        vsock_override: vsock(arguments.vsock.clone(), arguments.cid),
    };
    let socket = |path: &PathBuf| ApiSocket {
        path: path.clone(),
        max_body: husk_api::MAX_BODY,
        tidy: true,
    };
    let filters = filters(&arguments.seccomp)?;
    let options = Options {
        api: arguments.api_sock.as_ref().map(socket),
        ..Options::new(start, filters, identity(ANONYMOUS))
    };
    Session::go(options, First::Restore(Box::new(load)))
}
