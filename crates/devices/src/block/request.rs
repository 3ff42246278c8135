//! One request of a driver (5.2.6), from its descriptor chain to the calls that it takes.

use super::disk::Disk;
use super::io::{IoVecs, Step};
use super::{MAX_DISCARD_SEGMENTS, SECTOR, SEGMENT_SIZE, SEGMENTS};
use husk_metrics::BlockMetrics;
use husk_virtio::{Buffer, Chain, DeviceError, GuestMemory, QueueError};
use std::io;
use std::time::Duration;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

/// virtio_blk_req before the data: type, reserved, sector.
const HEADER: u64 = 16;
/// virtio_blk_discard_write_zeroes: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// Zeroes that are written at once where the host cannot be asked for them: as many parts as a request has at most.
const ZEROES_AT_ONCE: u64 = 256 * 4096;

/// What the device is while a driver uses it, as far as a request is concerned.
pub(super) struct Rules {
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a block, which all offsets and lengths are multiples of; 512 unless the host needs more.
    pub block_size: u64,
    pub read_only: bool,
    /// It is a block device of the host.
    pub is_device: bool,
    /// What the driver took.
    pub features: u64,
    /// The driver cannot flush, but counts on that what it wrote is on the disk.
    pub write_through: bool,
    /// The most sectors in one segment of a discard.
    pub max_discard: u32,
    /// The same for zeroes.
    pub max_zeroes: u32,
    /// The answer to GET_ID.
    pub id: [u8; 20],
}

/// What is to be done with a request.
pub(super) enum Parsed {
    /// Its steps; see [`Request::step`].
    Run,
    /// Nothing: this status answers it.
    Answer(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A part of the disk to discard or to fill with zeroes, in bytes.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    length: u64,
    unmap: bool,
}

/// A request. Used again, it allocates nothing.
pub(super) struct Request {
    /// The queue that it came in.
    pub queue: u16,
    /// See [`husk_virtio::ActiveQueue::add_used`].
    pub head: u16,
    status_at: GuestAddress,
    operation: Operation,
    /// Where in the file the next byte of `vecs` goes.
    offset: u64,
    vecs: IoVecs,
    /// When it was taken from its queue, in nanoseconds of `Block::clock`'s time, and the bytes that it reads or writes.
    pub begun: u64,
    data: u32,
    /// Bytes of data that the device is to write into memory, and has written.
    to_fill: u64,
    filled: u64,
    segments: Vec<Segment>,
    /// The host cannot make zeroes: the last segment is written from `vecs`.
    writes_zeroes: bool,
    /// A last step brings data to the disk.
    sync_after: bool,
    /// This is the last step.
    syncing: bool,
    is_device: bool,
}

impl Request {
    /// A place for requests with data in the memory of `vecs`.
    pub(super) fn new(vecs: IoVecs) -> Self {
        Self {
            queue: 0,
            head: 0,
            status_at: GuestAddress(0),
            operation: Operation::Flush,
            offset: 0,
            vecs,
            begun: 0,
            data: 0,
            to_fill: 0,
            filled: 0,
            segments: Vec::new(),
            writes_zeroes: false,
            sync_after: false,
            syncing: false,
            is_device: false,
        }
    }

    /// Take over what a driver asks for with `chain`. An error when it cannot even be answered.
    pub(super) fn parse(
        &mut self,
        queue: u16,
        chain: &Chain,
        rules: &Rules,
    ) -> Result<Parsed, DeviceError> {
        // 5.2.6: the status is the last byte, wherever a descriptor ends (2.7.4.1).
        let last = chain.writable.last();
        let status_at = last.and_then(|b| b.address.0.checked_add(u64::from(b.length) - 1));
        let status_at = status_at.ok_or(DeviceError::Driver(
            "sent a block request that has no room for a status",
        ))?;
        self.queue = queue;
        self.head = chain.head;
        self.status_at = GuestAddress(status_at);
        self.vecs.clear();
        self.segments.clear();
        self.to_fill = chain.writable_length() - 1;
        self.filled = 0;
        self.writes_zeroes = false;
        self.syncing = false;
        self.is_device = rules.is_device;
        let parsed = self.parse_kind(chain, rules);
        parsed.map_err(|e| DeviceError::Queue(queue, e))
    }

