//! From a method, a path and a body to a request. A pure function, so that it can be tested and attacked alone.

use husk_config::{DeviceUpdate, Hinting, Part, Query, RateLimiter, VmmRequest};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::PathBuf;

/// What a client wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// For the monitor.
    Vmm(VmmRequest),
    /// The description of this API.
    OpenApi,
    /// To be told what happens, until it hangs up.
    Events,
}

/// A request that was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// What it wants.
    pub call: Call,
    /// A field in it will go away.
    pub deprecated: Option<&'static str>,
}

/// Why a request was not understood. The texts are those that Firecracker's clients know, where they know one.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// No such path, or not with this method.
    #[error("Invalid request method and/or path: {0} {1}.")]
    Path(String, String),
    /// A body is missing.
    #[error("Empty {0} request.")]
    NoBody(String),
    /// A body that must not be.
    #[error("{0} request cannot have a body.")]
    Body(String),
    /// The path names no device.
    #[error("The ID cannot be empty.")]
    EmptyId,
    /// The path names something that cannot be a device.
    #[error("API Resource IDs can only contain alphanumeric characters and underscores.")]
    Id,
    /// The body names another device than the path.
    #[error("The id from the path does not match the id from the body!")]
    OtherId,
    /// Not JSON, or not what belongs there.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
    /// Not an object.
    #[error(
        "An error occurred when deserializing the json body of a request: it is not a JSON object {{…}}."
    )]
    NoObject,
    /// What is not there yet.
    #[error("{0} is not supported yet.")]
    Unsupported(&'static str),
}

/// Understand a request. `target` is the path, with or without a query; an empty `body` is none.
pub fn parse(method: &str, target: &str, body: &[u8]) -> Result<Parsed, Refused> {
    let path = target.split(['?', '#']).next().unwrap_or_default();
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let segments: Vec<&str> = path.split('/').collect();
    let request = Request {
        method,
        path: target,
        body,
    };
    match method {
        "GET" => request.get(&segments),
        "PUT" => request.put(&segments),
        "PATCH" => request.patch(&segments),
        "DELETE" => request.delete(&segments),
        _ => Err(request.unknown()),
    }
}

struct Request<'a> {
    method: &'a str,
    path: &'a str,
    body: &'a [u8],
}

type Result2 = Result<Parsed, Refused>;

fn done(call: Call) -> Result2 {
    Ok(Parsed {
        call,
        deprecated: None,
    })
}

fn vmm(request: VmmRequest) -> Result2 {
    done(Call::Vmm(request))
}

fn part(part: Part) -> Result2 {
    vmm(VmmRequest::Put(Box::new(part)))
}

const PMEM: &str = "A pmem device";
const MEMORY_HOTPLUG: &str = "Memory hot-plug";

