//! Guests whose devices are busy while they are kept.

use crate::common::guest::{Kernel, LIMIT};
use crate::common::{Vm, husk, temp_dir, text};
use crate::help::{Accept, connect, guest, listen, words};
use crate::host::{Tap, make_image};
use husk_api::client;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A VM of which snapshots are made, again and again, each in another process.
struct Kept {
    vm: Vm,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Kept {
    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let response = client::request(&self.socket, method, path, &body);
        let response = response.unwrap_or_else(|e| panic!("{e}\n{}", self.vm.report()));
        let said = &response.body;
        assert_eq!(response.status, 204, "{path}: {said}\n{}", self.vm.report());
    }

    fn save(&self) {
        self.ask("PATCH", "/vm", json!({ "state": "Paused" }));
        let (state, memory) = (
            self.dir.path().join("state"),
            self.dir.path().join("memory"),
        );
        let places = json!({ "snapshot_path": state, "mem_file_path": memory });
        self.ask("PUT", "/snapshot/create", places);
    }

    /// The guest is kept and goes on.
    fn goes_on(&self) {
        self.save();
        self.ask("PATCH", "/vm", json!({ "state": "Resumed" }));
    }

    /// The guest is kept, its process is killed, and another one goes on.
    fn moves(self, more: &[&str]) -> Self {
        self.save();
        let Self { vm, socket, dir } = self;
        drop(vm);
        let mut command = husk();
        command.args(["restore", text(dir.path()), "--api-sock", text(&socket)]);
        let _ = std::fs::remove_file(&socket);
        let vm = Vm::start(command.args(more), LIMIT);
        wait_for(&socket, &vm);
        Self { vm, socket, dir }
    }
}

