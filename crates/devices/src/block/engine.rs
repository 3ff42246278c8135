//! From queues to the host and back, by either engine.

use super::bounce::Transfer;
use super::io::{self, IoVecs, Ring};
use super::overlay::Way;
use super::request::{Parsed, Request};
use super::{Block, Error, Queue};
use husk_config::{Drive, IoEngine};
use husk_virtio::{DeviceError, GuestMemory};
use std::os::fd::RawFd;
use std::sync::Arc;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

/// Requests of a device that are in the ring at once.
const IN_FLIGHT: u16 = 256;
/// Requests taken from a queue before other devices get their turn.
const BATCH: u32 = 256;
/// The header of a request, before the data to write.
const HEADER: u64 = 16;

/// How requests reach the file.
pub(super) struct Engine {
    /// Without, requests are waited for one by one.
    ring: Option<Ring>,
    /// Places for requests, as many as there may be at once. None while stopped.
    idle: Vec<Request>,
}

/// Why no more requests were taken from a queue.
enum Stopped {
    /// There are no more.
    Empty,
    /// No tokens; the limiter's timer tells when there are.
    Tokens,
    /// The ring is full; a completion tells when it is not.
    Room,
    /// It was the others' turn.
    Turn,
}

impl Engine {
    /// As `drive` has it.
    pub(super) fn new(drive: &Drive) -> Result<Self, Error> {
        let ring = match drive.engine() {
            IoEngine::Sync => None,
            IoEngine::Async => {
                let ring = Ring::new(IN_FLIGHT);
                Some(ring.map_err(|e| Error::IoUring(drive.path().into(), e))?)
            }
            IoEngine::Auto => Ring::new(IN_FLIGHT)
                .inspect_err(|e| {
                    let name = &drive.drive_id;
                    log::info!("the disk {name} is used without io_uring, more slowly: {e}");
                })
                .ok(),
        };
        Ok(Self {
            ring,
            idle: Vec::new(),
        })
    }

    /// For requests with data in `mem`.
    pub(super) fn start(&mut self, mem: &Arc<GuestMemory>) {
        let count = match self.ring {
            Some(_) => IN_FLIGHT,
            None => 1,
        };
        let places = (0..count).map(|_| Request::new(IoVecs::new(Arc::clone(mem))));
        self.idle = places.collect();
    }

    /// Let go of the memory. Nothing is in flight.
    pub(super) fn stop(&mut self) {
        self.idle = Vec::new();
    }

    /// What tells of completions.
    pub(super) fn source(&self) -> Option<RawFd> {
        self.ring.as_ref().map(Ring::source)
    }

    /// Tell the host of what was begun.
    pub(super) fn submit(&mut self) -> Result<(), DeviceError> {
        let submitted = self.ring.as_mut().map_or(Ok(()), Ring::submit);
        submitted.map_err(|e| DeviceError::Host("io_uring does not take requests", e))
    }
}

impl Block {
    /// Take what is available in a queue.
    pub(super) fn serve(&mut self, index: u16) -> Result<(), DeviceError> {
        let mut budget = BATCH;
        loop {
            let Some(queue) = self.queue(index) else {
                return Ok(());
            };
            queue.waits = false;
            let quiet = queue.active.disable_kicks();
            quiet.map_err(|e| DeviceError::Queue(index, e))?;
            let stopped = self.take(index, &mut budget);
            // What was begun before an error goes on all the same.
            self.engine.submit()?;
            self.complete()?;
            let stopped = stopped?;
            let has_room = !self.engine.idle.is_empty();
            match stopped {
                Stopped::Empty if budget == BATCH => self.metrics.no_avail_buffer.inc(),
                Stopped::Tokens => self.metrics.rate_limiter_throttled_events.inc(),
                Stopped::Room => self.metrics.io_engine_throttled_events.inc(),
                Stopped::Turn => self.metrics.remaining_reqs_count.inc(),
                Stopped::Empty => {}
            }
            let Some(queue) = self.queue(index) else {
                return Ok(());
            };
            match stopped {
                Stopped::Empty => {
                    let more = queue.active.enable_kicks();
                    if !more.map_err(|e| DeviceError::Queue(index, e))? {
                        return Ok(());
                    }
                }
                Stopped::Room if has_room => {}
                Stopped::Room | Stopped::Tokens => {
                    queue.waits = true;
                    return Ok(());
                }
                Stopped::Turn => {
                    // An event of our own, behind those of the other devices.
                    let _ = queue.active.kick().write(1);
                    return Ok(());
                }
            }
        }
    }

    /// Take from those queues that had to wait, the first of them another one each time.
    pub(super) fn serve_waiting(&mut self) -> Result<(), DeviceError> {
        let count = self.queues.len().max(1);
        let first = self.turn;
        self.turn = (first + 1) % count;
        for index in (0..count).map(|at| ((first + at) % count) as u16) {
            if self.queue(index).is_some_and(|queue| queue.waits) {
                self.serve(index)?;
            }
        }
        Ok(())
    }

    /// Give back what is done.
    pub(super) fn complete(&mut self) -> Result<(), DeviceError> {
        let mut again = false;
        let mut first = true;
        while let Some((mut request, result)) = self.engine.ring.as_mut().and_then(Ring::completed)
        {
            if std::mem::take(&mut first) {
                self.tick();
            }
            match request.advance(result) {
                Some(end) => self.finish(request, end)?,
                None => {
                    again = true;
                    self.run(request)?;
                }
            }
        }
        if again {
            self.engine.submit()?;
        }
        self.flush()
    }