impl Request<'_> {
    fn get(&self, segments: &[&str]) -> Result2 {
        let query = match segments {
            [""] => Query::Info,
            ["version"] => Query::Version,
            ["vm", "config"] => Query::Config,
            ["machine-config"] => Query::MachineConfig,
            ["mmds"] => Query::Mmds,
            ["balloon"] => Query::Balloon,
            ["balloon", "statistics"] => Query::BalloonStatistics,
            ["balloon", "hinting", "status"] => Query::BalloonHinting,
            ["hotplug", "memory"] => return Err(Refused::Unsupported(MEMORY_HOTPLUG)),
            ["husk", "metrics"] => Query::Metrics,
            ["husk", "boot-timeline"] => Query::BootTimeline,
            ["husk", "openapi.json"] => return self.without_body(Call::OpenApi),
            ["husk", "events"] => return self.without_body(Call::Events),
            _ => return Err(self.unknown()),
        };
        self.without_body(Call::Vmm(VmmRequest::Get(query)))
    }

    fn put(&self, segments: &[&str]) -> Result2 {
        match segments {
            ["actions"] => self.action(),
            ["boot-source"] => part(Part::BootSource(self.object()?)),
            ["machine-config"] => {
                let deprecated = self.has("cpu_template");
                let message = "PUT /machine-config: cpu_template field is deprecated.";
                Ok(Parsed {
                    deprecated: deprecated.then_some(message),
                    ..part(Part::MachineConfig(self.object()?))?
                })
            }
            ["cpu-config"] => part(Part::CpuConfig(self.object()?)),
            ["drives", id] => {
                let drive: husk_config::Drive = self.object()?;
                same_id(id, &drive.drive_id)?;
                part(Part::Drive(drive))
            }
            ["network-interfaces", id] => {
                let interface: husk_config::NetworkInterface = self.object()?;
                same_id(id, &interface.iface_id)?;
                part(Part::NetworkInterface(interface))
            }
            ["vsock"] => {
                let vsock: husk_config::Vsock = self.object()?;
                let deprecated = vsock.vsock_id.is_some();
                Ok(Parsed {
                    deprecated: deprecated.then_some("PUT /vsock: vsock_id field is deprecated."),
                    ..part(Part::Vsock(vsock))?
                })
            }
            ["balloon"] => part(Part::Balloon(self.object()?)),
            ["logger"] => part(Part::Logger(self.object()?)),
            ["metrics"] => part(Part::Metrics(self.object()?)),
            ["entropy"] => part(Part::Entropy(self.object()?)),
            ["serial"] => part(Part::Serial(self.object()?)),
            ["mmds"] => vmm(VmmRequest::PutMmds(self.any_object()?)),
            ["mmds", "config"] => self.mmds_config(),
            ["pmem", id] => self.not_yet(Some(id), PMEM),
            ["hotplug", "memory"] => self.not_yet(None, MEMORY_HOTPLUG),
            ["snapshot", "create"] => vmm(VmmRequest::CreateSnapshot(Box::new(self.object()?))),
            ["snapshot", "load"] => {
                let load: husk_config::LoadSnapshot = self.object()?;
                let old = load.mem_file_path.is_some() || self.has("enable_diff_snapshots");
                let message = "PUT /snapshot/load: mem_file_path or enable_diff_snapshots fields are deprecated.";
                Ok(Parsed {
                    deprecated: old.then_some(message),
                    ..vmm(VmmRequest::LoadSnapshot(Box::new(load)))?
                })
            }
            ["husk", "fork"] => vmm(VmmRequest::Fork(Box::new(self.object()?))),
            ["husk", "actions"] => {
                let OwnAction { action_type } = self.object()?;
                vmm(match action_type {
                    OwnActionType::PressPowerButton => VmmRequest::PressPowerButton,
                    OwnActionType::Stop => VmmRequest::Stop,
                })
            }
            ["drives" | "network-interfaces" | "pmem"] => self.no_id(),
            _ => Err(self.unknown()),
        }
    }

    fn patch(&self, segments: &[&str]) -> Result2 {
        match segments {
            ["machine-config"] => {
                let change: husk_config::MachineConfigUpdate = self.object()?;
                if change.is_empty() {
                    return Err(Refused::NoBody(self.method.into()));
                }
                let deprecated = change.cpu_template.is_some();
                let message = "PATCH /machine-config: cpu_template field is deprecated.";
                Ok(Parsed {
                    deprecated: deprecated.then_some(message),
                    ..vmm(VmmRequest::PatchMachine(change))?
                })
            }
            ["drives", id] => {
                let change: DriveUpdate = self.object()?;
                same_id(id, &change.drive_id)?;
                let update = DeviceUpdate::Disk {
                    path: change.path_on_host,
                    rate_limiter: change.rate_limiter,
                };
                vmm(VmmRequest::Update(change.drive_id, update))
            }
            ["network-interfaces", id] => {
                let change: NetworkInterfaceUpdate = self.object()?;
                same_id(id, &change.iface_id)?;
                let update = DeviceUpdate::Network {
                    rx_rate_limiter: change.rx_rate_limiter,
                    tx_rate_limiter: change.tx_rate_limiter,
                    link_up: change.link_up,
                };
                vmm(VmmRequest::Update(change.iface_id, update))
            }
            ["balloon"] => {
                let BalloonUpdate { amount_mib } = self.object()?;
                balloon(Some(amount_mib), None, None)
            }
            ["balloon", "statistics"] => {
                let change: BalloonStatisticsUpdate = self.object()?;
                balloon(None, Some(change.stats_polling_interval_s), None)
            }
            ["balloon", "hinting", "start"] => {
                let start: HintingStart = match self.body {
                    [] => HintingStart::default(),
                    _ => self.object()?,
                };
                let hinting = Hinting::Start {
                    acknowledge_on_stop: start.acknowledge_on_stop,
                };
                balloon(None, None, Some(hinting))
            }
            // Some clients send an empty object.
            ["balloon", "hinting", "stop"] => balloon(None, None, Some(Hinting::Stop)),
            ["mmds"] => vmm(VmmRequest::PatchMmds(self.any_object()?)),
            ["vm"] => {
                let VmUpdate { state } = self.object()?;
                vmm(match state {
                    VmState::Paused => VmmRequest::Pause,
                    VmState::Resumed => VmmRequest::Resume,
                })
            }
            ["pmem", id] => self.not_yet(Some(id), PMEM),
            ["hotplug", "memory"] => self.not_yet(None, MEMORY_HOTPLUG),
            ["drives" | "network-interfaces" | "pmem"] => self.no_id(),
            _ => Err(self.unknown()),
        }
    }

    fn delete(&self, segments: &[&str]) -> Result2 {
        match segments {
            ["drives" | "network-interfaces", id] => {
                check_id(id)?;
                self.without_body(Call::Vmm(VmmRequest::Detach((*id).into())))
            }
            ["husk", "fork", name] => {
                self.without_body(Call::Vmm(VmmRequest::DropTemplate((*name).into())))
            }
            ["pmem", id] => check_id(id).and(Err(Refused::Unsupported(PMEM))),
            ["drives" | "network-interfaces" | "pmem"] => Err(Refused::EmptyId),
            _ => Err(self.unknown()),
        }
    }

    fn action(&self) -> Result2 {
        let Action { action_type } = self.object()?;
        vmm(match action_type {
            ActionType::InstanceStart => VmmRequest::Boot,
            ActionType::FlushMetrics => VmmRequest::FlushMetrics,
            ActionType::SendCtrlAltDel => VmmRequest::SendCtrlAltDel,
        })
    }

    fn unknown(&self) -> Refused {
        Refused::Path(self.method.into(), self.path.into())
    }

    fn without_body(&self, call: Call) -> Result2 {
        match self.body {
            [] => done(call),
            _ => Err(Refused::Body(self.method.into())),
        }
    }

    fn not_yet(&self, id: Option<&str>, what: &'static str) -> Result2 {
        id.map_or(Ok(()), check_id)?;
        self.any_object()?;
        Err(Refused::Unsupported(what))
    }

    fn no_id(&self) -> Result2 {
        match self.body {
            [] => Err(Refused::NoBody(self.method.into())),
            _ => Err(Refused::EmptyId),
        }
    }

    fn any_object(&self) -> Result<Value, Refused> {
        self.object::<serde_json::Map<String, Value>>()
            .map(Value::Object)
    }

    fn mmds_config(&self) -> Result2 {
        let config: husk_config::MmdsConfig = self.object()?;
        let deprecated = config.version == husk_config::MmdsVersion::V1;
        Ok(Parsed {
            deprecated: deprecated.then_some("PUT /mmds/config: V1 is deprecated."),
            ..part(Part::MmdsConfig(config))?
        })
    }

    /// The body is an object with this field.
    fn has(&self, field: &str) -> bool {
        let body: Result<Value, _> = serde_json::from_slice(self.body);
        body.is_ok_and(|body| body.get(field).is_some())
    }

    /// The body. Only an object is taken: serde alone would take a list for a structure, by the order of its fields.
    fn object<T: DeserializeOwned>(&self) -> Result<T, Refused> {
        if self.body.is_empty() {
            return Err(Refused::NoBody(self.method.into()));
        }
        let first = self.body.iter().find(|byte| !byte.is_ascii_whitespace());
        // An error of serde's tells more about what is no JSON at all.
        match (serde_json::from_slice(self.body), first) {
            (Err(e), _) => Err(e.into()),
            (Ok(_), first) if first != Some(&b'{') => Err(Refused::NoObject),
            (Ok(value), _) => Ok(value),
        }
    }
}

