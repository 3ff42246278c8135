//! virtio-net (virtio 1.2, 5.1): Ethernet between the guest and a tap device of the host, or, without privileges, `passt`.
//!
//! A packet is read and written by the host's kernel straight in guest memory, and checksums and segmentation are left to
//! whoever does them best ([`Net::new`]). A backend that fails, a tap that was deleted say, is a cable that was pulled out: the
//! guest sees its link go down, and everything else goes on.

mod backend;
mod control;
mod error;
mod features;
mod io;
mod launcher;
mod mmds;
mod passt;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;

pub use error::Error;
pub use launcher::{refuse as refuse_programs, start as start_launcher};

use crate::rate_limiter::RateLimiter;
use backend::{Backend, Event};
use features::{CTRL_VQ, MAC, MQ, MRG_RXBUF, MTU, STATUS};
use husk_bus::Interrupt;
use husk_config::{DeviceUpdate, NetworkInterface};
use husk_metrics::{METRICS, NetMetrics};
use husk_mmds::Stack;
use husk_virtio::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, DeviceState, F_RING_RESET,
    VirtioDevice,
};
use mmds::Detour;
use passt::Passt;
use rx::Rx;
use std::os::fd::RawFd;
use std::sync::Arc;
use tap::Tap;
use tx::Tx;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_S_LINK_UP;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// With the control queue, less than the 64 queues that a device may have.
const MOST_PAIRS: u16 = 31;
/// Offset of `status` in the configuration space (5.1.4).
const STATUS_OFFSET: usize = 6;

/// Tokens of sources: those of pairs begin at 0.
const WRITABLE: u32 = 1000;
const RX_TIMER: u32 = 1001;
const TX_TIMER: u32 = 1002;

/// The device.
pub struct Net {
    name: String,
    config: Arc<ConfigSpace>,
    features: u64,
    backend: Box<dyn Backend>,
    rx: Vec<Rx>,
    tx: Vec<Tx>,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    control: Option<ActiveQueue>,
    chain: Chain,
    /// Number of the control queue, by what the driver took (5.1.2).
    control_index: u16,
    /// Whether packets may take more than one chain.
    mergeable: bool,
    /// Pairs of queues that the driver uses.
    pairs: u16,
    /// As many, of a driver whose device was suspended or saved.
    loaded_pairs: Option<u16>,
    /// The cable is plugged in.
    plugged: bool,
    /// There is something at the other end of it.
    carrier: bool,
    interrupt: Option<Arc<dyn Interrupt>>,
    metrics: Arc<NetMetrics>,
}

/// What a queue is for.
enum Role {
    Control,
    /// Packets for the guest, of this pair.
    Receive(u16),
    /// Packets from it.
    Transmit(u16),
}

/// What a queue of packets works with.
struct Path<'a> {
    backend: &'a mut dyn Backend,
    limiter: &'a mut RateLimiter,
    /// The link is up, and the driver uses the pair; else packets are dropped.
    up: bool,
    metrics: &'a NetMetrics,
}

/// How work on a queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// For now.
    Done,
    /// The backend is gone.
    Gone,
}

/// How much may be done before others have their turn.
struct Budget {
    packets: u32,
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            packets: 256,
            bytes: 4 << 20,
        }
    }
}

impl Budget {
    /// Take a packet of `bytes` off; true when it was the last.
    fn is_spent(&mut self, bytes: u64) -> bool {
        self.packets = self.packets.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.packets == 0 || self.bytes == 0
    }
}

impl Net {
    /// The interface that `config` tells of; its backend is opened or started here, and stays open until the device is
    /// dropped. With a tap, the guest is offered all that the host's kernel can do for it; with `passt`, to trust checksums,
    /// and an MTU of 65520 unless `config` says less.
    pub fn new(config: &NetworkInterface) -> Result<Self, Error> {
        Self::with_backend(config, Self::open(config)?)
    }

    /// With the metadata service on the same cable. Its link is up even when the backend has failed. Only while stopped.
    pub fn with_mmds(mut self, stack: Stack) -> Result<Self, Error> {
        self.backend = Box::new(Detour::new(&self.name, self.backend, stack)?);
        Ok(self)
    }

    fn open(config: &NetworkInterface) -> Result<Box<dyn Backend>, Error> {
        if !(1..=MOST_PAIRS).contains(&config.queues) {
            return Err(Error::Pairs(config.queues));
        }
        Ok(match (&config.user, config.tap_fd) {
            (Some(user), _) => Box::new(Passt::start(config, user)?),
            (None, Some(number)) if config.queues > 1 => {
                return Err(Error::DescriptorQueues(number));
            }
            (None, Some(number)) => Box::new(Tap::adopt(number)?),
            (None, None) => Box::new(Tap::open(&config.host_dev_name, config.queues)?),
        })
    }

