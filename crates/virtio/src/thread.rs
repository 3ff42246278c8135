//! I/O threads: devices are moved here while their drivers use them.

use crate::device::{DeviceError, VirtioDevice};
use crate::queue::ActiveQueue;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
    SubscriberOps,
};
use husk_bus::Interrupt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Kicks carry the queue's index, a device's own sources this and their token.
const SOURCE: u32 = 1 << 16;

/// Why an I/O thread could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The thread or its event loop cannot be made, or has ended.
    #[error("the I/O thread {0} failed")]
    Thread(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// No such device runs there (any more).
    #[error("the device does not run")]
    NotRunning,
}

impl From<event_manager::Error> for ThreadError {
    fn from(error: event_manager::Error) -> Self {
        ThreadError::Thread("loop".into(), Box::new(error))
    }
}

/// A thread with an event loop for any number of devices. Calls block until the thread has come to them; never call from the
/// thread itself. Dropped, it ends; devices on it are lost, so stop them first.
pub struct DeviceThread {
    endpoint: RemoteEndpoint<Running>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A device that runs on a [`DeviceThread`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningId(SubscriberId);

/// A device with what goes with it. When it cannot be started, the caller gets it back.
type Device = Box<dyn VirtioDevice>;

impl DeviceThread {
    /// Start a thread called `name` (at most 15 bytes). `prepare` runs on it first: a seccomp filter, say.
    pub fn start(name: &str, prepare: impl FnOnce() + Send + 'static) -> Result<Self, ThreadError> {
        let failed =
            |e: Box<dyn std::error::Error + Send + Sync>| ThreadError::Thread(name.into(), e);
        let mut manager = EventManager::<Running>::new().map_err(|e| failed(Box::new(e)))?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let body = move || {
            prepare();
            while !told.load(Ordering::Acquire) {
                if let Err(e) = manager.run() {
                    // Nothing can be done here, and the devices' queues stand still: say so.
                    log::error!("an I/O thread's event loop failed: {e:?}");
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .map_err(|e| failed(Box::new(e)))?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// Start a device there with what its driver set up. If it cannot start, it comes back stopped, with the reason.
    pub fn start_device(
        &self,
        device: Device,
        features: u64,
        queues: Vec<ActiveQueue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<RunningId, (Option<Device>, String)> {
        let begin = move |loops: &mut dyn SubscriberOps<Subscriber = Running>| {
            let is_remote = device.remote_ring_features().is_some();
            let own = queues.iter().filter(|_| !is_remote);
            let kicks = own
                .map(|queue| (queue.kick().as_raw_fd(), u32::from(queue.index())))
                .collect();
            let mut device = device;
            if let Err(error) = device.start(features, queues) {
                device.stop();
                return Err(Failed(Some(device), chain(&error)));
            }
            let sources = device.sources();
            let running = Running {
                device,
                kicks,
                sources,
                interrupt,
                broken: false,
            };
            Ok(RunningId(loops.add_subscriber(running)))
        };
        self.endpoint
            .call_blocking(begin)
            .map_err(|Failed(device, why)| (device, why))
    }

    /// Stop a device and take it back, with its queues as far as they came.
    pub fn stop_device(&self, id: RunningId) -> Result<(Device, Vec<ActiveQueue>), ThreadError> {
        self.take_device(id, |device| device.stop())
    }

    /// The same for a device that is to go on as it is.
    pub fn suspend_device(&self, id: RunningId) -> Result<(Device, Vec<ActiveQueue>), ThreadError> {
        self.take_device(id, |device| device.suspend())
    }

    fn take_device(
        &self,
        id: RunningId,
        stop: fn(&mut dyn VirtioDevice) -> Vec<ActiveQueue>,
    ) -> Result<(Device, Vec<ActiveQueue>), ThreadError> {
        self.endpoint.call_blocking(move |loops| {
            // Its descriptors leave the event loop before it may close them.
            let running = loops
                .remove_subscriber(id.0)
                .map_err(|_| ThreadError::NotRunning)?;
            let mut device = running.device;
            let queues = stop(device.as_mut());
            Ok((device, queues))
        })
    }

    /// Call `what` with a device on its thread, between events.
    pub fn with_device<R: Send + 'static>(
        &self,
        id: RunningId,
        what: impl FnOnce(&mut dyn VirtioDevice) -> R + Send + 'static,
    ) -> Result<R, ThreadError> {
        self.endpoint.call_blocking(move |loops| {
            let running = loops
                .subscriber_mut(id.0)
                .map_err(|_| ThreadError::NotRunning)?;
            Ok(what(running.device.as_mut()))
        })
    }

    /// Give a device that runs a queue that was reset before. Its buffers are looked at soon.
    pub fn enable_queue(&self, id: RunningId, queue: ActiveQueue) -> Result<(), ThreadError> {
        let kick = Arc::clone(queue.kick());
        self.endpoint.call_blocking(move |loops| {
            let running = loops
                .subscriber_mut(id.0)
                .map_err(|_| ThreadError::NotRunning)?;
            let result = running.device.enable_queue(queue);
            running.check(result);
            // The kick's descriptor is still watched: a write to it is the event.
            let _ = kick.write(1);
            Ok(())
        })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("an I/O thread panicked");
        }
    }
}

/// The device could not start; without it, the thread is gone and has taken it along.
struct Failed(Option<Device>, String);

impl From<event_manager::Error> for Failed {
    fn from(error: event_manager::Error) -> Self {
        Failed(None, format!("the I/O thread is gone: {error:?}"))
    }
}

/// A started device: subscribed is started.
struct Running {
    device: Device,
    kicks: Vec<(RawFd, u32)>,
    sources: Vec<(RawFd, u32)>,
    interrupt: Arc<dyn Interrupt>,
    /// It has asked for a reset, and is left alone until then.
    broken: bool,
}

impl Running {
    fn check(&mut self, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            // A guest can do this as often as it can reset the device.
            log::debug!("a virtio device needs a reset: {}", chain(&error));
            self.broken = true;
            self.interrupt.needs_reset();
        }
    }
}

impl MutEventSubscriber for Running {
    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered: nobody has to read a kick's counter to quiet it.
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let kicks = self.kicks.iter().copied();
        let sources = self.sources.iter().map(|&(fd, token)| (fd, SOURCE | token));
        for (fd, data) in kicks.chain(sources).collect::<Vec<_>>() {
            if let Err(e) = ops.add(Events::with_data_raw(fd, data, set)) {
                log::error!("a virtio device's file descriptor cannot be watched: {e:?}");
                self.broken = true;
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if self.broken {
            return;
        }
        let data = events.data();
        let result = match data & SOURCE {
            0 => self.device.queue_ready(data as u16),
            _ => self.device.source_ready(data & (SOURCE - 1)),
        };
        self.check(result);
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
