//! Guests whose devices are busy while they are kept.

use crate::common::guest::{Kernel, LIMIT};
use crate::common::{Vm, husk, temp_dir, text};
use crate::help::{guest, words};
use crate::host::make_image;
use husk_api::client;
use serde_json::{Value, json};
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
        let response = client::request(&self.socket, method, path, &body.to_string());
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
