"""firecracker-python: its MicroVM starts /usr/local/bin/firecracker, configures a VM with metadata and vsock, boots, pauses,
resumes, asks for its configuration, and deletes it."""

import os
import sys
import time

# What it looks for and does not use here: Docker's daemon, for images, and the host's address on the Internet, for ports that
# are forwarded. There may be neither.
import docker

docker.from_env = lambda: None
import firecracker.microvm

firecracker.microvm.get_public_ip = lambda: "192.0.2.1"
from firecracker import MicroVM

kernel, initrd, drive = sys.argv[1:]


def expect(what, got, wanted):
    if got != wanted:
        sys.exit(f"{what}: {got!r} instead of {wanted!r}")


vm = MicroVM(
    name="husk",
    kernel_file=kernel,
    initrd_file=initrd,
    base_rootfs=drive,
    vcpu=2,
    memory=128,
    ip_addr="172.16.8.2",
    mmds_enabled=True,
    user_data="#cloud-config",
    vsock_enabled=True,
    vsock_guest_cid=7,
    labels={"of": "husk"},
)
said = vm.create()
(own,) = MicroVM.list()
name = own["id"]
expect("create", said, f"VMM {name} created")
expect("its name and address", (own["name"], own["ip_addr"]), ("husk", "172.16.8.2"))
folder = f"/var/lib/firecracker/{name}"

until = time.monotonic() + 30
while b"up\n" not in open(f"{folder}/firecracker.log", "rb").read():
    if time.monotonic() > until:
        sys.exit("the guest does not run")
    time.sleep(0.05)

expect("pause", vm.pause(), f"VMM {name} paused successfully")
expect("state", vm._vmm.get_vmm_state(name), "Paused")
expect("resume", vm.resume(), f"VMM {name} resumed successfully")
expect("state", vm._vmm.get_vmm_state(name), "Running")

config = vm.config()
expect("memory", config["machine-config"]["mem_size_mib"], 128)
expect("vsock", config["vsock"]["guest_cid"], 7)
expect("drive", config["drives"][0]["drive_id"], "rootfs")
expect("interface", config["network-interfaces"][0]["host_dev_name"], f"tap_{name}")
expect("metadata's interface", config["mmds-config"]["network_interfaces"], ["eth0"])
expect("address", vm._vmm.get_vmm_ip_addr(name), "172.16.8.2")
metadata = vm._vmm.get_api(name).mmds.get().json()
expect("metadata", metadata["latest"]["user-data"], "#cloud-config")
try:
    vm._vmm.get_api(name).vm.patch(state="Gone")
    sys.exit("a state that there is not was not refused")
except Exception as error:
    if "API fault: " not in str(error):
        sys.exit(f"a state that there is not: {error}")

log = open(f"{folder}/logs/{name}.log").read()
if "Running Firecracker" not in log:
    sys.exit(f"the log: {log!r}")
expect("delete", vm.delete(), f"VMM {name} is deleted")
expect("what is left", (MicroVM.list(), os.path.exists(folder)), ([], False))
print("firecracker-python is done")
