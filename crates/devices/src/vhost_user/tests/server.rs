//! Servers to test against: one that serves a small disk, and whatever else a test makes of its answers.

use super::super::layout::SIZE;
use husk_bus::Interrupt;
use husk_virtio::{ActiveQueue, Chain, F_EVENT_IDX, GuestMemory, QueueState, RING_FEATURES};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use virtio_bindings::bindings::virtio_blk::*;
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const SECTORS: u64 = 2048;

/// What a server says of itself.
#[derive(Clone)]
pub struct Character {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    pub config: [u8; SIZE],
    /// Changes an answer, or forgets it, given its request. The whole message, with its header.
    pub twist: fn(u32, Vec<u8>) -> Option<Vec<u8>>,
    /// Has whoever kicks wait, until the session ends.
    pub fills_kicks: bool,
}

impl Default for Character {
    fn default() -> Self {
        let mut config = [0; SIZE];
        config[..8].copy_from_slice(&SECTORS.to_le_bytes());
        config[12..16].copy_from_slice(&126_u32.to_le_bytes());
        config[20..24].copy_from_slice(&512_u32.to_le_bytes());
        let disk = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_MQ;
        Self {
            features: RING_FEATURES | 1 << 30 | disk,
            protocol: 1 | 1 << 3 | 1 << 9,
            queues: 4,
            config,
            twist: |_, answer| Some(answer),
            fills_kicks: false,
        }
    }
}

/// A server on a thread of its own. It serves one client after the other.
pub struct Server {
    pub path: PathBuf,
    pub character: Arc<Mutex<Character>>,
    /// How many clients it has had.
    pub clients: Arc<AtomicU32>,
    /// Its next client, or the one that it has, is left.
    leave: Arc<AtomicBool>,
    _folder: tempfile::TempDir,
}

impl Server {
    pub fn start(character: Character) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Self {
            path,
            character: Arc::new(Mutex::new(character)),
            clients: Arc::default(),
            leave: Arc::default(),
            _folder: folder,
        };
        let (character, leave) = (Arc::clone(&server.character), Arc::clone(&server.leave));
        let clients = Arc::clone(&server.clients);
        // It ends with the test's process.
        std::thread::spawn(move || {
            let mut disk = vec![0; SECTORS as usize * 512];
            for stream in listener.incoming() {
                clients.fetch_add(1, Ordering::SeqCst);
                let mut session = Session {
                    stream: stream.unwrap(),
                    character: Arc::clone(&character),
                    memory: None,
                    features: 0,
                    queues: BTreeMap::new(),
                    disk: &mut disk,
                    filled: Vec::new(),
                };
                while !leave.swap(false, Ordering::SeqCst) && session.turn().is_ok() {}
            }
        });
        server
    }

    /// Close the connection that there is.
    pub fn leave(&self) {
        self.leave.store(true, Ordering::SeqCst);
        while self.leave.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A client.
struct Session<'a> {
    stream: UnixStream,
    character: Arc<Mutex<Character>>,
    memory: Option<GuestMemory>,
    features: u64,
    queues: BTreeMap<u32, Setup>,
    disk: &'a mut Vec<u8>,
    filled: Vec<File>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        for mut kick in self.filled.drain(..) {
            kick.read_exact(&mut [0; 8]).unwrap();
        }
    }
}

#[derive(Default)]
struct Setup {
    state: QueueState,
    kick: Option<File>,
    call: Option<File>,
    active: Option<ActiveQueue>,
}

struct Call(File);

impl Interrupt for Call {
    fn queue(&self, _: u16) {
        let _ = (&self.0).write(&1_u64.to_le_bytes());
    }
    fn config(&self) {}
    fn needs_reset(&self) {}
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Session<'_> {
    /// A message, or a kick, or nothing for a moment. An error ends the session.
    fn turn(&mut self) -> io::Result<()> {
        let kicks: Vec<&File> = self
            .queues
            .values()
            .filter_map(|q| q.kick.as_ref())
            .collect();
        let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
        fds.extend(kicks.iter().map(|kick| PollFd::new(*kick, PollFlags::IN)));
        let moment = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        poll(&mut fds, Some(&moment))?;
        let said = !fds[0].revents().is_empty();
        for mut kick in kicks {
            // It does not wait.
            let _ = kick.read(&mut [0; 8]);
        }
        for queue in self.queues.values_mut() {
            if let Some(active) = &mut queue.active {
                serve(active, self.disk)?;
            }
        }
        if said { self.message() } else { Ok(()) }
    }

