//! Every value, declared once. Sections and names are Firecracker's where it has them.

use crate::family::{Family, Naming};
use crate::section::{process, sections};
use crate::value::{Counter, Gauge, Latency, Micros};

/// What this process counts.
pub static METRICS: Metrics = Metrics::new();

process! {
    /// The API's thread, and the start of the process.
    api_server: ApiServerMetrics = ApiServerMetrics::new(),
    /// The balloon.
    balloon: Family<BalloonMetrics> = Family::new(Naming::Single),
    /// Disks, by drive_id.
    block: Family<BlockMetrics> = Family::new(Naming::Listed("drive_id")),
    /// Requests that use what is deprecated.
    deprecated_api: DeprecatedApiMetrics = DeprecatedApiMetrics::new(),
    /// GET requests.
    get_api_requests: GetRequestsMetrics = GetRequestsMetrics::new(),
    /// The keyboard controller.
    i8042: I8042Metrics = I8042Metrics::new(),
    /// The serial console.
    uart: UartMetrics = UartMetrics::new(),
    /// How long requests took.
    latencies_us: LatenciesMetrics = LatenciesMetrics::new(),
    /// Logging and metrics themselves.
    logger: LoggerMetrics = LoggerMetrics::new(),
    /// The metadata service.
    mmds: MmdsMetrics = MmdsMetrics::new(),
    /// Network interfaces, by iface_id.
    net: Family<NetMetrics> = Family::new(Naming::Listed("iface_id")),
    /// PATCH requests.
    patch_api_requests: PatchRequestsMetrics = PatchRequestsMetrics::new(),
    /// PUT requests.
    put_api_requests: PutRequestsMetrics = PutRequestsMetrics::new(),
    /// System call filters.
    seccomp: SeccompMetrics = SeccompMetrics::new(),
    /// Disks that other processes serve, by drive_id.
    vhost_user_block: Family<VhostUserBlockMetrics> = Family::new(Naming::Listed("drive_id")),
    /// vCPUs, by number.
    vcpu: Family<VcpuMetrics> = Family::new(Naming::Label("vcpu")),
    /// The monitor.
    vmm: VmmMetrics = VmmMetrics::new(),
    /// Signals to the process.
    signals: SignalMetrics = SignalMetrics::new(),
    /// Sockets between host and guest.
    vsock: Family<VsockMetrics> = Family::new(Naming::Single),
    /// The source of random bytes.
    entropy: Family<EntropyMetrics> = Family::new(Naming::Single),
    /// Interrupts of virtio devices.
    interrupts: InterruptMetrics = InterruptMetrics::new(),
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

sections! {
    /// The API's thread, and the start of the process.
    ApiServerMetrics {
        /// Time from what --start-time-us says to the API's start.
        process_startup_time_us: Micros,
        /// Processor time of the process and its parent until the API's start.
        process_startup_time_cpu_us: Micros,
    }

    /// The balloon.
    BalloonMetrics {
        /// Times that the balloon could not be started.
        activate_fails: Counter,
        /// Writes of the guest to the configuration space that were refused.
        cfg_fails: Counter,
        /// Requests with which the guest inflated the balloon.
        inflate_count: Counter,
        /// Statistics that the guest sent.
        stats_updates_count: Counter,
        /// Statistics of the guest that could not be taken.
        stats_update_fails: Counter,
        /// Requests with which the guest deflated the balloon.
        deflate_count: Counter,
        /// Events that could not be handled.
        event_fails: Counter,
        /// Ranges of free memory that the guest reported.
        free_page_report_count: Counter,
        /// Bytes of reported ranges that went back to the host.
        free_page_report_freed: Counter,
        /// Reported ranges that could not be given back.
        free_page_report_fails: Counter,
        /// Ranges of free memory that the guest hinted.
        free_page_hint_count: Counter,
        /// Bytes of hinted ranges that went back to the host.
        free_page_hint_freed: Counter,
        /// Hinted ranges that could not be given back.
        free_page_hint_fails: Counter,
    }

    /// A disk.
    BlockMetrics {
        /// Times that the disk could not be started.
        activate_fails: Counter,
        /// Writes of the guest to the configuration space that were refused.
        cfg_fails: Counter,
        /// Times that a queue was looked into and held no request.
        no_avail_buffer: Counter,
        /// Events that could not be handled.
        event_fails: Counter,
        /// Requests that the host's file or device failed.
        execute_fails: Counter,
        /// Requests that made no sense or were not allowed.
        invalid_reqs_count: Counter,
        /// Flushes that succeeded.
        flush_count: Counter,
        /// Kicks of the queues.
        queue_event_count: Counter,
        /// Times that the rate limiter's timer brought new tokens.
        rate_limiter_event_count: Counter,
        /// Changes of the disk while the VM ran.
        update_count: Counter,
        /// Changes that failed.
        update_fails: Counter,
        /// Bytes that the guest read.
        read_bytes: Counter,
        /// Bytes that the guest wrote.
        write_bytes: Counter,
        /// Reads that succeeded.
        read_count: Counter,
        /// Writes that succeeded.
        write_count: Counter,
        /// Time of reads that succeeded, from the queue to the answer.
        read_agg: Latency,
        /// Time of writes that succeeded, from the queue to the answer.
        write_agg: Latency,
        /// Times that the rate limiter made the queue wait.
        rate_limiter_throttled_events: Counter,
        /// Times that a full io_uring made the queue wait.
        io_engine_throttled_events: Counter,
        /// Times that a queue had to wait for its turn with requests in it.
        remaining_reqs_count: Counter,
        /// Discards and writes of zeroes that succeeded.
        discard_count: Counter,
    }

    /// Requests that use what is deprecated.
    DeprecatedApiMetrics {
        /// Requests with deprecated paths or fields.
        deprecated_http_api_calls: Counter,
    }

    /// GET requests.
    GetRequestsMetrics {
        /// GET of /.
        instance_info_count: Counter,
        /// GET of /machine-config.
        machine_cfg_count: Counter,
        /// GET of /mmds.
        mmds_count: Counter,
        /// GET of /version.
        vmm_version_count: Counter,
        /// GET of /hotplug/memory.
        hotplug_memory_count: Counter,
    }

    /// The keyboard controller.
    I8042Metrics {
        /// Times that keys were to be pressed and no driver listened to the keyboard.
        error_count: Counter,
        /// Reads of ports that are not there.
        missed_read_count: Counter,
        /// Writes to ports or of commands that are not there.
        missed_write_count: Counter,
        /// Bytes read.
        read_count: Counter,
        /// Resets of the machine.
        reset_count: Counter,
        /// Bytes written.
        write_count: Counter,
    }

    /// The serial console.
    UartMetrics {
        /// Writes of the output that failed.
        error_count: Counter,
        /// Flushes of the output.
        flush_count: Counter,
        /// Reads that were not of a register.
        missed_read_count: Counter,
        /// Writes that were not to a register.
        missed_write_count: Counter,
        /// Bytes that the guest received.
        read_count: Counter,
        /// Bytes that the guest sent.
        write_count: Counter,
        /// Bytes of the guest's that the rate limiter dropped.
        rate_limiter_dropped_bytes: Counter,
    }

    /// How long requests took the last time: as the API's client saw it, and in the monitor.
    LatenciesMetrics {
        /// A full snapshot, as the client saw it.
        full_create_snapshot: Micros,
        /// A differential snapshot, as the client saw it.
        diff_create_snapshot: Micros,
        /// Loading a snapshot, as the client saw it.
        load_snapshot: Micros,
        /// Pausing the VM, from the request to its answer.
        pause_vm: Micros,
        /// Resuming the VM, from the request to its answer.
        resume_vm: Micros,
        /// A full snapshot, in the monitor.
        vmm_full_create_snapshot: Micros,
        /// A differential snapshot, in the monitor.
        vmm_diff_create_snapshot: Micros,
        /// Loading a snapshot, in the monitor.
        vmm_load_snapshot: Micros,
        /// Pausing the VM, in the monitor.
        vmm_pause_vm: Micros,
        /// Resuming the VM, in the monitor.
        vmm_resume_vm: Micros,
    }

    /// Logging and metrics themselves.
    LoggerMetrics {
        /// Lines of metrics that could not be written.
        missed_metrics_count: Counter,
        /// Lines of metrics that could not be made.
        metrics_fails: Counter,
        /// Log messages that could not be written.
        missed_log_count: Counter,
    }

    /// The metadata service.
    MmdsMetrics {
        /// Frames of guests that went to the metadata service.
        rx_accepted: Counter,
        /// Such frames that could not be handled.
        rx_accepted_err: Counter,
        /// Such frames with something unusual.
        rx_accepted_unusual: Counter,
        /// Frames that were no Ethernet.
        rx_bad_eth: Counter,
        /// GET requests with a token that is not valid.
        rx_invalid_token: Counter,
        /// GET requests without a token, where one is needed.
        rx_no_token: Counter,
        /// Frames received.
        rx_count: Counter,
        /// Bytes sent.
        tx_bytes: Counter,
        /// Times that something was sent.
        tx_count: Counter,
        /// Frames that the guest's driver has not taken before its reset.
        tx_errors: Counter,
        /// Frames sent.
        tx_frames: Counter,
        /// TCP connections accepted.
        connections_created: Counter,
        /// TCP connections that have ended.
        connections_destroyed: Counter,
    }

    /// A network interface.
    NetMetrics {
        /// Times that the interface could not be started.
        activate_fails: Counter,
        /// Writes of the guest to the configuration space that were refused.
        cfg_fails: Counter,
        /// Times that the guest changed its MAC address.
        mac_address_updates: Counter,
        /// Times that a packet for the guest had to wait for buffers.
        no_rx_avail_buffer: Counter,
        /// Times that a transmit queue was looked into and held no packet.
        no_tx_avail_buffer: Counter,
        /// Events that could not be handled.
        event_fails: Counter,
        /// Kicks of receive queues.
        rx_queue_event_count: Counter,
        /// Times that the receiving rate limiter's timer brought new tokens.
        rx_event_rate_limiter_count: Counter,
        /// Packets for the guest that were too large for its buffers.
        rx_partial_writes: Counter,
        /// Times that the rate limiter made packets for the guest wait.
        rx_rate_limiter_throttled: Counter,
        /// Times that the backend had packets for the guest.
        rx_tap_event_count: Counter,
        /// Bytes that the guest received, with their Ethernet headers.
        rx_bytes_count: Counter,
        /// Packets that the guest received.
        rx_packets_count: Counter,
        /// Packets for the guest that were lost.
        rx_fails: Counter,
        /// Packets that were read from the backend.
        rx_count: Counter,
        /// Times that reading from the backend failed.
        tap_read_fails: Counter,
        /// Times that writing to the backend failed.
        tap_write_fails: Counter,
        /// Time of writes to the backend.
        tap_write_agg: Latency,
        /// Bytes that the guest sent, with their Ethernet headers.
        tx_bytes_count: Counter,
        /// Packets of the guest's that were too short or too long.
        tx_malformed_frames: Counter,
        /// Packets of the guest's that were lost.
        tx_fails: Counter,
        /// Writes to the backend that succeeded.
        tx_count: Counter,
        /// Packets that the guest sent.
        tx_packets_count: Counter,
        /// Packets of the guest's that were read in part only.
        tx_partial_reads: Counter,
        /// Kicks of transmit queues.
        tx_queue_event_count: Counter,
        /// Times that the sending rate limiter's timer brought new tokens.
        tx_rate_limiter_event_count: Counter,
        /// Times that the rate limiter made packets of the guest's wait.
        tx_rate_limiter_throttled: Counter,
        /// Packets of the guest's with a MAC address that is not its own.
        tx_spoofed_mac_count: Counter,
        /// Times that a transmit queue had to wait for its turn with packets in it.
        tx_remaining_reqs_count: Counter,
    }

    /// PATCH requests.
    PatchRequestsMetrics {
        /// PATCH of /drives.
        drive_count: Counter,
        /// Those that failed.
        drive_fails: Counter,
        /// PATCH of /network-interfaces.
        network_count: Counter,
        /// Those that failed.
        network_fails: Counter,
        /// PATCH of /machine-config.
        machine_cfg_count: Counter,
        /// Those that failed.
        machine_cfg_fails: Counter,
        /// PATCH of /mmds.
        mmds_count: Counter,
        /// Those that failed.
        mmds_fails: Counter,
        /// PATCH of /hotplug/memory.
        hotplug_memory_count: Counter,
        /// Those that failed.
        hotplug_memory_fails: Counter,
    }

    /// PUT requests.
    PutRequestsMetrics {
        /// PUT of /actions.
        actions_count: Counter,
        /// Those that failed.
        actions_fails: Counter,
        /// PUT of /boot-source.
        boot_source_count: Counter,
        /// Those that failed.
        boot_source_fails: Counter,
        /// PUT of /drives.
        drive_count: Counter,
        /// Those that failed.
        drive_fails: Counter,
        /// PUT of /logger.
        logger_count: Counter,
        /// Those that failed.
        logger_fails: Counter,
        /// PUT of /machine-config.
        machine_cfg_count: Counter,
        /// Those that failed.
        machine_cfg_fails: Counter,
        /// PUT of /cpu-config.
        cpu_cfg_count: Counter,
        /// Those that failed.
        cpu_cfg_fails: Counter,
        /// PUT of /metrics.
        metrics_count: Counter,
        /// Those that failed.
        metrics_fails: Counter,
        /// PUT of /network-interfaces.
        network_count: Counter,
        /// Those that failed.
        network_fails: Counter,
        /// PUT of /mmds.
        mmds_count: Counter,
        /// Those that failed.
        mmds_fails: Counter,
        /// PUT of /vsock.
        vsock_count: Counter,
        /// Those that failed.
        vsock_fails: Counter,
        /// PUT of /pmem.
        pmem_count: Counter,
        /// Those that failed.
        pmem_fails: Counter,
        /// PUT of /serial.
        serial_count: Counter,
        /// Those that failed.
        serial_fails: Counter,
        /// PUT of /hotplug/memory.
        hotplug_memory_count: Counter,
        /// Those that failed.
        hotplug_memory_fails: Counter,
    }

    /// System call filters.
    SeccompMetrics {
        /// 1 when a system call that a filter refused ends the process.
        num_faults: Gauge,
    }

    /// A vCPU.
    VcpuMetrics {
        /// Exits for reads from I/O ports.
        exit_io_in: Counter,
        /// Exits for writes to I/O ports.
        exit_io_out: Counter,
        /// Exits for reads where there is no memory.
        exit_mmio_read: Counter,
        /// Exits for writes where there is no memory.
        exit_mmio_write: Counter,
        /// Errors of KVM, and exits that it has no way on from.
        failures: Counter,
        /// Times that a resumed guest's clock could not be told of the pause.
        kvmclock_ctrl_fails: Counter,
        /// Time to answer reads from I/O ports.
        exit_io_in_agg: Latency,
        /// Time to answer writes to I/O ports.
        exit_io_out_agg: Latency,
        /// Time to answer reads where there is no memory.
        exit_mmio_read_agg: Latency,
        /// Time to answer writes where there is no memory.
        exit_mmio_write_agg: Latency,
        /// Exits for signals from the monitor.
        exit_interrupted: Counter,
        /// Exits for a halted processor.
        exit_halt: Counter,
        /// Exits for triple faults.
        exit_shutdown: Counter,
        /// Exits for system events: power-off, reset, crash.
        exit_system_event: Counter,
    }

    /// The monitor.
    VmmMetrics {
        /// Panics of the monitor.
        panic_count: Gauge,
    }

    /// Signals to the process.
    SignalMetrics {
        /// 1 when SIGBUS ends the process.
        sigbus: Gauge,
        /// 1 when SIGSEGV ends the process.
        sigsegv: Gauge,
        /// 1 when SIGXFSZ ends the process.
        sigxfsz: Gauge,
        /// 1 when SIGXCPU ends the process.
        sigxcpu: Gauge,
        /// SIGPIPE, from writes that nobody takes.
        sigpipe: Counter,
        /// 1 once SIGHUP has come.
        sighup: Gauge,
        /// 1 when SIGILL ends the process.
        sigill: Gauge,
    }

    /// Sockets between host and guest.
    VsockMetrics {
        /// Times that the device could not be started.
        activate_fails: Counter,
        /// Writes of the guest to the configuration space that were refused.
        cfg_fails: Counter,
        /// Times that the receive queue was broken.
        rx_queue_event_fails: Counter,
        /// Times that the transmit queue was broken.
        tx_queue_event_fails: Counter,
        /// Times that the event queue was broken.
        ev_queue_event_fails: Counter,
        /// Times that the host's sockets could not be waited for.
        muxer_event_fails: Counter,
        /// Programs of the host's that did not say to which port they want.
        conn_event_fails: Counter,
        /// Kicks of the receive queue.
        rx_queue_event_count: Counter,
        /// Kicks of the transmit queue.
        tx_queue_event_count: Counter,
        /// Bytes of data that the guest received.
        rx_bytes_count: Counter,
        /// Bytes of data that the guest sent.
        tx_bytes_count: Counter,
        /// Packets that the guest received.
        rx_packets_count: Counter,
        /// Packets that the guest sent.
        tx_packets_count: Counter,
        /// Connections that have begun.
        conns_added: Counter,
        /// Connections that were ended for want of an answer.
        conns_killed: Counter,
        /// Connections that have ended.
        conns_removed: Counter,
        /// Times that the list of connections to end was made anew.
        killq_resync: Counter,
        /// Times that data that had to wait could not be written to a socket.
        tx_flush_fails: Counter,
        /// Times that data could not be written to a socket.
        tx_write_fails: Counter,
        /// Times that data could not be read from a socket.
        rx_read_fails: Counter,
    }

    /// The source of random bytes.
    EntropyMetrics {
        /// Times that the device could not be started.
        activate_fails: Counter,
        /// Events that could not be handled.
        entropy_event_fails: Counter,
        /// Requests that were answered.
        entropy_event_count: Counter,
        /// Bytes that the guest got.
        entropy_bytes: Counter,
        /// Times that the host had no random bytes.
        host_rng_fails: Counter,
        /// Times that the rate limiter made the guest wait.
        entropy_rate_limiter_throttled: Counter,
        /// Times that the rate limiter's timer brought new tokens.
        rate_limiter_event_count: Counter,
    }

    /// A disk that another process serves.
    VhostUserBlockMetrics {
        /// Times that the server could not be started.
        activate_fails: Counter,
        /// Times that the server's configuration space could not be read anew.
        cfg_fails: Counter,
        /// Times that the server was lost while the guest used the disk.
        event_fails: Counter,
        /// Time that the server took until the disk was known.
        init_time_us: Micros,
        /// Time that it took the last time that the driver started the disk.
        activate_time_us: Micros,
        /// Time that it took the last time that its configuration space was read anew.
        config_change_time_us: Micros,
    }

    /// Interrupts of virtio devices.
    InterruptMetrics {
        /// Interrupts for the guest.
        triggers: Counter,
        /// Changes of message-signalled interrupts' routes.
        config_updates: Counter,
    }
}
