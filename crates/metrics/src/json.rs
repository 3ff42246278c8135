//! A line of JSON, in Firecracker's shape.

use crate::family::Naming;
use crate::snapshot::{Field, Group, Reading};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// One object and a newline. Counters are told as what is untold of them.
pub(crate) fn line(utc_timestamp_ms: u64, groups: &[Group]) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = serde_json::to_vec(&Line(utc_timestamp_ms, groups))?;
    text.push(b'\n');
    Ok(text)
}

struct Line<'a>(u64, &'a [Group]);

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("utc_timestamp_ms", &self.0)?;
        for group in self.1 {
            if let Some(Naming::Listed(_)) = group.naming {
                for member in &group.members {
                    let name = format!("{}_{}", group.name, member.id);
                    map.serialize_entry(&name, &Fields(&member.fields))?;
                }
            }
            map.serialize_entry(group.name, &Fields(&group.fields))?;
        }
        map.end()
    }
}

struct Fields<'a>(&'a [Field]);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fields = self.0.iter().map(|field| (field.name, &field.reading));
        serializer.collect_map(fields)
    }
}

impl Serialize for Reading {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Reading::Counter { untold, .. } => serializer.serialize_u64(*untold),
            Reading::Gauge(value) | Reading::Micros(value) => serializer.serialize_u64(*value),
            Reading::Latency(all) => {
                let mut map = serializer.serialize_map(Some(3))?;
                map.serialize_entry("min_us", &(all.shortest_ns() / 1000))?;
                map.serialize_entry("max_us", &(all.max_ns / 1000))?;
                map.serialize_entry("sum_us", &all.untold_us())?;
                map.end()
            }
        }
    }
}
