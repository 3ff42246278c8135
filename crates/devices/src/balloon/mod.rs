//! virtio-balloon (virtio 1.2, 5.5): the guest gives memory back to the host.

mod discard;
mod statistics;

pub use statistics::Statistics;

use discard::discard;
use husk_config::{Balloon as Config, DeviceUpdate, Hinting};
use husk_metrics::{BalloonMetrics, Counter, METRICS};
use husk_virtio::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, DeviceState, QueueError, VirtioDevice,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

/// The balloon's unit, whatever the guest's page size (5.5.6).
const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
const QUEUE_SIZE: u16 = 256;
/// Requests that are answered before other devices have their turn.
const BATCH: usize = 64;
/// Bytes of page numbers that are read at a time.
const CHUNK: usize = 4096;

/// Feature bits (5.5.3), which virtio-bindings does not have: VIRTIO_BALLOON_F_STATS_VQ and so on.
const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const HINTING: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;

/// Offsets in the configuration space (5.5.4).
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const HINT_COMMAND: usize = 8;
/// Length of the configuration space: page poisoning is not offered, but its field is there.
const CONFIG_SIZE: usize = 16;

/// No hinting is wanted, and all pages that were hinted may be used again (5.5.6.7).
const HINT_STOP: u32 = 0;
const HINT_DONE: u32 = 1;
/// Commands count up from here.
const HINT_FIRST: u32 = 2;

/// What a queue is for. Which number it has depends on the features: those that were not negotiated leave no gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// The device.
pub struct Balloon {
    config: Arc<ConfigSpace>,
    features: u64,
    queues: Vec<(Purpose, ActiveQueue)>,
    chain: Chain,
    chunk: Vec<u8>,
    /// The guest's buffer for statistics, which it gets back when it is to fill it again.
    statistics_head: Option<u16>,
    statistics: Statistics,
    timer: OwnedFd,
    interval_s: u16,
    hint_command: u32,
    /// The guest is sending pages for this command.
    hint_from_guest: u32,
    /// Let the guest use hinted pages again as soon as it has told all.
    acknowledge: bool,
    metrics: Arc<BalloonMetrics>,
}

impl Balloon {
    /// Fails only when the host has no more descriptors.
    pub fn new(config: &Config) -> std::io::Result<Self> {
        let mut features = STATS;
        for (wanted, bit) in [
            (config.deflate_on_oom, DEFLATE_ON_OOM),
            (config.free_page_hinting, HINTING),
            (config.free_page_reporting, REPORTING),
        ] {
            features |= if wanted { bit } else { 0 };
        }
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let mut balloon = Self {
            config: ConfigSpace::new(vec![0; CONFIG_SIZE]),
            features,
            queues: Vec::new(),
            chain: Chain::default(),
            chunk: vec![0; CHUNK],
            statistics_head: None,
            statistics: Statistics::default(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            interval_s: config.stats_polling_interval_s,
            hint_command: HINT_STOP,
            hint_from_guest: HINT_STOP,
            acknowledge: false,
            metrics: METRICS.balloon.member(""),
        };
        balloon.set_amount(config.amount_mib);
        Ok(balloon)
    }

    /// Memory that the guest is asked to give back, and has given back, in MiB.
    pub fn amounts_mib(&self) -> (u32, u32) {
        let field = |offset: usize| {
            let mut bytes = [0; 4];
            self.config.read(offset as u64, &mut bytes);
            u32::from_le_bytes(bytes) / PAGES_PER_MIB
        };
        (field(NUM_PAGES), field(ACTUAL))
    }

    /// What the guest said last.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Ask the guest for the pages that it does not use, and give them back to the host; false: let it use them again.
    pub fn hint(&mut self, start: bool) {
        let command = match start {
            true => self.hint_command.max(HINT_FIRST - 1).checked_add(1),
            false => Some(HINT_DONE),
        }
        .unwrap_or(HINT_FIRST);
        self.set_hint_command(command);
        self.tell_driver();
    }

    fn set_hint_command(&mut self, command: u32) {
        self.hint_command = command;
        self.config.set(HINT_COMMAND, &command.to_le_bytes());
    }

    fn set_amount(&mut self, mib: u32) {
        let pages = mib.saturating_mul(PAGES_PER_MIB);
        self.config.set(NUM_PAGES, &pages.to_le_bytes());
        self.tell_driver();
    }

    fn tell_driver(&self) {
        if let Some((_, queue)) = self.queues.first() {
            queue.interrupt().config();
        }
    }

    /// The queues that there are with these features, in order.
    fn purposes(features: u64) -> Vec<Purpose> {
        let optional = [
            (STATS, Purpose::Statistics),
            (HINTING, Purpose::Hinting),
            (REPORTING, Purpose::Reporting),
        ];
        let optional = optional
            .into_iter()
            .filter(|(bit, _)| features & bit != 0)
            .map(|(_, purpose)| purpose);
        [Purpose::Inflate, Purpose::Deflate]
            .into_iter()
            .chain(optional)
            .collect()
    }

    fn arm(&self) {
        let every = Timespec {
            tv_sec: self.interval_s.into(),
            tv_nsec: 0,
        };
        let timer = Itimerspec {
            it_interval: every,
            it_value: every,
        };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            log::warn!("the balloon's statistics have no timer: {e}");
        }
    }

