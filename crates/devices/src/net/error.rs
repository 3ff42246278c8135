//! Why there is no network.

use std::io;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What is said of it makes no sense.
    #[error("the network interface cannot be as it is configured")]
    Config(#[from] husk_config::Error),
    /// /dev/net/tun.
    #[error(
        "/dev/net/tun cannot be opened: load the module (sudo modprobe tun), or give the container the device"
    )]
    Tun(#[source] io::Error),
    /// No interface of that name.
    #[error(
        "there is no tap device {0}: make it (sudo ip tuntap add dev {0} mode tap user $USER && sudo ip link set {0} up)"
    )]
    NoTap(String),
    /// Somebody else's.
    #[error(
        "you may not use the tap device {name}: make it for yourself (sudo ip tuntap add dev {name} mode tap user $USER)"
    )]
    NotAllowed {
        /// The device's name.
        name: String,
        /// EPERM.
        source: io::Error,
    },
    /// All its queues are taken.
    #[error(
        "the tap device {name} is in use: end the VM or program that has it, or give each a tap of its own"
    )]
    Busy {
        /// The device's name.
        name: String,
        /// EBUSY or E2BIG.
        source: io::Error,
    },
    /// No tap, or not for that many queues.
    #[error(
        "{name} is no tap device, or none with many queues: for more than one queue, make it with ip tuntap add dev {name} mode tap multi_queue"
    )]
    Kind {
        /// The interface's name.
        name: String,
        /// EINVAL.
        source: io::Error,
    },
    /// Linux refuses something else.
    #[error(
        "the tap device {name} cannot be set up: Husk needs one of Linux 3.8 or later, in this network namespace"
    )]
    SetUp {
        /// The device's name.
        name: String,
        /// What Linux says.
        source: io::Error,
    },
    /// Not a tap.
    #[error("descriptor {number} cannot be used for the network: pass one of a tap device")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What Linux says.
        source: io::Error,
    },
    /// A tap, but not of the kind that is needed.
    #[error(
        "descriptor {0} is not open as Husk needs it: use IFF_TAP, IFF_NO_PI and IFF_VNET_HDR with TUNSETIFF"
    )]
    DescriptorKind(i32),
    /// One descriptor has one queue.
    #[error("descriptor {0} is one pair of queues: for more, name the tap device instead")]
    DescriptorQueues(i32),
    /// More than a virtio device has here.
    #[error("{0} pairs of queues and their control queue are more than 64 queues: give 1 to 31")]
    Pairs(u16),
    /// passt is not installed.
    #[error("the user network needs passt, which is not installed: sudo apt-get install passt")]
    NoPasst,
    /// passt cannot be started.
    #[error("passt cannot be started: check that passt --version runs")]
    StartPasst(#[source] io::Error),
    /// No descriptors left.
    #[error("no socket for passt: raise the limit of open files (ulimit -n)")]
    Socket(#[source] io::Error),
    /// A forwarded port that somebody has.
    #[error("port {port} of the host is in use: forward another one")]
    PortInUse {
        /// Its number.
        port: u16,
        /// EADDRINUSE.
        source: io::Error,
    },
    /// A forwarded port that is for root.
    #[error("port {port} of the host is not for everyone: forward one from 1024 on")]
    PortNotAllowed {
        /// Its number.
        port: u16,
        /// EACCES.
        source: io::Error,
    },
    /// timerfd_create.
    #[error("no timer for the metadata service: raise the limit of open files (ulimit -n)")]
    MmdsTimer(#[source] io::Error),
    /// A limiter cannot be made.
    #[error("the network interface cannot be limited")]
    Limiter(#[from] crate::rate_limiter::Error),
}
