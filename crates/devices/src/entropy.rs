//! virtio-rng (virtio 1.2, 5.4): random bytes of the host's kernel.

use crate::rate_limiter::{self, RateLimiter};
use husk_config::{DeviceUpdate, Entropy as Config};
use husk_metrics::{EntropyMetrics, METRICS};
use husk_virtio::{ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, VirtioDevice};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::os::fd::RawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

const QUEUE_SIZE: u16 = 256;
/// Most bytes for one request: a device may fill less than it was given.
const MOST: usize = 64 << 10;
/// Requests that are answered before other devices have their turn.
const BATCH: usize = 64;

/// The device.
pub struct Entropy {
    config: Arc<ConfigSpace>,
    limiter: RateLimiter,
    queue: Option<ActiveQueue>,
    chain: Chain,
    bytes: Vec<u8>,
    metrics: Arc<EntropyMetrics>,
}

impl Entropy {
    /// Fails only when the host has no more descriptors.
    pub fn new(config: &Config) -> Result<Self, rate_limiter::Error> {
        Ok(Self {
            config: ConfigSpace::new(Vec::new()),
            limiter: RateLimiter::new(config.rate_limiter)?,
            queue: None,
            chain: Chain::default(),
            bytes: vec![0; MOST],
            metrics: METRICS.entropy.member(""),
        })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let index = queue.index();
        let bad = |e| DeviceError::Queue(index, e);
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain).map_err(bad)? {
                queue.flush().map_err(bad)?;
                if queue.enable_kicks().map_err(bad)? {
                    continue;
                }
                return Ok(());
            }
            let length = self.chain.writable_length().min(MOST as u64) as usize;
            if !self.limiter.consume(1, length as u64) {
                // The limiter's timer brings us back.
                self.metrics.entropy_rate_limiter_throttled.inc();
                queue.undo_pop();
                return queue.flush().map_err(bad);
            }
            let bytes = self.bytes.get_mut(..length).unwrap_or_default();
            fill_random(bytes).map_err(|e| {
                self.metrics.host_rng_fails.inc();
                DeviceError::Host("no random bytes", e.into())
            })?;
            let mem = queue.memory().clone();
            let written = self.chain.write(&mem, 0, bytes).map_err(bad)?;
            queue
                .add_used(self.chain.head, written as u32)
                .map_err(bad)?;
            self.metrics.entropy_event_count.inc();
            self.metrics.entropy_bytes.add(written as u64);
        }
        queue.flush().map_err(bad)?;
        // More is waiting; at its maximum the counter is readable already.
        let _ = queue.kick().write(1);
        Ok(())
    }
}

impl VirtioDevice for Entropy {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: VIRTIO_ID_RNG,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::clone(&self.config),
        }
    }

    fn start(&mut self, _features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        self.queue = queues.into_iter().next();
        Ok(())
    }

    fn not_started(&mut self) {
        self.metrics.activate_fails.inc();
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.queue.take().into_iter().collect()
    }

    fn queue_ready(&mut self, _index: u16) -> Result<(), DeviceError> {
        let served = self.serve();
        served.inspect_err(|_| self.metrics.entropy_event_fails.inc())
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.limiter.source(), 0)]
    }

    fn source_ready(&mut self, _token: u32) -> Result<(), DeviceError> {
        self.metrics.rate_limiter_event_count.inc();
        self.limiter.timer_fired();
        let served = self.serve();
        served.inspect_err(|_| self.metrics.entropy_event_fails.inc())
    }

    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        match change {
            DeviceUpdate::Entropy { rate_limiter } => {
                self.limiter.update(*rate_limiter);
                self.serve()
            }
            other => Err(DeviceError::Unsupported(format!(
                "the entropy device does not take {other:?}"
            ))),
        }
    }
}