    /// Answer what is in the queue at `at` of our list.
    fn serve(&mut self, at: usize) -> Result<(), DeviceError> {
        let Some((purpose, mut queue)) = (at < self.queues.len()).then(|| self.queues.remove(at))
        else {
            return Ok(());
        };
        let result = self.serve_queue(purpose, &mut queue);
        let index = queue.index();
        self.queues.insert(at, (purpose, queue));
        let result = result.inspect_err(|_| self.metrics.event_fails.inc());
        result.map_err(|e| DeviceError::Queue(index, e))
    }

    fn serve_queue(&mut self, purpose: Purpose, queue: &mut ActiveQueue) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain)? {
                queue.flush()?;
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            }
            match purpose {
                Purpose::Inflate => self.inflate(queue)?,
                // Memory comes back when the guest touches it.
                Purpose::Deflate => self.metrics.deflate_count.inc(),
                Purpose::Reporting => {
                    let m = &self.metrics;
                    let (count, freed) = (&m.free_page_report_count, &m.free_page_report_freed);
                    self.discard_writable(queue, [count, freed, &m.free_page_report_fails]);
                }
                Purpose::Hinting => self.take_hint(queue)?,
                Purpose::Statistics => {
                    self.take_statistics(queue)?;
                    continue;
                }
            }
            queue.add_used(self.chain.head, 0)?;
        }
        queue.flush()?;
        // More is waiting; at its maximum the counter is readable already.
        let _ = queue.kick().write(1);
        Ok(())
    }

    /// Page numbers of 32 bits; neighbours go back to the host together.
    fn inflate(&mut self, queue: &ActiveQueue) -> Result<(), QueueError> {
        self.metrics.inflate_count.inc();
        let mem = queue.memory();
        let mut offset = 0;
        // The run of pages that is being collected: its first and the one behind its last.
        let mut run: Option<(u64, u64)> = None;
        loop {
            let count = self.chain.read(mem, offset, &mut self.chunk)?;
            for number in self.chunk.get(..count).unwrap_or_default().chunks_exact(4) {
                let page = number.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
                run = match run {
                    Some((first, end)) if page == end => Some((first, end + 1)),
                    Some((first, end)) if page + 1 == first => Some((page, end)),
                    other => {
                        if let Some((first, end)) = other {
                            give_back(queue, first, end);
                        }
                        Some((page, page + 1))
                    }
                };
            }
            offset += count as u64;
            if count < self.chunk.len() {
                break;
            }
        }
        if let Some((first, end)) = run {
            give_back(queue, first, end);
        }
        Ok(())
    }

    /// Ranges of free memory go back to the host.
    fn discard_writable(&self, queue: &ActiveQueue, [count, freed, fails]: [&Counter; 3]) {
        for buffer in &self.chain.writable {
            count.inc();
            match discard(queue.memory(), buffer.address.0, buffer.length.into()) {
                0 => fails.inc(),
                bytes => freed.add(bytes),
            }
        }
    }

    /// 5.5.6.7: the command's number comes first, then pages, then 0.
    fn take_hint(&mut self, queue: &ActiveQueue) -> Result<(), QueueError> {
        let mut number = [0; 4];
        if self.chain.read(queue.memory(), 0, &mut number)? == number.len() {
            let before = std::mem::replace(&mut self.hint_from_guest, u32::from_le_bytes(number));
            let all_told = self.hint_from_guest == HINT_STOP && before == self.hint_command;
            if all_told && self.acknowledge && before >= HINT_FIRST {
                self.set_hint_command(HINT_DONE);
                queue.interrupt().config();
            }
        }
        if self.hint_from_guest >= HINT_FIRST && self.hint_from_guest == self.hint_command {
            let m = &self.metrics;
            let (count, freed) = (&m.free_page_hint_count, &m.free_page_hint_freed);
            self.discard_writable(queue, [count, freed, &m.free_page_hint_fails]);
        }
        Ok(())
    }

    /// The guest's numbers; the buffer stays here until new ones are wanted.
    fn take_statistics(&mut self, queue: &mut ActiveQueue) -> Result<(), QueueError> {
        let count = self.chain.read(queue.memory(), 0, &mut self.chunk)?;
        self.metrics.stats_updates_count.inc();
        self.statistics
            .take(self.chunk.get(..count).unwrap_or_default());
        // A driver has one buffer. Another one would be lost: it gets the first back.
        if let Some(head) = self.statistics_head.replace(self.chain.head) {
            queue.add_used(head, 0)?;
        }
        Ok(())
    }

    /// Give the buffer for statistics back, which asks for new ones.
    fn ask_for_statistics(&mut self) -> Result<(), DeviceError> {
        let mut queues = self.queues.iter_mut();
        let queue = queues.find(|(purpose, _)| *purpose == Purpose::Statistics);
        let (Some((_, queue)), Some(head)) = (queue, self.statistics_head.take()) else {
            return Ok(());
        };
        let index = queue.index();
        let answer = queue.add_used(head, 0).and_then(|()| queue.flush());
        answer.map_err(|e| DeviceError::Queue(index, e))
    }
}