fn balloon(
    amount_mib: Option<u32>,
    stats_polling_interval_s: Option<u16>,
    hinting: Option<Hinting>,
) -> Result2 {
    let update = DeviceUpdate::Balloon {
        amount_mib,
        stats_polling_interval_s,
        hinting,
    };
    vmm(VmmRequest::Update("balloon".into(), update))
}

fn check_id(id: &str) -> Result<(), Refused> {
    match id {
        "" => Err(Refused::EmptyId),
        _ if id.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()) => Ok(()),
        _ => Err(Refused::Id),
    }
}

fn same_id(path: &str, body: &str) -> Result<(), Refused> {
    check_id(path)?;
    match path == body {
        true => Ok(()),
        false => Err(Refused::OtherId),
    }
}

/// Body of PUT `/actions`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    action_type: ActionType,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) enum ActionType {
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
}

/// Body of PUT `/husk/actions`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct OwnAction {
    action_type: OwnActionType,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) enum OwnActionType {
    PressPowerButton,
    Stop,
}

/// Body of PATCH `/drives/{id}`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct DriveUpdate {
    drive_id: String,
    path_on_host: Option<PathBuf>,
    rate_limiter: Option<RateLimiter>,
}

/// Body of PATCH `/network-interfaces/{id}`. The link is Husk's own.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkInterfaceUpdate {
    iface_id: String,
    rx_rate_limiter: Option<RateLimiter>,
    tx_rate_limiter: Option<RateLimiter>,
    link_up: Option<bool>,
}

/// Body of PATCH `/balloon`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonUpdate {
    amount_mib: u32,
}

/// Body of PATCH `/balloon/statistics`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonStatisticsUpdate {
    stats_polling_interval_s: u16,
}

/// Body of PATCH `/balloon/hinting/start`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HintingStart {
    acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

/// Body of PATCH `/vm`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct VmUpdate {
    state: VmState,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) enum VmState {
    Paused,
    Resumed,
}

#[cfg(test)]
mod any_json;
#[cfg(test)]
mod tests;