/// By the system call. The usual library opens /dev/urandom in a static program, for good, which a process that is forked has not.
fn fill_random(mut bytes: &mut [u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            // A signal came between, as it may where there are more than 256.
            Ok(filled) => bytes = bytes.get_mut(filled..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_config::{RateLimiter as Limits, TokenBucket};
    use husk_virtio::DeviceThread;
    use husk_virtio::testing::{
        Driver, Layout, Mmio, Pci, Registers, Subject, check_device, memory,
    };

    fn device(limits: Option<Limits>) -> Box<dyn VirtioDevice> {
        let config = Config {
            rate_limiter: limits,
        };
        Box::new(Entropy::new(&config).unwrap())
    }

    fn use_it(driver: &mut Driver) {
        let first = driver.request(0, &[], &[100, 1, 5000]);
        let second = driver.request(0, &[], &[5101]);
        assert_eq!((first.len(), second.len()), (5101, 5101));
        assert_ne!(first, second);
        let zeroes = first.iter().filter(|&&byte| byte == 0).count();
        assert!(zeroes < 200, "{zeroes} of 5101 bytes are 0");
    }

    #[test]
    fn it_is_a_sound_device() {
        check_device(&Subject {
            memory: husk_virtio::testing::memory,
            make: &|| device(None),
            use_it: &use_it,
            use_again: None,
            eager: &[0],
        });
    }

    /// Requests that were made available just before the device is saved are answered, once, by the next one.
    #[test]
    fn requests_under_way_are_answered_by_the_next_device() {
        let thread = Arc::new(DeviceThread::start("rng", || ()).unwrap());
        let mem = memory();
        type Attach = fn(&Arc<DeviceThread>, &husk_virtio::GuestMemory) -> Box<dyn Registers>;
        let attaches: [Attach; 2] = [
            |thread, mem| Box::new(Mmio::new(device(None), thread, mem)),
            |thread, mem| Box::new(Pci::new(device(None), thread, mem)),
        ];
        for attach in attaches {
            let mut driver = Driver::new(attach(&thread, &mem), mem.clone());
            driver.start(u64::MAX, 16);
            for round in 0..200 {
                let chain = driver.chain(&[], &[64]);
                driver.queues[0].add(&chain, Layout::Direct, 0);
                driver.registers.notify(0);
                driver.registers.suspend();
                let state = driver.registers.save();
                let next = attach(&thread, &mem);
                next.load(state).unwrap();
                next.resume();
                driver.registers = next;
                let until = std::time::Instant::now() + husk_virtio::testing::PATIENCE;
                while driver.queues[0].take_used().is_none() {
                    assert!(std::time::Instant::now() < until, "round {round}");
                    std::thread::yield_now();
                }
                assert!(driver.queues[0].take_used().is_none());
                // And those that come later, with an interrupt each.
                driver.registers.take_interrupt();
                for _ in 0..3 {
                    let chain = driver.chain(&[], &[64]);
                    driver.queues[0].add(&chain, Layout::Direct, 0);
                    driver.registers.notify(0);
                    let until = std::time::Instant::now() + husk_virtio::testing::PATIENCE;
                    // Not the other way round: that of the first request may only come now.
                    while driver.queues[0].take_used().is_none() {
                        assert!(std::time::Instant::now() < until, "round {round}");
                        std::thread::yield_now();
                    }
                    while !driver.registers.take_interrupt() {
                        assert!(
                            std::time::Instant::now() < until,
                            "round {round}: no interrupt"
                        );
                        std::thread::yield_now();
                    }
                }
            }
        }
    }

    #[test]
    fn requests_and_bytes_are_counted() {
        let mut device = Entropy::new(&Config::default()).unwrap();
        let metrics = Arc::new(EntropyMetrics::default());
        device.metrics = Arc::clone(&metrics);
        let thread = Arc::new(DeviceThread::start("rng", || ()).unwrap());
        let mem = memory();
        let mut driver = Driver::new(Box::new(Mmio::new(Box::new(device), &thread, &mem)), mem);
        driver.start_badly();
        assert_eq!(metrics.activate_fails.total(), 1);
        driver.start(u64::MAX, 16);
        use_it(&mut driver);
        assert_eq!(metrics.entropy_event_count.total(), 2);
        assert_eq!(metrics.entropy_bytes.total(), 2 * 5101);
        assert_eq!(metrics.entropy_event_fails.total(), 0);
        assert_eq!(metrics.activate_fails.total(), 1);
    }

    #[test]
    fn a_limited_device_answers_later_but_all() {
        let bucket = TokenBucket {
            size: 1000,
            one_time_burst: None,
            refill_time: 50,
        };
        let limits = Limits {
            bandwidth: Some(bucket),
            ops: None,
        };
        let thread = Arc::new(DeviceThread::start("rng", || ()).unwrap());
        let mem = memory();
        let registers = Box::new(Mmio::new(device(Some(limits)), &thread, &mem));
        let mut driver = Driver::new(registers, mem);
        driver.start(u64::MAX, 16);
        let throttled = &METRICS.entropy.member("").entropy_rate_limiter_throttled;
        let before = throttled.total();
        let start = std::time::Instant::now();
        for _ in 0..5 {
            assert_eq!(driver.request(0, &[], &[1000]).len(), 1000);
        }
        // 1000 at once, then 1000 every 50 ms. A busy machine makes it longer, never shorter.
        assert!(start.elapsed().as_millis() >= 190, "{:?}", start.elapsed());
        assert!(throttled.total() > before);
    }
}
