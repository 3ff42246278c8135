# What clients find when they look for Firecracker: its binary, a way to be root, a place for VMs, and a network of their own.
# Run in new mount and network name spaces, so that nothing of it is left. $1: the binary; the rest is the command.
set -e
husk=$1
shift
mount -t tmpfs none /usr/local/bin
ln -s "$husk" /usr/local/bin/firecracker
stand_in() {
	printf '#!/bin/sh\n%s\n' "$2" >"/usr/local/bin/$1"
	chmod +x "/usr/local/bin/$1"
}
stand_in sudo 'exec "$@"'
stand_in iptables 'exit 0'
# A payload kernel has no SSH server: it is there when the guest has said so.
stand_in ssh 'exec grep -q up "$GUEST_CONSOLE"'
mount -t tmpfs none /var/lib
mkdir -p /var/lib/firecracker/snapshots
ip link set lo up
ip tuntap add eth0 mode tap
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
ip route add default via 192.0.2.254
exec "$@"
