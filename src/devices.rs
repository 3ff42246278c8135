//! Devices on the command line: `WHAT[,KEY=VALUE|,FLAG]…`, into their configuration.

use husk_config::{
    Balloon, CacheType, Drive, Entropy, Forward, IoEngine, NetworkInterface, Overlay, RateLimiter,
    TokenBucket, UserNetwork, Vsock,
};

/// `--disk PATH|socket=PATH[,ro][,root][,direct][,overlay[=DIR]][,id=NAME][,cache=unsafe|writeback][,engine=auto|sync|uring][,queues=N][,rate=B][,ops=N]`.
/// `index` makes the name of a disk that has none.
pub fn disk(text: &str, index: usize) -> Result<Drive, String> {
    let mut words = Words::new(text);
    let first = words.first();
    let mut drive = Drive::new(format!("disk{index}"), &first);
    if let Some(socket) = first.strip_prefix("socket=") {
        (drive.path_on_host, drive.socket) = (None, Some(socket.into()));
    }
    let mut limits = Limits::default();
    for (key, value) in words.rest() {
        match (key.as_str(), value.as_deref()) {
            ("ro", None) => drive.is_read_only = Some(true),
            ("root", None) => drive.is_root_device = true,
            ("direct", None) => drive.direct = true,
            ("overlay", directory) => {
                let directory = directory.map(Into::into);
                drive.overlay = Some(Overlay { directory });
            }
            ("id", Some(id)) => drive.drive_id = id.into(),
            ("cache", Some("unsafe")) => drive.cache_type = CacheType::Unsafe,
            ("cache", Some("writeback")) => drive.cache_type = CacheType::Writeback,
            ("engine", Some("auto")) => drive.io_engine = Some(IoEngine::Auto),
            ("engine", Some("sync")) => drive.io_engine = Some(IoEngine::Sync),
            ("engine", Some("uring")) => drive.io_engine = Some(IoEngine::Async),
            ("queues", Some(count)) => drive.queues = number(&key, count)?,
            ("rate", Some(rate)) => limits.bytes = Some(bytes(&key, rate)?),
            ("ops", Some(ops)) => limits.ops = Some(number(&key, ops)?),
            _ => {
                return Err(unknown(
                    &key,
                    value,
                    "ro, root, direct, overlay, overlay=DIR, id=NAME, cache=unsafe|writeback, engine=auto|sync|uring, queues=N, rate=BYTES, ops=N",
                ));
            }
        }
    }
    drive.rate_limiter = limits.limiter();
    Ok(drive)
}

/// `--net tap=NAME|fd=N|user[,id=NAME][,mac=…][,mtu=N][,queues=N][,rx-rate=B][,tx-rate=B]`.
pub fn net(text: &str, index: usize) -> Result<NetworkInterface, String> {
    let mut interface = NetworkInterface::new(format!("eth{index}"));
    let (mut rx, mut tx) = (Limits::default(), Limits::default());
    for (key, value) in Words::new(text).rest() {
        match (key.as_str(), value.as_deref()) {
            ("user", None) => interface.user = Some(UserNetwork::default()),
            ("tap", Some(name)) => interface.host_dev_name = name.into(),
            ("fd", Some(fd)) => interface.tap_fd = Some(number(&key, fd)?),
            ("id", Some(id)) => interface.iface_id = id.into(),
            ("mac", Some(mac)) => interface.guest_mac = Some(mac.into()),
            ("mtu", Some(mtu)) => interface.mtu = Some(number(&key, mtu)?),
            ("queues", Some(count)) => interface.queues = number(&key, count)?,
            ("rx-rate", Some(rate)) => rx.bytes = Some(bytes(&key, rate)?),
            ("tx-rate", Some(rate)) => tx.bytes = Some(bytes(&key, rate)?),
            _ => {
                return Err(unknown(
                    &key,
                    value,
                    "user, tap=NAME, fd=N, id=NAME, mac=AA:BB:CC:DD:EE:FF, mtu=N, queues=N, rx-rate=BYTES, tx-rate=BYTES",
                ));
            }
        }
    }
    interface.rx_rate_limiter = rx.limiter();
    interface.tx_rate_limiter = tx.limiter();
    Ok(interface)
}