    /// Wait until nothing is in flight.
    pub(super) fn drain(&mut self) -> Result<(), DeviceError> {
        let mut result = Ok(());
        while let Some(ring) = &mut self.engine.ring {
            match ring.wait() {
                Ok(false) => break,
                // Also after an error of one queue, all of it has to end.
                Ok(true) => result = self.complete().and(result),
                Err(e) => {
                    log::error!("io_uring failed, a disk goes on without: {e}");
                    self.engine.ring = None;
                    return Err(DeviceError::Host("io_uring lost requests", e));
                }
            }
        }
        self.flush().and(result)
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))?.as_mut()
    }

    /// Begin what is available in a queue.
    fn take(&mut self, index: u16, budget: &mut u32) -> Result<Stopped, DeviceError> {
        let broken = |e| DeviceError::Queue(index, e);
        loop {
            let place = self.queues.get_mut(usize::from(index));
            let (Some(queue), Some(started)) = (place.and_then(Option::as_mut), &self.started)
            else {
                return Ok(Stopped::Empty);
            };
            let Some(mut request) = self.engine.idle.pop() else {
                return Ok(Stopped::Room);
            };
            if *budget == 0 {
                self.engine.idle.push(request);
                return Ok(Stopped::Turn);
            }
            if !queue.active.pop(&mut self.chain).map_err(broken)? {
                self.engine.idle.push(request);
                return Ok(Stopped::Empty);
            }
            let parsed = request.parse(index, &self.chain, &started.rules)?;
            let cost = match parsed {
                Parsed::Run => request.cost(&self.chain),
                Parsed::Answer(_) => 0,
            };
            if !self.limiter.consume(1, cost) {
                queue.active.undo_pop();
                self.engine.idle.push(request);
                return Ok(Stopped::Tokens);
            }
            if *budget == BATCH {
                self.tick();
            }
            *budget -= 1;
            request.begun = self.clock;
            match parsed {
                Parsed::Answer(status) => {
                    if u32::from(status) != VIRTIO_BLK_S_OK {
                        self.metrics.invalid_reqs_count.inc();
                    }
                    self.answer(request, status)?;
                }
                Parsed::Run => self.begin(request)?,
            }
        }
    }

    /// Begin a request that was just taken from `chain`.
    fn begin(&mut self, mut request: Request) -> Result<(), DeviceError> {
        let misaligned = request.misaligned(&self.disk);
        let (Some((read, offset)), Some(started)) = (misaligned, &self.started) else {
            return self.run(request);
        };
        let transfer = Transfer {
            mem: &started.mem,
            chain: &self.chain,
            read,
            offset,
            at: if read { 0 } else { HEADER },
            length: request.cost(&self.chain),
        };
        let moved = self.bounce.run(&self.disk.file, &transfer);
        self.tick();
        let end = match moved.map_err(|e| DeviceError::Queue(request.queue, e))? {
            Ok(()) => request.moved(),
            Err(e) => Some(Err(e)),
        };
        match end {
            Some(end) => self.finish(request, end),
            None => self.run(request),
        }
    }

    /// Make the next step of a request, and those after it if they are waited for.
    fn run(&mut self, mut request: Request) -> Result<(), DeviceError> {
        loop {
            let base = &self.disk.file;
            let way = match &mut self.overlay {
                None => Ok(Way::Base),
                Some(overlay) => overlay.prepare(base, &mut request),
            };
            let result = match (way, &mut self.overlay) {
                (Err(e), _) => Err(e),
                (Ok(Way::Fill), Some(overlay)) => overlay.fill(&request.step()),
                (Ok(way), overlay) => {
                    let file = match (way, overlay) {
                        (Way::Overlay, Some(overlay)) => overlay.file(),
                        _ => base,
                    };
                    if let Some(ring) = &mut self.engine.ring {
                        match ring.push(request, file) {
                            Ok(()) => return Ok(()),
                            Err(back) => request = back,
                        }
                    }
                    io::run(file, &request.step())
                }
            };
            if let Some(end) = request.advance(result) {
                self.tick();
                return self.finish(request, end);
            }
        }
    }

    fn finish(&mut self, request: Request, end: std::io::Result<()>) -> Result<(), DeviceError> {
        let status = match end {
            Ok(()) => {
                request.count_in(&self.metrics, self.clock);
                VIRTIO_BLK_S_OK
            }
            Err(e) => {
                self.metrics.execute_fails.inc();
                let path = self.disk.path.display();
                // Once: the guest may try as often as it likes.
                match std::mem::replace(&mut self.has_warned, true) {
                    false => log::warn!("a request to the disk {path} failed: {e}"),
                    true => log::debug!("a request to the disk {path} failed: {e}"),
                }
                VIRTIO_BLK_S_IOERR
            }
        };
        self.answer(request, status as u8)
    }

    /// Give a request back to the driver.
    fn answer(&mut self, request: Request, status: u8) -> Result<(), DeviceError> {
        let (index, head) = (request.queue, request.head);
        let answered = request.answer(status);
        self.engine.idle.push(request);
        let Some(queue) = self.queue(index) else {
            return Ok(());
        };
        answered
            .and_then(|written| queue.active.add_used(head, written))
            .map_err(|e| DeviceError::Queue(index, e))
    }

    /// Show the drivers what was given back.
    fn flush(&mut self) -> Result<(), DeviceError> {
        for queue in self.queues.iter_mut().flatten() {
            let flushed = queue.active.flush();
            flushed.map_err(|e| DeviceError::Queue(queue.active.index(), e))?;
        }
        Ok(())
    }
}