    fn with_backend(config: &NetworkInterface, backend: Box<dyn Backend>) -> Result<Self, Error> {
        let facts = backend.facts();
        let pairs = config.queues.clamp(1, MOST_PAIRS);
        let mtu = facts.mtu.or(config.mtu);
        let mut features = facts.features | F_RING_RESET;
        features |= 1 << MAC | 1 << STATUS | 1 << MRG_RXBUF;
        if mtu.is_some() {
            features |= 1 << MTU;
        }
        if pairs > 1 {
            features |= 1 << MQ | 1 << CTRL_VQ;
        }
        // struct virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu.
        let mut space = config.mac()?.to_vec();
        let up = VIRTIO_NET_S_LINK_UP as u16;
        for field in [up, pairs, mtu.unwrap_or(0)] {
            space.extend(field.to_le_bytes());
        }
        Ok(Self {
            name: config.iface_id.clone(),
            config: ConfigSpace::new(space),
            features,
            backend,
            rx: (0..pairs).map(Rx::new).collect(),
            tx: (0..pairs).map(Tx::new).collect(),
            rx_limiter: RateLimiter::new(config.rx_rate_limiter)?,
            tx_limiter: RateLimiter::new(config.tx_rate_limiter)?,
            control: None,
            chain: Chain::default(),
            control_index: u16::MAX,
            mergeable: false,
            pairs: 1,
            loaded_pairs: None,
            plugged: true,
            carrier: true,
            interrupt: None,
            metrics: METRICS.net.member(&config.iface_id),
        })
    }

    fn is_up(&self) -> bool {
        self.plugged && self.carrier
    }

    fn run_rx(&mut self, pair: u16) -> Result<(), DeviceError> {
        let up = self.is_up();
        let used = pair < self.pairs && self.carrier;
        let Some(rx) = self.rx.get_mut(usize::from(pair)).filter(|_| used) else {
            return Ok(());
        };
        let outcome = rx.run(&mut Path {
            backend: self.backend.as_mut(),
            limiter: &mut self.rx_limiter,
            up,
            metrics: &self.metrics,
        })?;
        self.take(outcome);
        Ok(())
    }

    fn run_tx(&mut self, pair: u16) -> Result<(), DeviceError> {
        let up = self.is_up() && pair < self.pairs;
        let Some(tx) = self.tx.get_mut(usize::from(pair)) else {
            return Ok(());
        };
        let outcome = tx.run(&mut Path {
            backend: self.backend.as_mut(),
            limiter: &mut self.tx_limiter,
            up,
            metrics: &self.metrics,
        })?;
        self.take(outcome);
        Ok(())
    }

    /// All queues one way.
    fn run_all(
        &mut self,
        run: fn(&mut Self, u16) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        (0..self.rx.len() as u16).try_for_each(|pair| run(self, pair))
    }

    fn take(&mut self, outcome: Outcome) {
        if outcome == Outcome::Gone && self.carrier {
            log::warn!(
                "the network interface {} has lost its other end: its link is down",
                self.name
            );
            let before = self.is_up();
            self.carrier = false;
            self.show_link(before);
        }
    }

    /// Tell the driver of the link, if it is not as it was `before`.
    fn show_link(&self, before: bool) {
        if before == self.is_up() {
            return;
        }
        let status = match self.is_up() {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        self.config.set(STATUS_OFFSET, &status.to_le_bytes());
        if let Some(interrupt) = &self.interrupt {
            interrupt.config();
        }
    }

    fn run_control(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.control else {
            return Ok(());
        };
        let (most, before) = (self.rx.len(), self.pairs);
        let (backend, pairs) = (&mut self.backend, &mut self.pairs);
        let set_pairs = |wanted: u16| {
            let done = (1..=most).contains(&usize::from(wanted))
                && backend
                    .set_pairs(wanted)
                    .inspect_err(|e| log::debug!("a tap device's queues cannot be set: {e}"))
                    .is_ok();
            if done {
                *pairs = wanted;
            }
            done
        };
        control::answer(queue, &mut self.chain, set_pairs)
            .map_err(|e| DeviceError::Queue(self.control_index, e))?;
        // Packets may have come before anyone looked.
        for pair in before..self.pairs {
            if let Some(rx) = self.rx.get_mut(usize::from(pair)) {
                rx.set_readable();
            }
            self.run_rx(pair)?;
        }
        Ok(())
    }

    /// What queue `index` is to the driver (5.1.2).
    fn role(&self, index: u16) -> Role {
        match (index / 2, index & 1) {
            _ if index == self.control_index => Role::Control,
            (pair, 0) => Role::Receive(pair),
            (pair, _) => Role::Transmit(pair),
        }
    }

    fn add_queue(&mut self, queue: ActiveQueue) {
        match self.role(queue.index()) {
            Role::Control => self.control = Some(queue),
            Role::Receive(pair) => {
                if let Some(rx) = self.rx.get_mut(usize::from(pair)) {
                    rx.start(queue, self.mergeable);
                }
            }
            Role::Transmit(pair) => {
                if let Some(tx) = self.tx.get_mut(usize::from(pair)) {
                    tx.start(queue);
                }
            }
        }
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * self.rx.len()];
        if self.features & 1 << CTRL_VQ != 0 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        DeviceInfo {
            id: VIRTIO_ID_NET,
            features: self.features,
            queue_sizes,
            config: Arc::clone(&self.config),
        }
    }