/// `-p HOST:GUEST`.
pub fn forward(text: &str) -> Result<Forward, String> {
    let ports = text.split_once(':').and_then(|(host, guest)| {
        Some(Forward {
            host: host.parse().ok().filter(|&port| port > 0)?,
            guest: guest.parse().ok().filter(|&port| port > 0)?,
        })
    });
    ports.ok_or_else(|| "give two TCP ports, HOST:GUEST, 8080:80 for example".into())
}

/// `--vsock cid=N,uds=PATH`.
pub fn vsock(text: &str) -> Result<Vsock, String> {
    let (mut cid, mut path) = (None, None);
    for (key, value) in Words::new(text).rest() {
        match (key.as_str(), value) {
            ("cid", Some(value)) => cid = Some(number(&key, &value)?),
            ("uds", Some(value)) => path = Some(value),
            (_, value) => return Err(unknown(&key, value, "cid=N and uds=PATH")),
        }
    }
    match (cid, path) {
        (Some(guest_cid), Some(path)) => Ok(Vsock {
            guest_cid,
            uds_path: path.into(),
            vsock_id: None,
        }),
        _ => Err("give both, cid=N and uds=PATH".into()),
    }
}

/// `--balloon MIB[,oom][,stats=S][,hinting][,reporting]`.
pub fn balloon(text: &str) -> Result<Balloon, String> {
    let mut words = Words::new(text);
    let mut balloon = Balloon {
        amount_mib: number("the size in MiB", &words.first())?,
        ..Balloon::default()
    };
    for (key, value) in words.rest() {
        match (key.as_str(), value.as_deref()) {
            ("oom", None) => balloon.deflate_on_oom = true,
            ("hinting", None) => balloon.free_page_hinting = true,
            ("reporting", None) => balloon.free_page_reporting = true,
            ("stats", Some(seconds)) => balloon.stats_polling_interval_s = number(&key, seconds)?,
            _ => {
                return Err(unknown(
                    &key,
                    value,
                    "oom, stats=SECONDS, hinting, reporting",
                ));
            }
        }
    }
    Ok(balloon)
}

/// `--entropy [rate=B]`.
pub fn entropy(text: &str) -> Result<Entropy, String> {
    let mut limits = Limits::default();
    for (key, value) in Words::new(text).rest() {
        match (key.as_str(), value.as_deref()) {
            ("rate", Some(rate)) => limits.bytes = Some(bytes(&key, rate)?),
            _ => return Err(unknown(&key, value, "rate=BYTES")),
        }
    }
    Ok(Entropy {
        rate_limiter: limits.limiter(),
    })
}

/// Parts between commas; `,,` is a comma.
struct Words(std::vec::IntoIter<String>);

impl Words {
    fn new(text: &str) -> Self {
        let marked = text.replace(",,", "\0");
        let words: Vec<String> = marked
            .split(',')
            .map(|word| word.replace('\0', ","))
            .filter(|word| !word.is_empty())
            .collect();
        Self(words.into_iter())
    }

    fn first(&mut self) -> String {
        self.0.next().unwrap_or_default()
    }

    fn rest(self) -> impl Iterator<Item = (String, Option<String>)> {
        self.0.map(|word| match word.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (word, None),
        })
    }
}

/// Per second.
#[derive(Default)]
struct Limits {
    bytes: Option<u64>,
    ops: Option<u64>,
}

impl Limits {
    fn limiter(self) -> Option<RateLimiter> {
        // Ten times a second: smooth, and one bucket still holds the largest request at usual rates.
        let bucket = |per_second: u64| TokenBucket {
            size: per_second.div_ceil(10),
            one_time_burst: None,
            refill_time: 100,
        };
        let limiter = RateLimiter {
            bandwidth: self.bytes.map(bucket),
            ops: self.ops.map(bucket),
        };
        (limiter != RateLimiter::default()).then_some(limiter)
    }
}

fn number<T: std::str::FromStr>(key: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no number that {key} takes"))
}

