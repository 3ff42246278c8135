//! End to end: virtio devices in real Linux guests, over MMIO and over PCI. Run by `cargo xtask test`, as root: taps, veth
//! pairs, loop devices and mounts belong to the host.
//!
//! What a kernel or a transport could break runs with each of the four pairs; what is long, and the same for all, with one or
//! two. All of it together has to end within minutes on an emulated host.

#[path = "devices/balloon.rs"]
mod balloon;
mod common;
#[path = "devices/disks.rs"]
mod disks;
#[path = "devices/failures.rs"]
mod failures;
#[path = "devices/help.rs"]
mod help;
#[path = "devices/host.rs"]
mod host;
#[path = "devices/limits.rs"]
mod limits;
#[path = "devices/live.rs"]
mod live;
#[path = "devices/nets.rs"]
mod nets;
#[path = "devices/overlays.rs"]
mod overlays;
#[path = "devices/roots.rs"]
mod roots;
#[path = "devices/seen.rs"]
mod seen;
#[path = "devices/served.rs"]
mod served;
#[path = "devices/sockets.rs"]
mod sockets;

use common::guest::Kernel;

/// Which tests run with which kernel over which transport.
macro_rules! pairs {
    ($($pair:ident: $kernel:ident $flags:expr => { $($area:ident::$test:ident)* })*) => {
        $(mod $pair { $(#[test] fn $test() { super::$area::$test(&super::Kernel::$kernel(), &$flags); })* })*
    };
}

pairs! {
    debian_mmio: debian [] => {
        disks::disks_keep_what_is_written
        disks::random_writes_come_back_from_each_engine
        nets::networks_and_sockets_carry_everything
        roots::a_root_file_system_is_on_a_disk
        seen::whatever_is_set_is_seen_in_the_guest
        served::a_served_disk_keeps_what_is_written
        sockets::either_end_of_a_connection_closes_first
    }
    debian_pci: debian ["--pci"] => {
        balloon::a_balloon_takes_and_gives_memory
        disks::disks_keep_what_is_written
        disks::random_writes_come_back_from_each_engine
        failures::disks_that_go_away_are_the_guests_trouble_only
        live::a_network_changes_under_a_running_guest
        nets::a_large_file_goes_both_ways_over_a_tap
        nets::networks_and_sockets_carry_everything
        roots::a_root_file_system_is_on_a_disk
        seen::whatever_is_set_is_seen_in_the_guest
        served::a_served_disk_is_plugged_in
        served::a_served_disk_keeps_what_is_written
        sockets::either_end_of_a_connection_closes_first
    }
    minimal_mmio: minimal [] => {
        roots::a_root_file_system_is_served
        served::a_server_that_goes_away_is_the_guests_trouble_only
        served::a_served_disk_grows_under_a_running_guest
        served::a_served_disk_is_in_huge_pages
        served::a_served_disk_is_there_after_a_reboot
        balloon::a_balloon_takes_and_gives_memory
        balloon::a_balloon_gives_way_before_the_guest_kills
        balloon::memory_goes_back_to_the_host
        disks::disks_keep_what_is_written
        disks::random_writes_come_back_from_each_engine
        failures::a_full_host_disk_is_the_guests_trouble_only
        failures::disks_that_go_away_are_the_guests_trouble_only
        failures::networks_that_go_away_are_the_guests_trouble_only
        live::a_disk_changes_under_a_running_guest
        live::a_network_changes_under_a_running_guest
        nets::a_large_file_goes_both_ways_over_the_user_network
        nets::networks_and_sockets_carry_everything
        nets::the_user_network_needs_no_tap_and_forwards_ports
        overlays::two_guests_write_to_one_image_which_stays_as_it_is
        roots::a_root_file_system_is_on_a_disk
        seen::whatever_is_set_is_seen_in_the_guest
        served::a_served_disk_keeps_what_is_written
        sockets::either_end_of_a_connection_closes_first
    }
    minimal_pci: minimal ["--pci"] => {
        roots::a_root_file_system_is_served
        served::a_server_that_goes_away_is_the_guests_trouble_only
        served::a_served_disk_grows_under_a_running_guest
        served::a_served_disk_is_there_after_a_reboot
        disks::disks_keep_what_is_written
        disks::random_writes_come_back_from_each_engine
        failures::networks_that_go_away_are_the_guests_trouble_only
        limits::limits_hold_their_rate
        live::a_disk_changes_under_a_running_guest
        live::a_balloon_changes_under_a_running_guest
        nets::networks_and_sockets_carry_everything
        roots::a_root_file_system_is_on_a_disk
        seen::whatever_is_set_is_seen_in_the_guest
        served::a_served_disk_keeps_what_is_written
        sockets::either_end_of_a_connection_closes_first
        sockets::sockets_carry_500_mb_each_way
    }
}
