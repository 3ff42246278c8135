//! What `husk run --timeline-file` wrote.

use husk_bench::{Phase, PhaseCounts};
use serde_json::Value;
use std::collections::BTreeMap;

/// Phases in ns since `spawned`, and what each cost. Empty where the process has written nothing.
pub fn read(text: &str, spawned: u64) -> (BTreeMap<Phase, u64>, Vec<PhaseCounts>) {
    let value: Value = serde_json::from_slice(text.as_bytes()).unwrap_or_default();
    let mut phases = BTreeMap::new();
    let mut costs = Vec::new();
    let Some(start) = value["start_ns"].as_u64() else {
        return (phases, costs);
    };
    let start = start.saturating_sub(spawned);
    phases.insert(Phase::Exec, start);
    let mut before = Cost::default();
    for reached in value["phases"].as_array().into_iter().flatten() {
        let (Some(phase), Some(ns)) = (phase(reached), reached["ns"].as_u64()) else {
            continue;
        };
        if phases.contains_key(&phase) {
            continue;
        }
        phases.insert(phase, start.saturating_add(ns));
        if let Some(cost) = Cost::of(&reached["cost"]) {
            costs.push(cost.since(&before, phase));
            before = cost;
        }
    }
    (phases, costs)
}

fn phase(reached: &Value) -> Option<Phase> {
    Some(match reached["phase"].as_str()? {
        "memory_ready" => Phase::VmReady,
        "kernel_loaded" => Phase::KernelLoaded,
        "guest_entered" => Phase::VcpuEntered,
        "first_exit" => Phase::FirstExit,
        "first_console_byte" => Phase::FirstConsoleByte,
        "mark" if reached["value"] == 0 => Phase::HandsOver,
        "mark" => Phase::Mark,
        _ => return None,
    })
}

/// What a run had cost up to a phase.
#[derive(Default)]
struct Cost {
    exits: BTreeMap<String, u64>,
    resident_pages: u64,
    bytes_read: u64,
}

impl Cost {
    fn of(value: &Value) -> Option<Self> {
        let exits = value["exits"].as_object()?;
        Some(Self {
            exits: exits
                .iter()
                .filter_map(|(reason, count)| Some((reason.clone(), count.as_u64()?)))
                .collect(),
            resident_pages: value["resident_pages"].as_u64()?,
            bytes_read: value["bytes_read"].as_u64()?,
        })
    }

    fn since(&self, before: &Self, phase: Phase) -> PhaseCounts {
        let exits = self.exits.iter().map(|(reason, count)| {
            let earlier = before.exits.get(reason).copied().unwrap_or_default();
            (reason.clone(), count.saturating_sub(earlier))
        });
        PhaseCounts {
            phase,
            exits: exits.filter(|&(_, count)| count > 0).collect(),
            pages_touched: self.resident_pages.saturating_sub(before.resident_pages),
            bytes_read: self.bytes_read.saturating_sub(before.bytes_read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_count_from_the_spawn_and_costs_from_the_phase_before() {
        let text = r#"{"start_ns": 1500, "phases": [
            {"phase": "asked", "ns": 5},
            {"phase": "memory_ready", "ns": 100, "cost": {"exits": {}, "resident_pages": 9, "bytes_read": 50}},
            {"phase": "mark", "value": 0, "ns": 200, "cost": {"exits": {"out to port 0x3f8": 2}, "resident_pages": 7, "bytes_read": 60}},
            {"phase": "mark", "value": 1, "ns": 300, "cost": {"exits": {"out to port 0x3f8": 5}, "resident_pages": 17, "bytes_read": 60}},
            {"phase": "mark", "value": 2, "ns": 400}]}"#;
        let (phases, costs) = read(text, 1000);
        let wanted = [
            (Phase::Exec, 500),
            (Phase::VmReady, 600),
            (Phase::HandsOver, 700),
            (Phase::Mark, 800),
        ];
        assert_eq!(phases, wanted.into());
        assert_eq!(costs.len(), 3);
        assert_eq!(costs[2].exits["out to port 0x3f8"], 3);
        assert_eq!((costs[1].pages_touched, costs[2].pages_touched), (0, 10));
        assert_eq!(costs[1].bytes_read, 10);
    }

    #[test]
    fn what_is_no_timeline_has_no_phases() {
        for text in ["", "{", "[]", r#"{"start_ns": -1}"#, r#"{"phases": 3}"#] {
            assert!(read(text, 0).0.is_empty(), "{text}");
        }
    }
}
