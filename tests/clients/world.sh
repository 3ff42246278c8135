# What clients find when they look for Firecracker: its binary, a way to be root, a place for VMs, and a network of their own.
# Run in new mount and network name spaces, so that nothing of it is left. $1: the binary; the rest is the command.
set -e
husk=$1
shift
mount -t tmpfs none /usr/local/bin
ln -s "$husk" /usr/local/bin/firecracker
printf '#!/bin/sh\nexec "$@"\n' >/usr/local/bin/sudo
chmod +x /usr/local/bin/sudo
mount -t tmpfs none /var/lib
mkdir -p /var/lib/firecracker/snapshots
ip link set lo up
ip tuntap add eth0 mode tap
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
ip route add default via 192.0.2.254
exec "$@"