/// Bytes per second, with K, M or G for powers of 1024.
fn bytes(key: &str, text: &str) -> Result<u64, String> {
    let unit = match text.chars().last() {
        Some('k' | 'K') => 10,
        Some('m' | 'M') => 20,
        Some('g' | 'G') => 30,
        _ => 0,
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let digits_only = text.len() - digits.len() <= usize::from(unit > 0);
    let value = digits.parse::<u64>().ok().filter(|&n| n > 0 && digits_only);
    value.and_then(|n| n.checked_mul(1 << unit)).ok_or_else(|| {
        format!("{text:?} is no rate that {key} takes; write 10M for 10 MiB in a second")
    })
}

fn unknown(key: &str, value: Option<String>, known: &str) -> String {
    let word = value.map_or(key.to_owned(), |value| format!("{key}={value}"));
    format!("{word:?} is not known here; there is {known}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let plain = disk("/a b.img", 3).unwrap();
        assert_eq!(plain, Drive::new("disk3", "/a b.img"));
        let full = disk(
            "x,,y,ro,root,direct,id=r,cache=writeback,engine=uring,queues=2,rate=10M,ops=50",
            0,
        );
        let full = full.unwrap();
        assert_eq!(full.path().to_str(), Some("x,y"));
        assert!(full.read_only() && full.is_root_device && full.direct);
        assert_eq!((full.drive_id.as_str(), full.queues), ("r", 2));
        assert_eq!(
            (full.cache_type, full.engine()),
            (CacheType::Writeback, IoEngine::Async)
        );
        let limits = full.rate_limiter.unwrap();
        assert_eq!(limits.bandwidth.unwrap().size, 1 << 20);
        assert_eq!(limits.ops.unwrap().size, 5);
        assert_eq!(plain.overlay, None);
        let thrown_away = disk("x,overlay", 0).unwrap().overlay.unwrap();
        assert_eq!(thrown_away, Overlay::default());
        let elsewhere = disk("x,overlay=/a,,b", 0).unwrap().overlay.unwrap();
        assert_eq!(elsewhere.directory, Some("/a,b".into()));
        let served = disk("socket=/run/d,,1,root,id=r", 0).unwrap();
        assert_eq!(served.socket.unwrap().to_str(), Some("/run/d,1"));
        assert!(served.path_on_host.is_none() && served.is_root_device);
        for bad in [
            "x,rw",
            "x,ro=1",
            "x,queues=many",
            "x,rate=fast",
            "x,rate=0",
            "x,rate=1KM",
            "x,cache=none",
            "x,id",
        ] {
            assert!(disk(bad, 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_and_ports() {
        let tap = net(
            "tap=tap0,mac=02:00:00:00:00:01,mtu=9000,queues=2,rx-rate=1G",
            1,
        )
        .unwrap();
        assert_eq!(tap.host_dev_name, "tap0");
        assert_eq!((tap.iface_id.as_str(), tap.mtu), ("eth1", Some(9000)));
        assert!(tap.rx_rate_limiter.is_some() && tap.tx_rate_limiter.is_none());
        assert!(net("user", 0).unwrap().user.is_some());
        assert!(net("bridge=br0", 0).unwrap_err().contains("bridge=br0"));
        assert_eq!(
            forward("8080:80"),
            Ok(Forward {
                host: 8080,
                guest: 80
            })
        );
        for bad in ["80", "a:b", "0:80", "80:", "70000:1"] {
            assert!(forward(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_others() {
        let vsock = vsock("cid=3,uds=/tmp/v").unwrap();
        assert_eq!(
            (vsock.guest_cid, vsock.uds_path.to_str()),
            (3, Some("/tmp/v"))
        );
        assert!(super::vsock("cid=3").is_err());
        let balloon = balloon("64,oom,stats=2,reporting").unwrap();
        assert_eq!(
            (balloon.amount_mib, balloon.stats_polling_interval_s),
            (64, 2)
        );
        assert!(
            balloon.deflate_on_oom && balloon.free_page_reporting && !balloon.free_page_hinting
        );
        assert!(super::balloon("lots").is_err());
        assert_eq!(entropy("").unwrap(), Entropy::default());
        assert!(entropy("rate=1M").unwrap().rate_limiter.is_some());
    }
}