    fn parse_kind(&mut self, chain: &Chain, rules: &Rules) -> Result<Parsed, QueueError> {
        const FAILED: Result<Parsed, QueueError> = Ok(Parsed::Answer(VIRTIO_BLK_S_IOERR as u8));
        const UNKNOWN: Result<Parsed, QueueError> = Ok(Parsed::Answer(VIRTIO_BLK_S_UNSUPP as u8));
        let mut header = [0; HEADER as usize];
        if chain.read(self.vecs.memory(), 0, &mut header)? < header.len() {
            return FAILED;
        }
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let took = |bit: u32| rules.features & 1 << bit != 0;
        self.sync_after = rules.write_through;
        let status = match kind {
            VIRTIO_BLK_T_IN => {
                self.sync_after = false;
                self.operation = Operation::Read;
                return self.parse_data(&chain.writable, 0, (sector, self.to_fill), rules);
            }
            VIRTIO_BLK_T_OUT if !rules.read_only => {
                self.operation = Operation::Write;
                let length = chain.readable_length() - HEADER;
                return self.parse_data(&chain.readable, HEADER, (sector, length), rules);
            }
            VIRTIO_BLK_T_FLUSH if took(VIRTIO_BLK_F_FLUSH) => {
                self.operation = Operation::Flush;
                self.syncing = true;
                return Ok(Parsed::Run);
            }
            VIRTIO_BLK_T_GET_ID => {
                let room = usize::try_from(self.to_fill).unwrap_or(usize::MAX);
                let id = rules.id.get(..room).unwrap_or(&rules.id);
                self.filled = chain.write(self.vecs.memory(), 0, id)? as u64;
                return Ok(Parsed::Answer(VIRTIO_BLK_S_OK as u8));
            }
            VIRTIO_BLK_T_OUT => return FAILED,
            VIRTIO_BLK_T_DISCARD if took(VIRTIO_BLK_F_DISCARD) => {
                self.operation = Operation::Discard;
                self.parse_segments(chain, rules.max_discard, 0, rules)?
            }
            VIRTIO_BLK_T_WRITE_ZEROES if took(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.operation = Operation::WriteZeroes;
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                self.parse_segments(chain, rules.max_zeroes, flags, rules)?
            }
            _ => return UNKNOWN,
        };
        match status {
            VIRTIO_BLK_S_OK => Ok(Parsed::Run),
            status => Ok(Parsed::Answer(status as u8)),
        }
    }

    /// The data of a read or a write: `length` bytes of `buffers` behind `skip` bytes, from or to `sector`.
    fn parse_data(
        &mut self,
        buffers: &[Buffer],
        skip: u64,
        (sector, length): (u64, u64),
        rules: &Rules,
    ) -> Result<Parsed, QueueError> {
        let Some(offset) = inside(sector, length, rules) else {
            return Ok(Parsed::Answer(VIRTIO_BLK_S_IOERR as u8));
        };
        if length > u64::from(SEGMENTS) * u64::from(SEGMENT_SIZE) || buffers.len() > MAX_PARTS {
            return Ok(Parsed::Answer(VIRTIO_BLK_S_IOERR as u8));
        }
        self.offset = offset;
        self.data = length as u32;
        let (mut skip, mut left) = (skip, length);
        for &buffer in buffers {
            left -= self.vecs.push(buffer, skip, left)?;
            skip = skip.saturating_sub(buffer.length.into());
        }
        match self.vecs.is_empty() {
            true => Ok(Parsed::Answer(VIRTIO_BLK_S_OK as u8)),
            false => Ok(Parsed::Run),
        }
    }