    fn start(&mut self, features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        let has = |bit: u32| features & 1 << bit != 0;
        self.mergeable = has(MRG_RXBUF);
        self.control_index = match (has(CTRL_VQ), has(MQ)) {
            (false, _) => u16::MAX,
            (true, false) => 2,
            (true, true) => 2 * self.rx.len() as u16,
        };
        self.interrupt = queues.first().map(|queue| Arc::clone(queue.interrupt()));
        for queue in queues {
            self.add_queue(queue);
        }
        let failed = |e| DeviceError::Host("the network backend fails", e);
        self.backend.start(features).map_err(failed)?;
        let most = self.rx.len() as u16;
        self.pairs = self.loaded_pairs.take().unwrap_or(1).clamp(1, most);
        if self.pairs > 1 {
            self.backend.set_pairs(self.pairs).map_err(failed)?;
        }
        Ok(())
    }

    fn not_started(&mut self) {
        self.metrics.activate_fails.inc();
    }

    /// Nothing in it is the driver's to change.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.metrics.cfg_fails.inc();
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let queues = self.suspend();
        (self.pairs, self.loaded_pairs) = (1, None);
        queues
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        self.loaded_pairs = Some(self.pairs);
        self.interrupt = None;
        let rx = self.rx.iter_mut().filter_map(Rx::stop);
        let tx = self.tx.iter_mut().filter_map(Tx::stop);
        rx.chain(tx).chain(self.control.take()).collect()
    }

    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError> {
        let done = match self.role(index) {
            Role::Control => self.run_control(),
            Role::Receive(pair) => {
                self.metrics.rx_queue_event_count.inc();
                self.run_rx(pair)
            }
            Role::Transmit(pair) => {
                self.metrics.tx_queue_event_count.inc();
                self.run_tx(pair)
            }
        };
        done.inspect_err(|_| self.metrics.event_fails.inc())
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        let token = |event| match event {
            Event::Readable(pair) => u32::from(pair),
            Event::Writable => WRITABLE,
        };
        let timers = [
            (self.rx_limiter.source(), RX_TIMER),
            (self.tx_limiter.source(), TX_TIMER),
        ];
        self.backend
            .sources()
            .into_iter()
            .map(|(fd, event)| (fd, token(event)))
            .chain(timers)
            .collect()
    }

    fn source_ready(&mut self, token: u32) -> Result<(), DeviceError> {
        let done = match token {
            WRITABLE => {
                self.backend.writable();
                self.run_all(Self::run_tx)
            }
            RX_TIMER => {
                self.metrics.rx_event_rate_limiter_count.inc();
                self.rx_limiter.timer_fired();
                self.run_all(Self::run_rx)
            }
            TX_TIMER => {
                self.metrics.tx_rate_limiter_event_count.inc();
                self.tx_limiter.timer_fired();
                self.run_all(Self::run_tx)
            }
            pair => {
                self.metrics.rx_tap_event_count.inc();
                if let Some(rx) = self.rx.get_mut(pair as usize) {
                    rx.set_readable();
                }
                self.run_rx(pair as u16)
            }
        };
        done.inspect_err(|_| self.metrics.event_fails.inc())
    }

    fn reset_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        match self.role(index) {
            Role::Control => self.control.take(),
            Role::Receive(pair) => self.rx.get_mut(usize::from(pair))?.stop(),
            Role::Transmit(pair) => self.tx.get_mut(usize::from(pair))?.stop(),
        }
    }

    fn enable_queue(&mut self, queue: ActiveQueue) -> Result<(), DeviceError> {
        self.add_queue(queue);
        Ok(())
    }

    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        let DeviceUpdate::Network {
            rx_rate_limiter,
            tx_rate_limiter,
            link_up,
        } = change
        else {
            return Err(DeviceError::Unsupported(format!(
                "the network interface {} does not take {change:?}",
                self.name
            )));
        };
        // The limiters wake those that wait for them.
        if let Some(limits) = rx_rate_limiter {
            self.rx_limiter.update(*limits);
        }
        if let Some(limits) = tx_rate_limiter {
            self.tx_limiter.update(*limits);
        }
        if let Some(plugged) = *link_up {
            let before = self.is_up();
            self.plugged = plugged;
            self.show_link(before);
            // What waits on either side belongs to the time before.
            self.run_all(Self::run_rx)?;
            self.run_all(Self::run_tx)?;
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        let pairs = self.loaded_pairs.unwrap_or(self.pairs);
        serde_json::json!({ "pairs": pairs, "plugged": self.plugged })
    }

    fn load(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let pairs = state.get("pairs").and_then(|pairs| pairs.as_u64());
        let plugged = state.get("plugged").and_then(|plugged| plugged.as_bool());
        let (Some(pairs), Some(plugged)) = (pairs, plugged) else {
            return Err(DeviceError::Unsupported(format!(
                "the network interface {} cannot go on from what was saved",
                self.name
            )));
        };
        self.loaded_pairs = Some(u16::try_from(pairs).unwrap_or(u16::MAX));
        let before = self.is_up();
        self.plugged = plugged;
        self.show_link(before);
        Ok(())
    }
}
