//! What the monitor tells of itself and of its VM.

use crate::{Error, State, Vmm};
use husk_config::{Answer, Balloon, IoEngine, Query, VmConfig};
use serde_json::{Value, json};

/// The name under which the balloon is known.
const BALLOON: &str = "balloon";

impl Vmm {
    pub(crate) fn get(&self, query: Query) -> Result<Answer, Error> {
        let value = match query {
            Query::Metrics => return Ok(Answer::Text(husk_metrics::prometheus())),
            Query::Info => Ok(self.info()),
            Query::Version => Ok(json!({
                "firecracker_version": self.host.identity.api_version,
                "husk_version": env!("CARGO_PKG_VERSION"),
            })),
            Query::Config => to_value(&shown(&self.config)),
            Query::MachineConfig => to_value(&self.config.machine_config),
            Query::Balloon => to_value(self.balloon()?),
            Query::BalloonStatistics => self.balloon_statistics(),
            Query::BalloonHinting => self.balloon_hinting(),
            Query::Mmds => Ok(match self.host.mmds.get() {
                Value::Null => json!({}),
                value => value,
            }),
            Query::BootTimeline => Ok(self.timeline()),
        };
        value.map(Answer::Value)
    }

    fn info(&self) -> Value {
        let identity = &self.host.identity;
        json!({
            "id": identity.id,
            "state": self.state_name(),
            "vmm_version": identity.version,
            "app_name": identity.name,
        })
    }

    /// As Firecracker's API names states.
    fn state_name(&self) -> &'static str {
        match self.state {
            State::Configuring | State::Built(_) => "Not started",
            State::Running(_) => "Running",
            State::Paused(_) => "Paused",
        }
    }

    fn balloon(&self) -> Result<&Balloon, Error> {
        let missing = || husk_config::Error::NoDevice(BALLOON.into());
        Ok(self.config.balloon.as_ref().ok_or_else(missing)?)
    }

    fn balloon_report(&self) -> Result<Value, Error> {
        match &self.state {
            State::Running(vm) | State::Paused(vm) => vm.report(BALLOON),
            State::Configuring | State::Built(_) => Err(Error::BeforeBoot),
        }
    }

    fn balloon_statistics(&self) -> Result<Value, Error> {
        if self.balloon()?.stats_polling_interval_s == 0 {
            return Err(Error::NotMade(BALLOON, "statistics"));
        }
        let Value::Object(mut told) = self.balloon_report()? else {
            return Ok(Value::Null);
        };
        told.remove("hinting");
        if let Some(Value::Object(statistics)) = told.remove("statistics") {
            told.extend(statistics);
        }
        Ok(told.into())
    }

    fn balloon_hinting(&self) -> Result<Value, Error> {
        if !self.balloon()?.free_page_hinting {
            return Err(Error::NotMade(BALLOON, "free page hinting"));
        }
        let mut report = self.balloon_report()?;
        Ok(report
            .get_mut("hinting")
            .map(Value::take)
            .unwrap_or_default())
    }

    /// Nanoseconds since the process began, in the order of time.
    fn timeline(&self) -> Value {
        let reached = self.host.timeline.reached();
        let phases = reached.iter().map(|reached| {
            let ns = u64::try_from(reached.at.as_nanos()).unwrap_or(u64::MAX);
            json!({ "phase": reached.phase.to_string(), "ns": ns })
        });
        json!({ "phases": phases.collect::<Vec<_>>() })
    }
}

/// As Firecracker's users know it: an engine is synchronous or it is not. `Auto` is the latter, where the host allows it.
fn shown(config: &VmConfig) -> VmConfig {
    let mut config = config.clone();
    for drive in &mut config.drives {
        // A server has what is null here.
        if drive.socket.is_some() {
            continue;
        }
        drive.is_read_only = Some(drive.read_only());
        drive.io_engine = Some(match drive.engine() {
            IoEngine::Auto => IoEngine::Async,
            engine => engine,
        });
    }
    config
}

fn to_value(part: &impl serde::Serialize) -> Result<Value, Error> {
    serde_json::to_value(part).map_err(|e| Error::Json(e.to_string()))
}
