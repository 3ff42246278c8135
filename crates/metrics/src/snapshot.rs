//! What all values were at one time.

use crate::family::{Family, Naming};
use crate::section::{Metric, Section};
use crate::value::Latencies;
use std::sync::Arc;

/// A value at the time of a snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reading {
    Counter { total: u64, untold: u64 },
    Gauge(u64),
    Micros(u64),
    Latency(Latencies),
}

/// A value with its name and help text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub name: &'static str,
    pub help: &'static str,
    pub reading: Reading,
}

/// The values of a section of [`crate::Metrics`], and of each of its members where it is a family.
pub(crate) struct Group {
    pub name: &'static str,
    pub naming: Option<Naming>,
    /// Of all members together.
    pub fields: Vec<Field>,
    pub members: Vec<Member>,
}

/// A device, or the section itself where it is no family.
pub(crate) struct Member {
    pub id: Arc<str>,
    pub fields: Vec<Field>,
    owner: Owner,
}

enum Owner {
    Process(&'static dyn Section),
    Device(Arc<dyn Section>),
}

impl Owner {
    fn section(&self) -> &dyn Section {
        match self {
            Owner::Process(section) => *section,
            Owner::Device(section) => section.as_ref(),
        }
    }
}

/// What can be made into a group.
pub(crate) trait Grouped {
    fn group(&'static self, name: &'static str) -> Group;
    fn forget_gone(&self) {}
}

impl<T: Section> Grouped for T {
    fn group(&'static self, name: &'static str) -> Group {
        let fields = read(self);
        let member = Member {
            id: "".into(),
            fields: fields.clone(),
            owner: Owner::Process(self),
        };
        Group {
            name,
            naming: None,
            fields,
            members: vec![member],
        }
    }
}

impl<T: Section + Default + 'static> Grouped for Family<T> {
    fn group(&'static self, name: &'static str) -> Group {
        let mut fields = read(&T::default());
        let members = self.all().into_iter().map(|(id, own)| {
            let own_fields = read(own.as_ref());
            for (sum, field) in fields.iter_mut().zip(&own_fields) {
                sum.reading.add(&field.reading);
            }
            Member {
                id,
                fields: own_fields,
                owner: Owner::Device(own),
            }
        });
        let members = members.collect();
        Group {
            name,
            naming: Some(self.naming()),
            fields,
            members,
        }
    }

    fn forget_gone(&self) {
        Family::forget_gone(self);
    }
}

impl Reading {
    /// What `metric` is now.
    pub(crate) fn of(metric: Metric<'_>) -> Self {
        match metric {
            Metric::Counter(counter) => {
                let total = counter.total();
                Reading::Counter {
                    total,
                    untold: counter.untold(total),
                }
            }
            Metric::Gauge(gauge) => Reading::Gauge(gauge.get()),
            Metric::Micros(micros) => Reading::Micros(micros.get()),
            Metric::Latency(latency) => Reading::Latency(latency.read()),
        }
    }

    pub(crate) fn add(&mut self, other: &Reading) {
        match (self, other) {
            (
                Reading::Counter { total, untold },
                Reading::Counter {
                    total: more,
                    untold: news,
                },
            ) => {
                *total = total.wrapping_add(*more);
                *untold = untold.wrapping_add(*news);
            }
            (Reading::Latency(sum), Reading::Latency(more)) => sum.add(more),
            (Reading::Gauge(sum), Reading::Gauge(more))
            | (Reading::Micros(sum), Reading::Micros(more)) => *sum = sum.wrapping_add(*more),
            // The members of a family have the same fields.
            _ => {}
        }
    }
}

impl Group {
    /// The readings have been told.
    pub(crate) fn tell(&self) {
        for member in &self.members {
            let mut fields = member.fields.iter();
            member.owner.section().visit(&mut |_, _, metric| match (
                metric,
                fields.next().map(|field| field.reading),
            ) {
                (Metric::Counter(counter), Some(Reading::Counter { total, .. })) => {
                    counter.tell(total);
                }
                (Metric::Latency(latency), Some(Reading::Latency(all))) => {
                    latency.tell(all.sum_ns);
                }
                _ => {}
            });
        }
    }
}

fn read(section: &dyn Section) -> Vec<Field> {
    let mut fields = Vec::new();
    section.visit(&mut |name, help, metric| {
        fields.push(Field {
            name,
            help: help.trim(),
            reading: Reading::of(metric),
        });
    });
    fields
}
