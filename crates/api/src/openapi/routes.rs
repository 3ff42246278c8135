//! Every path of the API, as data: for the description, and for tests that walk through all of them.

use crate::parse::{
    Action, BalloonStatisticsUpdate, BalloonUpdate, DriveUpdate, HintingStart,
    NetworkInterfaceUpdate, OwnAction, VmUpdate,
};
use husk_config::{
    Balloon, BootSource, CpuConfig, CreateSnapshot, Drive, Entropy, Event, Fork, LoadSnapshot,
    Logger, MachineConfig, MachineConfigUpdate, Metrics, MmdsConfig, NetworkInterface, Serial,
    VmConfig, Vsock,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value};

/// When a request works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Any,
    BeforeBoot,
    AfterBoot,
    /// Not yet.
    Never,
}

/// A method on a path.
pub struct Route {
    pub method: &'static str,
    /// With `{id}` where a device's name stands.
    pub path: &'static str,
    pub summary: &'static str,
    pub when: When,
    /// What the body has to be.
    pub body: Option<fn(&mut SchemaGenerator) -> Schema>,
    /// A body that is understood, for the device `x` where the path names one; empty for none.
    pub example: &'static str,
    /// What comes back; nothing: 204.
    pub answer: Option<Answer>,
}

/// What comes back.
pub enum Answer {
    Json(fn(&mut SchemaGenerator) -> Schema),
    Text(&'static str),
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The document's own types, of what only the monitor makes.
#[allow(dead_code)]
mod answers {
    use schemars::JsonSchema;

    /// What a VM is and does.
    #[derive(JsonSchema)]
    pub struct InstanceInfo {
        /// The program's name.
        pub app_name: String,
        /// The VM's name.
        pub id: String,
        /// `Not started`, `Running` or `Paused`.
        pub state: String,
        /// The program's version.
        pub vmm_version: String,
    }

    /// Versions.
    #[derive(JsonSchema)]
    pub struct Version {
        /// Of Firecracker's API.
        pub firecracker_version: String,
        /// Of Husk.
        pub husk_version: String,
    }

    /// The search for pages that the guest does not use.
    #[derive(JsonSchema)]
    pub struct BalloonHintingStatus {
        /// The host's last command: 0 none, 1 done, else the number of a search.
        pub host_cmd: u32,
        /// The search that the guest answers.
        pub guest_cmd: Option<u32>,
    }

    /// What the guest says of its memory; sizes are in bytes, what it does not say is absent.
    #[derive(JsonSchema)]
    pub struct BalloonStatistics {
        /// Pages of 4 KiB that the guest is to give back.
        pub target_pages: u32,
        /// Pages of 4 KiB that it has given back.
        pub actual_pages: u32,
        /// The same in MiB.
        pub target_mib: u32,
        /// The same in MiB.
        pub actual_mib: u32,
        pub swap_in: Option<u64>,
        pub swap_out: Option<u64>,
        pub major_faults: Option<u64>,
        pub minor_faults: Option<u64>,
        pub free_memory: Option<u64>,
        pub total_memory: Option<u64>,
        pub available_memory: Option<u64>,
        pub disk_caches: Option<u64>,
        pub hugetlb_allocations: Option<u64>,
        pub hugetlb_failures: Option<u64>,
        pub oom_kill: Option<u64>,
        pub alloc_stall: Option<u64>,
        pub async_scan: Option<u64>,
        pub direct_scan: Option<u64>,
        pub async_reclaim: Option<u64>,
        pub direct_reclaim: Option<u64>,
    }

    /// A phase of a boot.
    #[derive(JsonSchema)]
    pub struct BootPhase {
        /// Its name.
        pub phase: String,
        /// When it was reached, in nanoseconds since the process began.
        pub ns: u64,
    }

    /// Phases of a boot, in the order of time.
    #[derive(JsonSchema)]
    pub struct BootTimeline {
        pub phases: Vec<BootPhase>,
    }

    /// A clone.
    #[derive(JsonSchema)]
    pub struct Clone {
        /// Its number, from 1 among the clones of its template.
        pub n: u32,
        /// Its process, if it was started.
        pub pid: Option<u32>,
        /// Why it does not run, if it does not.
        pub error: Option<String>,
    }

    /// Clones that were started.
    #[derive(JsonSchema)]
    pub struct Clones {
        pub clones: Vec<Clone>,
        /// The template, if it is kept.
        pub template: Option<String>,
    }

    /// What went wrong.
    #[derive(JsonSchema)]
    pub struct Error {
        /// What was wrong, and what to do.
        pub fault_message: String,
    }
}

pub use answers::Error;
use answers::{
    BalloonHintingStatus, BalloonStatistics, BootTimeline, Clones, InstanceInfo, Version,
};

type Metadata = Map<String, Value>;

const fn get(path: &'static str, summary: &'static str, answer: Answer) -> Route {
    Route {
        method: "GET",
        path,
        summary,
        when: When::Any,
        body: None,
        example: "",
        answer: Some(answer),
    }
}

const fn change(
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    when: When,
    body: fn(&mut SchemaGenerator) -> Schema,
    example: &'static str,
) -> Route {
    Route {
        method,
        path,
        summary,
        when,
        body: Some(body),
        example,
        answer: None,
    }
}

const fn bare(
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    when: When,
) -> Route {
    Route {
        method,
        path,
        summary,
        when,
        body: None,
        example: "",
        answer: None,
    }
}

use When::{AfterBoot, Any, BeforeBoot, Never};

const LIMITER: &str = r#"{"drive_id":"x","path_on_host":"/img","rate_limiter":{"bandwidth":{"size":1,"refill_time":2,"one_time_burst":3},"ops":{"size":1,"refill_time":2}}}"#;

/// All of them.
pub const ROUTES: &[Route] = &[
    get(
        "/",
        "The VM's name and state",
        Answer::Json(schema::<InstanceInfo>),
    ),
    get(
        "/version",
        "The version of the API, and Husk's",
        Answer::Json(schema::<Version>),
    ),
    get(
        "/vm/config",
        "The whole configuration; what is not set is null",
        Answer::Json(schema::<VmConfig>),
    ),
    get(
        "/machine-config",
        "Processors and memory",
        Answer::Json(schema::<MachineConfig>),
    ),
    get(
        "/balloon",
        "The balloon's configuration",
        Answer::Json(schema::<Balloon>),
    ),
    Route {
        when: AfterBoot,
        ..get(
            "/balloon/statistics",
            "What the guest says of its memory",
            Answer::Json(schema::<BalloonStatistics>),
        )
    },
    Route {
        when: AfterBoot,
        ..get(
            "/balloon/hinting/status",
            "The search for pages that the guest does not use",
            Answer::Json(schema::<BalloonHintingStatus>),
        )
    },
    get(
        "/mmds",
        "The guest's metadata",
        Answer::Json(schema::<Metadata>),
    ),
    Route {
        when: Never,
        ..get(
            "/hotplug/memory",
            "Not supported yet",
            Answer::Json(schema::<Metadata>),
        )
    },
    get(
        "/husk/boot-timeline",
        "When each phase of the boot was reached",
        Answer::Json(schema::<BootTimeline>),
    ),
    get(
        "/husk/metrics",
        "All counters, as Prometheus reads them",
        Answer::Text("text/plain"),
    ),
    get(
        "/husk/openapi.json",
        "This document",
        Answer::Json(schema::<Metadata>),
    ),
    get(
        "/husk/events",
        "What happens to the VM, as server-sent events, until it has ended; each is an Event",
        Answer::Text("text/event-stream"),
    ),
    change(
        "PUT",
        "/actions",
        "Boot the VM (before boot), write the metrics, press Ctrl-Alt-Del (after)",
        Any,
        schema::<Action>,
        r#"{"action_type":"InstanceStart"}"#,
    ),
    change(
        "PUT",
        "/husk/actions",
        "Press the power button, or end the VM at once",
        AfterBoot,
        schema::<OwnAction>,
        r#"{"action_type":"Stop"}"#,
    ),
    Route {
        answer: Some(Answer::Json(schema::<Clones>)),
        ..change(
            "PUT",
            "/husk/fork",
            "Start clones: VMs that go on from where this one is, each in a process of its own. The guest stands still for a moment",
            AfterBoot,
            schema::<Fork>,
            r#"{"count":2,"template":"1","keep_template":true,"resume_vm":true,"id":"web-{n}","console":"/out-{n}","log":"/log-{n}","api_sock":"/s-{n}","network_overrides":[{"iface_id":"x","host_dev_name":"tap-{n}","guest_mac":"02:00:00:00:00:0{n}"}],"drive_overrides":[{"drive_id":"x","path_on_host":"/d-{n}"}],"vsock_override":{"uds_path":"/v-{n}","guest_cid":3}}"#,
        )
    },
    bare(
        "DELETE",
        "/husk/fork/{id}",
        "Let go of a template that was kept; its clones go on",
        AfterBoot,
    ),
    change(
        "PUT",
        "/boot-source",
        "What is booted; the files are opened at once",
        BeforeBoot,
        schema::<BootSource>,
        r#"{"kernel_image_path":"/k","initrd_path":"/i","boot_args":"quiet"}"#,
    ),
    change(
        "PUT",
        "/machine-config",
        "Processors and memory",
        BeforeBoot,
        schema::<MachineConfig>,
        r#"{"vcpu_count":2,"mem_size_mib":128,"smt":true,"cpu_template":"None","track_dirty_pages":true,"huge_pages":"Transparent"}"#,
    ),
    change(
        "PATCH",
        "/machine-config",
        "Change processors and memory",
        BeforeBoot,
        schema::<MachineConfigUpdate>,
        r#"{"vcpu_count":2,"mem_size_mib":128,"smt":true,"cpu_template":"None","track_dirty_pages":true,"huge_pages":"None"}"#,
    ),
    change(
        "PUT",
        "/cpu-config",
        "Change the processors that the guest sees",
        BeforeBoot,
        schema::<CpuConfig>,
        r#"{"kvm_capabilities":["!171"],"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"eax","bitmap":"0bxxx1"}]}],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b1"}],"reg_modifiers":[],"vcpu_features":[]}"#,
    ),
    change(
        "PUT",
        "/drives/{id}",
        "A disk, of a file or of a vhost-user server: before boot, and with PCI plugged into a running VM",
        Any,
        schema::<Drive>,
        r#"{"drive_id":"x","path_on_host":"/img","is_root_device":false,"partuuid":null,"is_read_only":true,"cache_type":"Writeback","io_engine":"Async","rate_limiter":null,"socket":null}"#,
    ),
    change(
        "PATCH",
        "/drives/{id}",
        "Go on with another file (the same one, or none: its size is read anew), change limits; a vhost-user server's disk is only looked at anew",
        AfterBoot,
        schema::<DriveUpdate>,
        LIMITER,
    ),
    bare(
        "DELETE",
        "/drives/{id}",
        "Unplug a disk, with PCI: it is gone when the guest has let it go",
        AfterBoot,
    ),
    change(
        "PUT",
        "/network-interfaces/{id}",
        "A network interface: before boot, and with PCI plugged into a running VM",
        Any,
        schema::<NetworkInterface>,
        r#"{"iface_id":"x","host_dev_name":"tap0","guest_mac":"06:00:00:00:00:01","mtu":1400,"rx_rate_limiter":{"ops":{"size":1,"refill_time":2}},"tx_rate_limiter":null}"#,
    ),
    change(
        "PATCH",
        "/network-interfaces/{id}",
        "Change limits, plug the cable in or pull it out",
        AfterBoot,
        schema::<NetworkInterfaceUpdate>,
        r#"{"iface_id":"x","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":null,"link_up":true}"#,
    ),
    bare(
        "DELETE",
        "/network-interfaces/{id}",
        "Unplug a network interface, with PCI",
        AfterBoot,
    ),
    change(
        "PUT",
        "/vsock",
        "Sockets between host and guest",
        BeforeBoot,
        schema::<Vsock>,
        r#"{"guest_cid":3,"uds_path":"/v","vsock_id":"old"}"#,
    ),
    change(
        "PUT",
        "/balloon",
        "Memory that the guest gives back",
        BeforeBoot,
        schema::<Balloon>,
        r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_hinting":true,"free_page_reporting":true}"#,
    ),
    change(
        "PATCH",
        "/balloon",
        "Change the balloon's size",
        AfterBoot,
        schema::<BalloonUpdate>,
        r#"{"amount_mib":1}"#,
    ),
    change(
        "PATCH",
        "/balloon/statistics",
        "Change how often the guest reports",
        AfterBoot,
        schema::<BalloonStatisticsUpdate>,
        r#"{"stats_polling_interval_s":1}"#,
    ),
    change(
        "PATCH",
        "/balloon/hinting/start",
        "Search for pages that the guest does not use; the body may be absent",
        AfterBoot,
        schema::<HintingStart>,
        r#"{"acknowledge_on_stop":true}"#,
    ),
    bare(
        "PATCH",
        "/balloon/hinting/stop",
        "Let the guest use all of its pages again",
        AfterBoot,
    ),
    change(
        "PUT",
        "/entropy",
        "A source of random bytes",
        BeforeBoot,
        schema::<Entropy>,
        r#"{"rate_limiter":{"bandwidth":{"size":1,"refill_time":2}}}"#,
    ),
    change(
        "PUT",
        "/serial",
        "Where the console's output goes",
        BeforeBoot,
        schema::<Serial>,
        r#"{"serial_out_path":"/out","rate_limiter":{"size":1,"refill_time":2}}"#,
    ),
    change(
        "PUT",
        "/mmds",
        "Replace the guest's metadata",
        Any,
        schema::<Metadata>,
        r#"{"any":{"thing":[1,null]}}"#,
    ),
    change(
        "PATCH",
        "/mmds",
        "Merge into the guest's metadata (RFC 7396)",
        Any,
        schema::<Metadata>,
        r#"{"any":null}"#,
    ),
    change(
        "PUT",
        "/mmds/config",
        "How the guest reaches its metadata",
        BeforeBoot,
        schema::<MmdsConfig>,
        r#"{"network_interfaces":["x"],"version":"V2","ipv4_address":"169.254.170.2","imds_compat":true}"#,
    ),
    change(
        "PUT",
        "/logger",
        "Log messages",
        BeforeBoot,
        schema::<Logger>,
        r#"{"log_path":"/log","level":"Warning","show_level":true,"show_log_origin":true,"module":"husk"}"#,
    ),
    change(
        "PUT",
        "/metrics",
        "Where metrics go",
        BeforeBoot,
        schema::<Metrics>,
        r#"{"metrics_path":"/metrics"}"#,
    ),
    change(
        "PATCH",
        "/vm",
        "Pause or resume the guest",
        AfterBoot,
        schema::<VmUpdate>,
        r#"{"state":"Paused"}"#,
    ),
    change(
        "PUT",
        "/snapshot/create",
        "Keep all of a VM that is paused",
        AfterBoot,
        schema::<CreateSnapshot>,
        r#"{"snapshot_path":"/s","mem_file_path":"/m","snapshot_type":"Full"}"#,
    ),
    change(
        "PUT",
        "/snapshot/load",
        "Go on from a snapshot. When this fails, the process ends",
        BeforeBoot,
        schema::<LoadSnapshot>,
        r#"{"snapshot_path":"/s","mem_backend":{"backend_type":"File","backend_path":"/m"},"mem_file_path":"/m","track_dirty_pages":true,"resume_vm":true,"huge_pages":"2M","record_working_set":"/w","prefetch":"/w","network_overrides":[{"iface_id":"x","host_dev_name":"tap1","guest_mac":"02:00:00:00:00:01"}],"drive_overrides":[{"drive_id":"x","path_on_host":"/p"}],"vsock_override":{"uds_path":"/v","guest_cid":4}}"#,
    ),
    change(
        "PUT",
        "/pmem/{id}",
        "Not supported yet",
        Never,
        schema::<Metadata>,
        r#"{"id":"x","path_on_host":"/p"}"#,
    ),
    change(
        "PATCH",
        "/pmem/{id}",
        "Not supported yet",
        Never,
        schema::<Metadata>,
        r#"{"id":"x"}"#,
    ),
    bare("DELETE", "/pmem/{id}", "Not supported yet", Never),
    change(
        "PUT",
        "/hotplug/memory",
        "Not supported yet",
        Never,
        schema::<Metadata>,
        r#"{"total_size_mib":1024}"#,
    ),
    change(
        "PATCH",
        "/hotplug/memory",
        "Not supported yet",
        Never,
        schema::<Metadata>,
        r#"{"requested_size_mib":512}"#,
    ),
];

/// What happens, for watchers.
pub fn event(generator: &mut SchemaGenerator) -> Schema {
    schema::<Event>(generator)
}
