//! Disks that another process serves over vhost-user: Debian's qemu-storage-daemon.

use crate::common::guest::Kernel;
use crate::common::{Ended, temp_dir, text};
use crate::help::{guest, words};
use crate::host::{command, make_image, tool};
use crate::live::Api;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a server may take to be there.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server of one image. It is killed when this is dropped.
pub struct Server {
    child: Child,
    pub socket: PathBuf,
    monitor: PathBuf,
}

impl Server {
    /// Of `image`, with sockets beside it. `how`: more of the export's options.
    pub fn start(image: &Path, how: &str) -> Self {
        let [socket, monitor] = ["sock", "qmp"].map(|end| image.with_extension(end));
        for left in [&socket, &monitor] {
            let _ = std::fs::remove_file(left);
        }
        let read_only = if how.contains("writable=on") {
            "off"
        } else {
            "on"
        };
        let child = Command::new("qemu-storage-daemon")
            .args([
                "--chardev",
                &format!("socket,id=qmp,path={},server=on,wait=off", text(&monitor)),
                "--monitor",
                "chardev=qmp",
                "--blockdev",
                &format!(
                    "driver=file,node-name=disk,filename={},read-only={read_only}",
                    text(image)
                ),
                "--export",
                &format!(
                    "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={}{how}",
                    text(&socket)
                ),
            ])
            .stdin(Stdio::null())
            // It complains of clients that go: that must not stand in the test's own line.
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon, of the package qemu-system-common");
        let server = Self {
            child,
            socket,
            monitor,
        };
        let until = Instant::now() + PATIENCE;
        while !server.socket.exists() {
            assert!(Instant::now() < until, "the server makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// As an option of `--disk`.
    pub fn disk(&self, more: &str) -> String {
        format!("socket={}{more}", self.socket.display())
    }

    /// Give its disk another size.
    fn resize(&self, bytes: u64) {
        let stream = UnixStream::connect(&self.monitor).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut lines = BufReader::new(&stream).lines();
        let mut answer = || lines.next().unwrap().unwrap();
        assert!(answer().contains("QMP"));
        for request in [
            r#"{"execute": "qmp_capabilities"}"#.to_owned(),
            format!(
                r#"{{"execute": "block_resize", "arguments": {{"node-name": "disk", "size": {bytes}}}}}"#
            ),
        ] {
            (&stream).write_all(request.as_bytes()).unwrap();
            let said = answer();
            assert!(said.contains(r#""return""#), "{said}");
        }
    }

    /// Without a chance to say anything.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, name: &str) {
        command("kill", &["-s", name, &self.child.id().to_string()]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(folder: &Path, name: &str, mib: u64) -> PathBuf {
    let path = folder.join(name);
    make_image(&path, mib << 20);
    path
}

#[track_caller]
fn assert_said(ended: &Ended, wanted: &[&str]) {
    let console = ended.expect_status(0).console();
    for said in wanted {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
}

/// What is written through the server is in its image, with one queue and two; a file system, flushes, discards, a disk that cannot be
/// written; memory on both sides of the hole.
pub fn a_served_disk_keeps_what_is_written(kernel: &Kernel, flags: &[&str]) {
    const MIB: u64 = 32;
    let dir = temp_dir();
    let [one, two, fs, fixed] = [("one", MIB), ("two", MIB), ("fs", 64), ("fixed", 8)]
        .map(|(name, mib)| image(dir.path(), name, mib));
    command("mkfs.ext4", &["-q", "-F", text(&fs)]);
    let script = format!(
        "
cd /sys/block
for file in vda/size vda/ro vdd/ro vda/queue/logical_block_size vdc/queue/write_cache vda/queue/write_cache; do echo \"$file=$(cat $file)\"; done
echo \"mq $(ls vda/mq | wc -l) $(ls vdb/mq | wc -l)\"
tool verify /dev/vda {MIB} direct 4
tool verify /dev/vdb {MIB} cached 2
dd if=/dev/zero of=/dev/vdd bs=4k count=1 oflag=direct 2>/dev/null || echo vdd cannot be written
dd if=/dev/vdd bs=1M count=8 iflag=direct 2>/dev/null | wc -c
mkdir /m
mount -t ext4 /dev/vdc /m
dd if=/dev/urandom of=/m/file bs=1M count=20 conv=fsync 2>/dev/null
md5sum </m/file
umount /m
mount -t ext4 /dev/vdc /m
md5sum </m/file
rm /m/file
sync
fstrim /m && echo trimmed
umount /m
grep -E 'virtio' /proc/interrupts
"
    );
    let servers = [
        Server::start(&one, ",writable=on"),
        Server::start(&two, ",writable=on,num-queues=2"),
        Server::start(&fs, ",writable=on"),
        Server::start(&fixed, ""),
    ];
    let disks = [
        servers[0].disk(""),
        servers[1].disk(",queues=2"),
        servers[2].disk(",cache=writeback,id=files"),
        servers[3].disk(""),
    ];
    let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let mut guest = guest(kernel, &script);
    guest.limit *= 2;
    let words = [
        &words("--cmdline quiet --cpus 2 --memory 3328M", flags)[..],
        &disks,
    ]
    .concat();
    let ended = guest.run(&words);
    assert_said(
        &ended,
        &[
            &format!("vda/size={}\n", MIB << 11),
            "vda/ro=0\nvdd/ro=1\n",
            "vda/queue/logical_block_size=512\n",
            "vdc/queue/write_cache=write back\nvda/queue/write_cache=write through\n",
            "mq 1 2\n",
            "vdd cannot be written\n8388608\n",
            "trimmed\n",
        ],
    );
    assert_eq!(ended.stderr, "", "{}", ended.report());
    let console = ended.console();
    drop(servers);
    for (path, letter) in [(&one, 'a'), (&two, 'b')] {
        let sum = tool(&["sum", text(path)]);
        let (_, sum) = sum.trim().rsplit_once(' ').unwrap();
        let said = format!("tool: /dev/vd{letter} verified, {sum}\n");
        assert!(console.contains(&said), "no {said:?}\n{}", ended.report());
    }
    let sums: Vec<&str> = console.lines().filter(|l| l.ends_with("  -")).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{}", ended.report());
    command("e2fsck", &["-f", "-n", text(&fs)]);
}

/// A server's socket by way of this test, which tells the truth of the disk's size: qemu-storage-daemon tells of a disk that has grown only
/// since 8.1, but serves all of it in Debian's 7.2, too.
struct Truthful(PathBuf);

impl Truthful {
    fn of(server: &Server, sectors: Arc<AtomicU64>) -> Self {
        let path = server.socket.with_extension("truthful");
        let listener = UnixListener::bind(&path).unwrap();
        let other = UnixStream::connect(&server.socket).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let ends = [(&stream, &other), (&other, &stream)];
            // Each message whole; an answer is one as well.
            loop {
                let mut fds = ends.map(|(from, _)| PollFd::new(from, PollFlags::IN));
                poll(&mut fds, None).unwrap();
                let ready = fds.map(|fd| !fd.revents().is_empty());
                for ((from, to), ready) in ends.into_iter().zip(ready) {
                    if ready && pass(from, to, sectors.load(Ordering::SeqCst)).is_none() {
                        return;
                    }
                }
            }
        });
        Self(path)
    }
}

/// Pass a message on with its descriptors; None at the end of the connection.
fn pass(from: &UnixStream, to: &UnixStream, sectors: u64) -> Option<()> {
    const GET_CONFIG: u32 = 24;
    let (mut header, mut space) = ([0; 12], [MaybeUninit::uninit(); 512]);
    let mut came = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut header)];
    let received = recvmsg(from, &mut parts, &mut came, RecvFlags::WAITALL).ok()?;
    if received.bytes < header.len() {
        return None;
    }
    let fds = came.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<OwnedFd>>(),
        _ => Vec::new(),
    });
    let fds: Vec<OwnedFd> = fds.collect();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let (request, flags, size) = (word(0), word(4), word(8));
    let mut body = vec![0; size as usize];
    (&*from).read_exact(&mut body).ok()?;
    if request == GET_CONFIG && flags & 4 != 0 {
        body[12..20].copy_from_slice(&sectors.to_le_bytes());
    }
    let fds: Vec<BorrowedFd> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); 512];
    let mut goes = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(goes.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let parts = [IoSlice::new(&header), IoSlice::new(&body)];
    let sent = sendmsg(to, &parts, &mut goes, SendFlags::NOSIGNAL).ok()?;
    (sent == header.len() + body.len()).then_some(())
}

/// The server's disk grows, and the guest is told when a request says so.
pub fn a_served_disk_grows_under_a_running_guest(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let path = image(dir.path(), "image", 8);
    let server = Server::start(&path, ",writable=on");
    let script = "
dd if=/dev/vda of=/dev/null bs=4k count=500 iflag=direct 2>/dev/null
echo ready; read -r go
until [ $(cat /sys/block/vda/size) = 32768 ]; do sleep 0.1; done
dd if=/dev/urandom of=/dev/vda bs=512 seek=32767 count=1 oflag=direct 2>/dev/null && echo the new end is written
read -r go
";
    let api = Api(dir.path().join("api"));
    let sectors = Arc::new(AtomicU64::new(8 << 11));
    let truthful = Truthful::of(&server, Arc::clone(&sectors));
    let disk = format!("socket={},id=data", truthful.0.display());
    let words = words(
        "--cmdline quiet --api-sock",
        &[text(&api.0), "--disk", &disk],
    );
    let guest = guest(kernel, script);
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("ready\n");
    server.resize(16 << 20);
    sectors.store(16 << 11, Ordering::SeqCst);
    api.patch("/drives/data", r#"{"drive_id": "data"}"#);
    vm.send(b"\n");
    vm.expect("the new end is written\n");
    let counted = api.request("GET", "/husk/metrics", "");
    for counter in [
        r#"husk_vhost_user_block_activate_fails_total{drive_id="data"} 0"#,
        r#"husk_vhost_user_block_cfg_fails_total{drive_id="data"} 0"#,
    ] {
        assert!(counted.contains(counter), "no {counter}\n{counted}");
    }
    // Of hundreds of requests none came by Husk: its own interrupts are that of the new size, and a few of the platform.
    let own = "husk_interrupts_triggers_total ";
    let triggers = counted.lines().find_map(|line| line.strip_prefix(own));
    let triggers: u64 = triggers.unwrap().parse().unwrap();
    assert!((1..20).contains(&triggers), "{triggers} interrupts");
    // The VM stands still and goes on; what the server does needs nobody.
    api.patch("/vm", r#"{"state": "Paused"}"#);
    api.patch("/vm", r#"{"state": "Resumed"}"#);
    vm.send(b"\n");
    let ended = vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}

/// The guest reboots in the same process: the server is called again, and has what was written.
pub fn a_served_disk_is_there_after_a_reboot(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let path = image(dir.path(), "image", 8);
    let server = Server::start(&path, ",writable=on");
    let script = "
if [ $(dd if=/dev/vda bs=6 count=1 2>/dev/null) = before ] 2>/dev/null; then
	echo found what was before
else
	echo before | dd of=/dev/vda bs=512 count=1 conv=sync oflag=direct 2>/dev/null
	echo first; sync; reboot -f; sleep 100
fi
";
    let disk = server.disk("");
    let words = words("--cmdline quiet --on-reboot restart", &["--disk", &disk]);
    let ended = guest(kernel, script).run(&[&words, flags].concat());
    assert_said(&ended, &["first\n", "found what was before\n"]);
    assert_eq!(ended.stderr, "");
}

/// Memory of the host's huge pages, which the server maps as well.
pub fn a_served_disk_is_in_huge_pages(kernel: &Kernel, flags: &[&str]) {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let dir = temp_dir();
    let path = image(dir.path(), "image", 8);
    let server = Server::start(&path, ",writable=on");
    let config = dir.path().join("config");
    let machine =
        r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M"}}"#;
    std::fs::write(&config, machine).unwrap();
    std::fs::write(POOL, "64").unwrap();
    let script = "tool verify /dev/vda 8 direct 2; echo verified; read -r go";
    let disk = server.disk("");
    let words = words(
        "--cmdline quiet --config",
        &[text(&config), "--disk", &disk],
    );
    let guest = guest(kernel, script);
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("tool: /dev/vda verified");
    vm.expect("verified\n");
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = meminfo
        .lines()
        .find(|line| line.starts_with("HugePages_Free"));
    let free = free.unwrap().split_whitespace().nth(1).unwrap().to_owned();
    vm.send(b"\n");
    let ended = vm.finish();
    std::fs::write(POOL, "0").unwrap();
    ended.expect_status(0);
    assert!(free.parse::<u32>().unwrap() < 60, "{free} pages are free");
}

/// The server dies, and later hangs. The guest waits or is told, Husk says so, and can be asked and stopped; a server that is started
/// again is found when the driver begins anew.
pub fn a_server_that_goes_away_is_the_guests_trouble_only(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let path = image(dir.path(), "image", 8);
    let server = Server::start(&path, ",writable=on");
    let script = "
read_it() { dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null && echo $1; }
read_it the first server reads; read -r go
device=$(basename $(readlink /sys/block/vda/device))
echo $device >/sys/bus/virtio/drivers/virtio_blk/unbind
echo $device >/sys/bus/virtio/drivers/virtio_blk/bind
read_it second_reads; read -r go
read_it nobody_reads &
sleep 2
echo still here; read -r go
sleep 1000
";
    let script = script.replace("the first server reads", "first_reads");
    let api = Api(dir.path().join("api"));
    let disk = server.disk(",id=data");
    let words = words(
        "--cmdline quiet --api-sock",
        &[text(&api.0), "--disk", &disk],
    );
    let guest = guest(kernel, &script);
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("first_reads\n");
    server.kill();
    vm.expect_stderr("is lost to the guest");
    refused(&api, "has closed the connection");
    let server = Server::start(&path, ",writable=on");
    vm.send(b"\n");
    vm.expect("second_reads\n");
    server.signal("STOP");
    vm.send(b"\n");
    vm.expect("still here\n");
    let asked = Instant::now();
    refused(&api, "does not answer within");
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    api.request("PUT", "/husk/actions", r#"{"action_type": "Stop"}"#);
    let ended = vm.finish();
    assert!(ended.took < Duration::from_secs(30), "{:?}", ended.took);
    let console = ended.expect_status(0).console();
    assert!(!console.contains("nobody_reads"), "{}", ended.report());
    for bad in ["panicked", "internal error", "seccomp"] {
        assert!(!ended.stderr.contains(bad), "{}", ended.report());
    }
    server.signal("CONT");
}

/// The disk cannot be looked at, and why.
#[track_caller]
fn refused(api: &Api, why: &str) {
    let (status, said) = api.ask("PATCH", "/drives/data", r#"{"drive_id": "data"}"#);
    assert_eq!(status, 400, "{said}");
    assert!(said.contains(why), "{said}");
}

/// A disk is plugged in while the VM runs, if its memory is shared already; else it is said what to do.
pub fn a_served_disk_is_plugged_in(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let script = "
echo ready; read -r go
until [ -e /sys/block/vdb ]; do sleep 0.1; done
tool verify /dev/vdb 8 direct 1 && echo plugged
read -r go
";
    let [first, second] = ["first", "second"].map(|name| image(dir.path(), name, 8));
    let plain = image(dir.path(), "plain", 8);
    let servers = [&first, &second].map(|path| Server::start(path, ",writable=on"));
    let body = format!(
        r#"{{"drive_id": "more", "is_root_device": false, "socket": "{}"}}"#,
        text(&servers[1].socket)
    );
    for (disk, works) in [
        (text(&plain).to_owned(), false),
        (servers[0].disk(""), true),
    ] {
        let api = Api(dir.path().join(format!("api{works}")));
        let words = words(
            "--cmdline quiet --api-sock",
            &[text(&api.0), "--disk", &disk],
        );
        let guest = guest(kernel, script);
        let mut vm = guest.start(&[&words, flags].concat());
        vm.expect("ready\n");
        let (status, said) = api.ask("PUT", "/drives/more", &body);
        if works {
            assert_eq!(status, 204, "{said}");
            vm.send(b"\n");
            vm.expect("plugged\n");
            vm.send(b"\n");
        } else {
            assert_eq!(status, 400, "{said}");
            assert!(said.contains("from the start"), "{said}");
            api.request("PUT", "/husk/actions", r#"{"action_type": "Stop"}"#);
        }
        vm.finish().expect_status(0);
    }
}