    /// The segments of a discard or of zeroes, each with at most `max` sectors and no other flags than `flags`; a status.
    fn parse_segments(
        &mut self,
        chain: &Chain,
        max: u32,
        flags: u32,
        rules: &Rules,
    ) -> Result<u32, QueueError> {
        if rules.read_only {
            return Ok(VIRTIO_BLK_S_IOERR);
        }
        let length = chain.readable_length() - HEADER;
        let count = length / SEGMENT as u64;
        let whole = count * SEGMENT as u64 == length;
        if !whole || count == 0 || count > u64::from(MAX_DISCARD_SEGMENTS) {
            return Ok(VIRTIO_BLK_S_IOERR);
        }
        for index in 0..count {
            let mut bytes = [0; SEGMENT];
            let at = HEADER + index * SEGMENT as u64;
            chain.read(self.vecs.memory(), at, &mut bytes)?;
            let [low, high, sectors, given] = words(&bytes);
            if given & !flags != 0 {
                return Ok(VIRTIO_BLK_S_UNSUPP);
            }
            let sector = u64::from(high) << 32 | u64::from(low);
            let length = u64::from(sectors) * SECTOR;
            let Some(offset) = inside(sector, length, rules).filter(|_| sectors <= max) else {
                return Ok(VIRTIO_BLK_S_IOERR);
            };
            let unmap = given & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if length > 0 {
                self.segments.push(Segment {
                    offset,
                    length,
                    unmap,
                });
            }
        }
        // Nothing to do: a flush at most.
        self.syncing = self.segments.is_empty();
        Ok(VIRTIO_BLK_S_OK)
    }

    /// Bytes of data, as a limit counts them.
    pub(super) fn cost(&self, chain: &Chain) -> u64 {
        match self.operation {
            Operation::Read => self.to_fill,
            Operation::Write => chain.readable_length().saturating_sub(HEADER),
            Operation::Flush | Operation::Discard | Operation::WriteZeroes => 0,
        }
    }

    /// Count it, now that it has succeeded.
    pub(super) fn count_in(&self, metrics: &BlockMetrics, now: u64) {
        let took = Duration::from_nanos(now.saturating_sub(self.begun));
        match self.operation {
            Operation::Read => {
                metrics.read_count.inc();
                metrics.read_bytes.add(self.data.into());
                metrics.read_agg.record(took);
            }
            Operation::Write => {
                metrics.write_count.inc();
                metrics.write_bytes.add(self.data.into());
                metrics.write_agg.record(took);
            }
            Operation::Flush => metrics.flush_count.inc(),
            Operation::Discard | Operation::WriteZeroes => metrics.discard_count.inc(),
        }
    }

    /// For a read or a write whose memory is not aligned as `disk` needs it: whether it is a read, and where in the file it is.
    pub(super) fn misaligned(&self, disk: &Disk) -> Option<(bool, u64)> {
        let data = matches!(self.operation, Operation::Read | Operation::Write);
        let misaligned = data && !self.vecs.are_aligned(disk.memory_align, disk.length_align);
        misaligned.then_some((self.operation == Operation::Read, self.offset))
    }

    /// The data was moved by other means than [`Request::step`]; whether that was all.
    pub(super) fn moved(&mut self) -> Option<io::Result<()>> {
        self.filled = match self.operation {
            Operation::Read => self.to_fill,
            _ => 0,
        };
        self.vecs.clear();
        self.end()
    }

    /// The next call to make.
    pub(super) fn step(&self) -> Step<'_> {
        if self.syncing {
            return Step::Sync;
        }
        match (self.operation, self.segments.last()) {
            (Operation::Read, _) => Step::Read(&self.vecs, self.offset),
            (Operation::Write, _) => Step::Write(&self.vecs, self.offset),
            (Operation::WriteZeroes, Some(_)) if self.writes_zeroes => {
                Step::Write(&self.vecs, self.offset)
            }
            (Operation::Discard, Some(segment)) if self.is_device => Step::Discard {
                offset: segment.offset,
                length: segment.length,
            },
            (operation, Some(segment)) => {
                let punch = operation == Operation::Discard || segment.unmap && !self.is_device;
                let mode = match punch {
                    true => libc::FALLOC_FL_PUNCH_HOLE,
                    false => libc::FALLOC_FL_ZERO_RANGE,
                };
                Step::Allocate {
                    mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset: segment.offset,
                    length: segment.length,
                }
            }
            (_, None) => Step::Sync,
        }
    }

