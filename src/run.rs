//! `husk run`: from flags to a VM.

use crate::cli::{RunArgs, SeccompArgs};
use crate::session::{First, OnSignal, Options, Session, say};
use crate::socket::ApiSocket;
use crate::{Failure, devices, guest, logging, metadata, metrics};
use husk_config::{VmConfig, default_boot_args, parse_mib};
use husk_loader::Cache;
use husk_sandbox::Filters;
use husk_vmm::Identity;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

/// Boot a VM and stay until it ends. The exit status, unless something failed.
pub fn run(arguments: &RunArgs, start: Instant) -> Result<u8, Failure> {
    let cache = Cache::from_environment();
    let filters = filters(&arguments.seccomp)?;
    let (mut config, _initrd) = configuration(arguments, &cache)?;
    // Whoever asks for times may mark with Firecracker's register, too.
    config.boot_timer |= arguments.timeline_file.is_some() || arguments.stop_at_mark;
    let mmds = metadata::store(arguments, &mut config)?;
    if let Some(logger) = &config.logger {
        logging::configure_below_flags(logger).map_err(Failure::usage)?;
    }
    if let Some(settings) = &config.metrics {
        metrics::configure(settings)?;
    }
    let api = arguments.api_sock.as_ref().map(|path| ApiSocket {
        path: path.clone(),
        max_body: husk_api::MAX_BODY,
        tidy: true,
    });
    let timeline_file = match &arguments.timeline_file {
        Some(path) => Some(File::create(path).map_err(|e| {
            let path = path.display();
            Failure::usage(format!("cannot write the timeline to {path}: {e}"))
        })?),
        None => None,
    };
    let options = Options {
        filters,
        user_networks: has_user_network(&config),
        mmds,
        cache,
        print_exits: arguments.exits,
        print_timeline: arguments.timeline,
        timeline_file,
        ends_at_mark: arguments.stop_at_mark,
        start,
        identity: identity(ANONYMOUS),
        api,
        on_signal: OnSignal::PressPowerButton,
    };
    Session::go(options, First::Boot(Box::new(config)))
}

/// The name of a VM that was given none. As Firecracker's.
pub const ANONYMOUS: &str = "anonymous-instance";

/// What the monitor says of itself, and of a VM called `id`.
pub fn identity(id: &str) -> Identity {
    Identity {
        id: id.into(),
        name: "Husk",
        version: env!("CARGO_PKG_VERSION"),
        api_version: husk_api::FIRECRACKER_VERSION,
    }
}

/// The filters that the command line asks for.
pub fn filters(arguments: &SeccompArgs) -> Result<Filters, Failure> {
    match (&arguments.seccomp_filter, arguments.no_seccomp) {
        (_, true) => Ok(Filters::none()),
        (Some(path), false) => {
            Filters::from_file(path).map_err(|e| Failure::usage(husk_vmm::chain(&e)))
        }
        (None, false) => Ok(Filters::built_in()),
    }
}

fn has_user_network(config: &VmConfig) -> bool {
    let mut interfaces = config.network_interfaces.iter();
    interfaces.any(|interface| interface.user.is_some())
}

/// The configuration file, then the flags over it, then the default guest for what is still missing. The file keeps the
/// default guest's initrd open.
fn configuration(arguments: &RunArgs, cache: &Cache) -> Result<(VmConfig, Option<File>), Failure> {
    let usage = |e: &dyn std::error::Error| Failure::usage(husk_vmm::chain(e));
    let mut config = match &arguments.config {
        Some(path) => VmConfig::from_file(path).map_err(|e| usage(&e))?,
        None => VmConfig::default(),
    };
    config.pci |= arguments.pci;
    let pci = config.pci;
    let source = &mut config.boot_source;
    if let Some(kernel) = &arguments.kernel {
        source.kernel_image_path = kernel.clone();
    }
    if let Some(initrd) = &arguments.initrd {
        source.initrd_path = Some(initrd.clone());
    }
    match (&arguments.cmdline, arguments.no_default_cmdline) {
        (given, true) => source.boot_args = Some(given.clone().unwrap_or_default()),
        (Some(given), false) => {
            source.boot_args = Some(format!("{} {given}", default_boot_args(pci)))
        }
        (None, false) => {}
    }
    if let Some(protocol) = arguments.boot_protocol {
        source.boot_protocol = protocol.into();
    }
    if let Some(cpus) = arguments.cpus {
        config.machine_config.vcpu_count = cpus;
    }
    if let Some(memory) = &arguments.memory {
        config.machine_config.mem_size_mib = parse_mib(memory).map_err(|e| usage(&e))?;
    }
    if let Some(on_reboot) = arguments.on_reboot {
        config.on_reboot = on_reboot.into();
    }
    if let Some(path) = &arguments.metrics_path {
        let metrics_path = path.clone();
        config.metrics = Some(husk_config::Metrics { metrics_path });
    }
    add_devices(&mut config, arguments).map_err(Failure::usage)?;
    let (initrd, taken) = default_guest(&mut config, cache)?;
    config.validate().map_err(|e| usage(&e))?;
    say(&taken);
    Ok((config, initrd))
}

/// Disks and interfaces of the command line come behind the file's, the others replace the file's.
fn add_devices(config: &mut VmConfig, arguments: &RunArgs) -> Result<(), String> {
    let flag = |flag: &str, text: &str, why: String| format!("{flag} {text}: {why}");
    for text in &arguments.disk {
        let disk = devices::disk(text, config.drives.len());
        config
            .drives
            .push(disk.map_err(|e| flag("--disk", text, e))?);
    }
    for text in &arguments.net {
        let interface = devices::net(text, config.network_interfaces.len());
        let interface = interface.map_err(|e| flag("--net", text, e))?;
        config.network_interfaces.push(interface);
    }
    if !arguments.publish.is_empty() {
        let mut interfaces = config.network_interfaces.iter_mut();
        let user = interfaces
            .find_map(|interface| interface.user.as_mut())
            .ok_or("-p forwards a port into a guest with --net user: add that")?;
        user.forwards.extend(&arguments.publish);
    }
    let (vsock, entropy) = (&arguments.vsock, &arguments.entropy);
    config.vsock = vsock.clone().or(config.vsock.take());
    config.entropy = entropy.clone().or(config.entropy.take());
    config.balloon = arguments.balloon.clone().or(config.balloon.take());
    Ok(())
}

/// Fill in what to boot when the user named nothing; the text says what it is.
fn default_guest(config: &mut VmConfig, cache: &Cache) -> Result<(Option<File>, String), Failure> {
    let source = &mut config.boot_source;
    if !source.kernel_image_path.as_os_str().is_empty() {
        return Ok((None, String::new()));
    }
    source.kernel_image_path = guest::default_kernel().map_err(Failure::usage)?;
    let kernel = source.kernel_image_path.display().to_string();
    if let Some(initrd) = &source.initrd_path {
        let taken = format!("husk: kernel {kernel}, initrd {}\n", initrd.display());
        return Ok((None, taken));
    }
    let (file, busybox) = guest::default_initrd(config, cache).map_err(Failure::usage)?;
    let source = &mut config.boot_source;
    source.initrd_path = Some(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
    let busybox = busybox.display();
    let taken = format!("husk: kernel {kernel}, a small initramfs with the shell of {busybox}\n");
    Ok((Some(file), taken))
}