fn wait_for(socket: &Path, vm: &Vm) {
    let until = Instant::now() + LIMIT;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        let hopeless = vm.stdout.has_ended() || Instant::now() >= until;
        assert!(!hopeless, "no socket\n{}", vm.report());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Disks are written all the time, random bytes are read, and memory comes and goes.
pub fn disks_lose_and_double_nothing(kernel: &Kernel, flags: &[&str]) {
    const ROUNDS: u64 = 3;
    let images = temp_dir();
    let image = |name: &str| {
        let path = images.path().join(name);
        make_image(&path, 4 << 20);
        path
    };
    let disks = [
        format!("{},engine=uring", image("a").display()),
        format!("{},engine=sync,queues=2", image("b").display()),
    ];
    let script = "
tool journal /dev/vda 64 3 >/tmp/a &
a=$!
tool journal /dev/vdb 64 2 >/tmp/b &
b=$!
turn=0
while :; do
	turn=$((turn + 1))
	dd if=/dev/hwrng of=/tmp/random bs=64 count=4 2>/dev/null || echo no random bytes
	echo \"turn $turn with $(wc -c </tmp/random)\"
	read -t 1 -r line && [ \"$line\" = end ] && break
done
kill $a $b
wait
cat /tmp/a /tmp/b
";
    let guest = guest(kernel, &format!("mount -t tmpfs none /tmp\n{script}"));
    let dir = temp_dir();
    let socket = dir.path().join("api");
    let more = [
        "--api-sock",
        text(&socket),
        "--disk",
        &disks[0],
        "--disk",
        &disks[1],
    ];
    let words = words("--cmdline quiet --cpus 2 --entropy --balloon 8", &more);
    let vm = guest.start(&[&words, flags].concat());
    let mut kept = Kept { vm, socket, dir };
    kept.vm.expect("turn 2 with 256");
    for _ in 0..ROUNDS {
        kept.goes_on();
        kept = kept.moves(&[]);
        kept.vm.expect(" with 256");
    }
    kept.vm.send(b"end\n");
    kept.vm.expect("tool: journal of /dev/vda is whole after ");
    let first = kept.vm.expect_number();
    kept.vm.expect("tool: journal of /dev/vdb is whole after ");
    let second = kept.vm.expect_number();
    eprintln!("{first} and {second} blocks");
    assert!(first > 30 && second > 30, "{first} and {second} blocks");
    let ended = kept.vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}

/// A TCP connection over a tap goes on in another process; one over vsock ends there, and new ones are made both ways, with another
/// cid and another socket.
pub fn networks_go_on_and_sockets_are_reset(kernel: &Kernel, flags: &[&str]) {
    let tap = Tap::new();
    let sockets = temp_dir();
    let (first, second) = (sockets.path().join("v"), sockets.path().join("w"));
    let script = format!(
        "mount -t tmpfs none /tmp
ip addr add {}/24 dev eth0
ip link set eth0 up
tool copy tcp:{1}:5001 /tmp/got >/tmp/said &
got=$!
tool copy vsock:2:6001 /tmp/lost >/tmp/end 2>&1
echo vsock ended
tool cid
tool echo 7000 1 >/dev/null &
echo again
tool copy vsock:2:6001 /tmp/more >/dev/null
cat /tmp/more
wait $got
md5sum </tmp/got
",
        tap.guest, tap.host
    );
    let guest = guest(kernel, &script);
    let dir = temp_dir();
    let socket = dir.path().join("api");
    let tcp = listen(&tap.host, 5001);
    let vsock = UnixListener::bind(sockets.path().join("v_6001")).unwrap();
    let (net, device) = (
        format!("tap={},id=eth0", tap.name),
        format!("cid=7,uds={}", text(&first)),
    );
    let more = [
        "--api-sock",
        text(&socket),
        "--net",
        &net,
        "--vsock",
        &device,
    ];
    let vm = guest.start(&[&words("--cmdline quiet", &more), flags].concat());
    let mut kept = Kept { vm, socket, dir };
    let mut stream = kept.vm.accept(&tcp);
    let mut lost = kept.vm.accept(&vsock);
    lost.write_all(b"some").unwrap();
    let sent = crate::common::pattern(2 << 20);
    let wanted = crate::common::guest::md5(&sent);
    let sender = std::thread::spawn(move || {
        for part in sent.chunks(8 << 10) {
            stream.write_all(part).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    });
    // Of the VM that goes on, nothing ends.
    kept.goes_on();
    lost.write_all(b"more").unwrap();
    let again = UnixListener::bind(sockets.path().join("w_6001")).unwrap();
    kept = kept.moves(&["--vsock", text(&second), "--cid", "8"]);
    assert_eq!(
        lost.read(&mut [0]).unwrap_or(0),
        0,
        "it ended with its process"
    );
    kept.vm.expect("vsock ended");
    kept.vm.expect("tool: cid 8");
    kept.vm.expect("again");
    let mut there = kept.vm.accept(&again);
    there.write_all(b"there it is\n").unwrap();
    drop(there);
    kept.vm.expect("there it is");
    let mut echo = connect(&second, 7000);
    echo.write_all(b"echo").unwrap();
    echo.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = String::new();
    echo.read_to_string(&mut back).unwrap();
    assert_eq!(back, "echo");
    sender.join().unwrap();
    kept.vm.expect(&wanted);
    let ended = kept.vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}

/// A disk that was plugged into a running guest is there in another process, busy, and can be taken out; another one comes into its place.
pub fn disks_come_and_go_across_processes(kernel: &Kernel, flags: &[&str]) {
    let images = temp_dir();
    let [first, second] = ["first", "second"].map(|name| {
        let path = images.path().join(name);
        make_image(&path, 4 << 20);
        path
    });
    let script = "
mount -t tmpfs none /tmp
echo ready
until [ -b /dev/vda ]; do sleep 0.1; done
tool journal /dev/vda 64 2 >/tmp/said &
writes=$!
sleep 1; echo writing; read -r end
kill $writes
wait
cat /tmp/said
while [ -e /sys/block/vda ]; do sleep 0.1; done
echo gone
until [ -b /dev/vda ]; do sleep 0.1; done
echo serial $(cat /sys/block/vda/serial)
read -r end
";
    let guest = guest(kernel, script);
    let dir = temp_dir();
    let socket = dir.path().join("api");
    let more = ["--api-sock", text(&socket)];
    let vm = guest.start(&[&words("--cmdline quiet", &more), flags].concat());
    let mut kept = Kept { vm, socket, dir };
    let plug = |kept: &Kept, id: &str, path: &Path| {
        let drive = json!({ "drive_id": id, "path_on_host": path, "is_root_device": false });
        kept.ask("PUT", &format!("/drives/{id}"), drive);
    };
    kept.vm.expect("ready\n");
    plug(&kept, "first", &first);
    kept.vm.expect("writing\n");
    kept = kept.moves(&[]);
    kept.goes_on();
    kept.vm.send(b"end\n");
    kept.vm.expect("tool: journal of /dev/vda is whole after ");
    assert!(kept.vm.expect_number() > 5);
    // What its guest was asked for before, it does in the next process.
    kept.ask("DELETE", "/drives/first", Value::Null);
    kept = kept.moves(&[]);
    kept.vm.expect("gone\n");
    plug(&kept, "second", &second);
    kept.vm.expect("serial second\n");
    kept = kept.moves(&[]);
    kept.vm.send(b"end\n");
    let ended = kept.vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}