    /// It fills a part of the disk with zeroes.
    pub(super) fn makes_zeroes(&self) -> bool {
        self.operation == Operation::WriteZeroes
    }

    /// Let the next call be for no more than `count` bytes of data, which are not 0.
    pub(super) fn limit(&mut self, count: u64) {
        self.vecs.limit(count);
    }

    /// The call returned `result`. `None`: there is a next step; else how the request ended.
    pub(super) fn advance(&mut self, result: io::Result<u32>) -> Option<io::Result<()>> {
        let result = match result {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return None,
            other => other,
        };
        if self.syncing {
            return Some(result.map(|_| ()));
        }
        match self.operation {
            Operation::Read | Operation::Write => match self.count(result) {
                Err(e) => Some(Err(e)),
                Ok(()) if self.vecs.is_empty() => self.end(),
                Ok(()) => None,
            },
            Operation::Flush => Some(result.map(|_| ())),
            Operation::Discard => match result {
                Err(e) if !is_unsupported(&e) => Some(Err(e)),
                // A discard is advice: data that stays does no harm.
                _ => self.next_segment(),
            },
            Operation::WriteZeroes if self.writes_zeroes => match self.count(result) {
                Err(e) => Some(Err(e)),
                Ok(()) => self.more_zeroes(),
            },
            Operation::WriteZeroes => match result {
                Ok(_) => self.next_segment(),
                Err(e) if is_unsupported(&e) => {
                    self.writes_zeroes = true;
                    self.offset = self.segments.last().map_or(0, |segment| segment.offset);
                    self.more_zeroes()
                }
                Err(e) => Some(Err(e)),
            },
        }
    }

    /// Tell the driver how it ended; the number of bytes written for it, from the first on (2.7.8.2).
    pub(super) fn answer(&self, status: u8) -> Result<u32, QueueError> {
        let mem: &GuestMemory = self.vecs.memory();
        mem.write_obj(status, self.status_at)?;
        let written = match self.filled == self.to_fill {
            true => self.filled + 1,
            false => self.filled,
        };
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// `result` bytes of `vecs` are done with.
    fn count(&mut self, result: io::Result<u32>) -> io::Result<()> {
        let count = result?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.vecs.advance(count);
        self.offset += u64::from(count);
        if self.operation == Operation::Read {
            self.filled += u64::from(count);
        }
        Ok(())
    }

    /// Fill `vecs` for what is not written yet of the last segment.
    fn more_zeroes(&mut self) -> Option<io::Result<()>> {
        let end = self.segments.last().map_or(0, |s| s.offset + s.length);
        let left = end.saturating_sub(self.offset);
        if left == 0 {
            return self.next_segment();
        }
        if self.vecs.is_empty() {
            self.vecs.clear();
            self.vecs.push_zeroes(left.min(ZEROES_AT_ONCE));
        }
        None
    }

    fn next_segment(&mut self) -> Option<io::Result<()>> {
        self.segments.pop();
        match self.segments.last() {
            None => self.end(),
            Some(segment) => {
                self.offset = segment.offset;
                match self.writes_zeroes {
                    true => self.more_zeroes(),
                    false => None,
                }
            }
        }
    }

    /// All is done but what `sync_after` asks for.
    fn end(&mut self) -> Option<io::Result<()>> {
        self.syncing = self.sync_after;
        match self.syncing {
            true => None,
            false => Some(Ok(())),
        }
    }
}

/// Most buffers that one request may have: those of its data, the header and the status.
const MAX_PARTS: usize = SEGMENTS as usize + 2;

/// Where `length` bytes from `sector` on begin in the file, if all of them are on the disk and they are whole blocks.
fn inside(sector: u64, length: u64, rules: &Rules) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(length)?;
    let whole = offset.is_multiple_of(rules.block_size) && length.is_multiple_of(rules.block_size);
    (whole && end <= rules.capacity).then_some(offset)
}

/// The host's file system or device does not do that.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let value = u128::from_le_bytes(*bytes);
    [0, 32, 64, 96].map(|shift| (value >> shift) as u32)
}