/// The pages from `first` on, without `end`, go back to the host, and change by that.
fn give_back(queue: &ActiveQueue, first: u64, end: u64) {
    let (address, length) = (first * PAGE, (end - first) * PAGE);
    discard(queue.memory(), address, length);
    queue.note_written(address, length);
}

impl VirtioDevice for Balloon {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: VIRTIO_ID_BALLOON,
            features: self.features,
            queue_sizes: vec![QUEUE_SIZE; Self::purposes(self.features).len()],
            config: Arc::clone(&self.config),
        }
    }

    /// The driver says how much it has given back.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL as u64 && data.len() == 4 {
            self.config.set(ACTUAL, data);
        } else {
            self.metrics.cfg_fails.inc();
        }
    }

    fn start(&mut self, features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        let purposes = Self::purposes(features);
        for queue in queues {
            if let Some(&purpose) = purposes.get(usize::from(queue.index())) {
                self.queues.push((purpose, queue));
            }
        }
        self.arm();
        Ok(())
    }

    fn not_started(&mut self) {
        self.metrics.activate_fails.inc();
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.statistics_head = None;
        self.hint_from_guest = HINT_STOP;
        self.config.set(ACTUAL, &[0; 4]);
        self.suspend()
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        self.queues.drain(..).map(|(_, queue)| queue).collect()
    }

    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError> {
        let at = self.queues.iter().position(|(_, q)| q.index() == index);
        at.map_or(Ok(()), |at| self.serve(at))
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.timer.as_raw_fd(), 0)]
    }

    fn source_ready(&mut self, _token: u32) -> Result<(), DeviceError> {
        // How often it expired does not matter.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        let asked = self.ask_for_statistics();
        asked.inspect_err(|_| self.metrics.stats_update_fails.inc())
    }

    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        let DeviceUpdate::Balloon {
            amount_mib,
            stats_polling_interval_s,
            hinting,
        } = change
        else {
            let why = format!("the balloon does not take {change:?}");
            return Err(DeviceError::Unsupported(why));
        };
        if hinting.is_some() && self.features & HINTING == 0 {
            let why = "the balloon was made without free page hinting".into();
            return Err(DeviceError::Unsupported(why));
        }
        match *hinting {
            Some(Hinting::Start {
                acknowledge_on_stop,
            }) => {
                self.acknowledge = acknowledge_on_stop;
                self.hint(true);
            }
            Some(Hinting::Stop) => self.hint(false),
            None => {}
        }
        if let Some(mib) = amount_mib {
            self.set_amount(*mib);
        }
        if let Some(seconds) = stats_polling_interval_s {
            self.interval_s = *seconds;
            self.arm();
        }
        Ok(())
    }

    /// `target_pages`, `actual_pages`, `target_mib`, `actual_mib`, the guest's statistics under `statistics`, and
    /// `host_cmd` and `guest_cmd` of a search for free pages under `hinting`.
    fn report(&self) -> serde_json::Value {
        let (target, actual) = self.amounts_mib();
        let statistics = self.statistics.iter();
        serde_json::json!({
            "target_pages": target * PAGES_PER_MIB,
            "actual_pages": actual * PAGES_PER_MIB,
            "target_mib": target,
            "actual_mib": actual,
            "statistics": statistics.collect::<std::collections::BTreeMap<_, _>>(),
            "hinting": {
                "host_cmd": self.hint_command,
                "guest_cmd": Some(self.hint_from_guest).filter(|_| self.hint_command != HINT_STOP),
            },
        })
    }

    fn save(&self) -> DeviceState {
        let mut actual = [0; 4];
        self.config.read(ACTUAL as u64, &mut actual);
        serde_json::json!({
            "actual": u32::from_le_bytes(actual),
            "hint_command": self.hint_command,
            "hint_from_guest": self.hint_from_guest,
            "acknowledge": self.acknowledge,
            "statistics_head": self.statistics_head,
        })
    }

    fn load(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let number = |name: &str| {
            let number = state.get(name).and_then(DeviceState::as_u64);
            number.and_then(|number| u32::try_from(number).ok())
        };
        let numbers = (
            number("actual"),
            number("hint_command"),
            number("hint_from_guest"),
        );
        let (Some(actual), Some(command), Some(from_guest)) = numbers else {
            let why = "the balloon cannot go on from what was saved";
            return Err(DeviceError::Unsupported(why.into()));
        };
        self.config.set(ACTUAL, &actual.to_le_bytes());
        self.set_hint_command(command);
        self.hint_from_guest = from_guest;
        let acknowledge = state.get("acknowledge").and_then(DeviceState::as_bool);
        self.acknowledge = acknowledge.unwrap_or(false);
        self.statistics_head = number("statistics_head").and_then(|head| u16::try_from(head).ok());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