    fn message(&mut self) -> io::Result<()> {
        let mut header = [0; 12];
        let (length, file) = self.stream.recv_with_fd(&mut header)?;
        if length < 12 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body)?;
        let character = self.character.lock().unwrap().clone();
        let answer = self.handle(request, &body, file, &character);
        let answer = match answer {
            None if flags & 8 != 0 => Some(0_u64.to_le_bytes().to_vec()),
            other => other,
        };
        let Some(answer) = answer else { return Ok(()) };
        let mut message = Vec::new();
        for word in [request, 1 | 4, answer.len() as u32] {
            message.extend(word.to_le_bytes());
        }
        message.extend(answer);
        match (character.twist)(request, message) {
            Some(message) => self.stream.write_all(&message),
            None => Ok(()),
        }
    }

    fn handle(
        &mut self,
        request: u32,
        body: &[u8],
        file: Option<File>,
        character: &Character,
    ) -> Option<Vec<u8>> {
        let told = |value: u64| Some(value.to_le_bytes().to_vec());
        match request {
            1 => return told(character.features),
            15 => return told(character.protocol),
            17 => return told(character.queues),
            2 => self.features = number(body, 0),
            3 | 16 => {}
            5 => {
                assert_eq!(body[0], 1, "one region");
                let file = FileOffset::new(file.unwrap(), number(body, 32));
                let range = (GuestAddress(number(body, 8)), number(body, 16) as usize);
                let range = (range.0, range.1, Some(file));
                self.memory = Some(GuestMemory::from_ranges_with_files([range]).unwrap());
            }
            24 => {
                let mut answer = body.to_vec();
                answer[12..].copy_from_slice(&character.config[..body.len() - 12]);
                return Some(answer);
            }
            12 if character.fills_kicks => {
                let mut kick = file.unwrap();
                rustix::fs::fcntl_setfl(&kick, rustix::fs::OFlags::empty()).unwrap();
                kick.write_all(&(u64::MAX - 1).to_le_bytes()).unwrap();
                self.filled.push(kick);
            }
            _ => return self.handle_queue(request, body, file),
        }
        None
    }

    fn handle_queue(&mut self, request: u32, body: &[u8], file: Option<File>) -> Option<Vec<u8>> {
        let (index, value) = (number(body, 0) as u32, (number(body, 0) >> 32) as u16);
        let queue = self.queues.entry(index).or_default();
        match request {
            8 => queue.state.size = value,
            10 => queue.state.next_available = value,
            9 => {
                let address = |at| number(body, at) - (1 << 46);
                queue.state.descriptors = address(8);
                queue.state.used = address(16);
                queue.state.available = address(24);
            }
            11 => {
                let stopped = self.queues.remove(&index).unwrap();
                let mut base = stopped.state.next_available;
                if let Some(mut active) = stopped.active {
                    let _ = serve(&mut active, self.disk);
                    base = active.state().next_available;
                }
                let answer = u64::from(index) | u64::from(base) << 32;
                return Some(answer.to_le_bytes().to_vec());
            }
            12 => queue.kick = file,
            13 => queue.call = file,
            18 => {
                queue.state.next_used = queue.state.next_available;
                let call: Arc<dyn Interrupt> = Arc::new(Call(queue.call.take().unwrap()));
                let event_idx = self.features & F_EVENT_IDX != 0;
                let memory = self.memory.clone().unwrap();
                let ends = (Arc::new(EventFd::new(0).unwrap()), call);
                let active = ActiveQueue::new(index as u16, queue.state, event_idx, memory, ends);
                queue.active = active.ok();
            }
            other => panic!("request {other}"),
        }
        None
    }
}

/// Answer what is in a queue. A queue that makes no sense ends the session, as with servers in earnest.
fn serve(queue: &mut ActiveQueue, disk: &mut [u8]) -> io::Result<()> {
    let mut chain = Chain::default();
    loop {
        while queue.pop(&mut chain).map_err(io::Error::other)? {
            let written = answer(queue, &chain, disk).map_err(io::Error::other)?;
            queue
                .add_used(chain.head, written)
                .map_err(io::Error::other)?;
        }
        queue.flush().map_err(io::Error::other)?;
        if !queue.enable_kicks().map_err(io::Error::other)? {
            return Ok(());
        }
    }
}

fn answer(
    queue: &ActiveQueue,
    chain: &Chain,
    disk: &mut [u8],
) -> Result<u32, husk_virtio::QueueError> {
    let (mem, mut header) = (queue.memory(), [0; 16]);
    chain.read(mem, 0, &mut header)?;
    let start = (number(&header, 8) as usize).saturating_mul(512);
    let room = chain.writable_length().saturating_sub(1);
    let mut status = VIRTIO_BLK_S_IOERR as u8;
    match u32::from_le_bytes(header[..4].try_into().unwrap()) {
        VIRTIO_BLK_T_IN => {
            if let Some(data) = disk.get(start..start.saturating_add(room as usize)) {
                chain.write(mem, 0, data)?;
                status = VIRTIO_BLK_S_OK as u8;
            }
        }
        VIRTIO_BLK_T_OUT => {
            let length = chain.readable_length().saturating_sub(16) as usize;
            if let Some(data) = disk.get_mut(start..start.saturating_add(length)) {
                chain.read(mem, 16, data)?;
                status = VIRTIO_BLK_S_OK as u8;
            }
        }
        _ => status = VIRTIO_BLK_S_UNSUPP as u8,
    }
    chain.write(mem, room, &[status])?;
    Ok(u32::try_from(room + 1).unwrap_or(u32::MAX))
}
