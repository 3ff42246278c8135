use super::*;
use crate::prometheus;
use crate::sections::{BlockMetrics, NetMetrics};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Metrics of a process of its own.
fn metrics() -> &'static Metrics {
    Box::leak(Box::new(Metrics::new()))
}

fn sink(dir: &TempDir) -> (Sink, PathBuf) {
    let path = dir.path().join("metrics");
    (Sink::open(&path).unwrap(), path)
}

/// Flush, and the line.
fn line(sink: &mut Sink, metrics: &'static Metrics) -> Value {
    let before = std::fs::read(&sink.path).unwrap().len();
    sink.flush(metrics).unwrap();
    let text = std::fs::read_to_string(&sink.path).unwrap();
    let line = &text[before..];
    assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
    serde_json::from_str(line).unwrap()
}

fn text(metrics: &'static Metrics) -> String {
    prometheus::text(&metrics.groups())
}

/// What is at `path`, dots between names.
#[track_caller]
fn at(line: &Value, path: &str) -> u64 {
    let mut value = line;
    for name in path.split('.') {
        value = value
            .get(name)
            .unwrap_or_else(|| panic!("no {path} in {line}"));
    }
    value.as_u64().unwrap()
}

#[test]
fn counters_are_told_as_what_is_new_and_gauges_as_they_are() {
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let metrics = metrics();
    metrics.uart.write_count.add(7);
    metrics.seccomp.num_faults.set(2);
    metrics.latencies_us.pause_vm.set(Duration::from_millis(3));
    let first = line(&mut sink, metrics);
    assert_eq!(at(&first, "uart.write_count"), 7);
    metrics.uart.write_count.add(2);
    let second = line(&mut sink, metrics);
    assert_eq!(at(&second, "uart.write_count"), 2);
    let third = line(&mut sink, metrics);
    assert_eq!(at(&third, "uart.write_count"), 0);
    for line in [first, second, third] {
        assert_eq!(at(&line, "seccomp.num_faults"), 2);
        assert_eq!(at(&line, "latencies_us.pause_vm"), 3000);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.as_millis() as u64 - at(&line, "utc_timestamp_ms");
        assert!(age < 60_000, "{age}");
    }
    // No flush resets what Prometheus sees.
    let text = text(metrics);
    assert!(text.contains("\nhusk_uart_write_total 9\n"), "{text}");
    assert!(text.contains("\nhusk_latencies_pause_vm_seconds 0.003000\n"));
}

#[test]
fn latencies_add_up_however_short_they_are() {
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let metrics = metrics();
    let vcpus = [metrics.vcpu.member("0"), metrics.vcpu.member("1")];
    for ns in [600, 700, 800] {
        let took = Duration::from_nanos(ns);
        vcpus[0].exit_io_in_agg.record(took);
    }
    vcpus[1]
        .exit_io_in_agg
        .record(Duration::from_nanos(5_000_000_900));
    let told = line(&mut sink, metrics);
    assert_eq!(at(&told, "vcpu.exit_io_in_agg.min_us"), 0);
    assert_eq!(at(&told, "vcpu.exit_io_in_agg.max_us"), 5_000_000);
    assert_eq!(at(&told, "vcpu.exit_io_in_agg.sum_us"), 5_000_003);
    assert_eq!(at(&told, "vcpu.exit_io_out_agg.min_us"), 0);
    vcpus[0].exit_io_in_agg.record(Duration::from_micros(10));
    let told = line(&mut sink, metrics);
    assert_eq!(at(&told, "vcpu.exit_io_in_agg.sum_us"), 10);
    assert_eq!(at(&told, "vcpu.exit_io_in_agg.max_us"), 5_000_000);
    let text = text(metrics);
    for sample in [
        "\nhusk_vcpu_exit_io_in_seconds_sum{vcpu=\"0\"} 0.000012100\n",
        "\nhusk_vcpu_exit_io_in_seconds_count{vcpu=\"0\"} 4\n",
        "\nhusk_vcpu_exit_io_in_min_seconds{vcpu=\"0\"} 0.000000600\n",
        "\nhusk_vcpu_exit_io_in_max_seconds{vcpu=\"1\"} 5.000000900\n",
    ] {
        assert!(text.contains(sample), "no {sample} in {text}");
    }
}

#[test]
fn every_value_is_in_both_formats_under_a_name_of_its_own() {
    let metrics = metrics();
    let _devices = (metrics.block.member("root"), metrics.net.member("eth0"));
    let _served = metrics.vhost_user_block.member("data");
    for family in ["0", "1"] {
        metrics.vcpu.member(family);
    }
    metrics.vsock.member("");
    metrics.entropy.member("");
    metrics.balloon.member("");
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let line = line(&mut sink, metrics);
    let text = text(metrics);
    let mut families = BTreeSet::new();
    for head in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (family, kind) = head.split_once(' ').unwrap();
        assert!(["counter", "gauge", "summary"].contains(&kind), "{head}");
        assert!(families.insert(family), "{family} is there twice");
        assert!(text.contains(&format!("# HELP {family} ")), "{family}");
    }
    let mut samples = BTreeSet::new();
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = sample.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap();
        assert!(samples.insert(name), "{name} is there twice");
        let family = name.split('{').next().unwrap();
        let of_summary = ["_sum", "_count"]
            .iter()
            .filter_map(|end| family.strip_suffix(end))
            .any(|family| families.contains(family));
        assert!(of_summary || families.contains(family), "{name}");
    }
    for group in metrics.groups() {
        let section = group.name.strip_suffix("_us").unwrap_or(group.name);
        for field in group.fields {
            let own = line
                .get(group.name)
                .and_then(|fields| fields.get(field.name));
            assert!(own.is_some(), "{}.{} is not told", group.name, field.name);
            assert!(field.help.ends_with('.') && !field.help.contains('\n'));
            let stem = field.name.trim_end_matches("_us").trim_end_matches("_agg");
            let stem = stem.strip_suffix("_count").unwrap_or(stem);
            let family = format!("husk_{section}_{stem}");
            let found = families.iter().any(|own| own.starts_with(&family));
            assert!(found, "no {family}");
        }
    }
}

#[test]
fn lines_have_firecrackers_sections_and_names() {
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let metrics = metrics();
    let line = line(&mut sink, metrics);
    for path in [
        "api_server.process_startup_time_us",
        "balloon.inflate_count",
        "block.read_bytes",
        "block.read_agg.sum_us",
        "deprecated_api.deprecated_http_api_calls",
        "get_api_requests.instance_info_count",
        "i8042.reset_count",
        "uart.write_count",
        "vhost_user_block.activate_time_us",
        "latencies_us.full_create_snapshot",
        "logger.missed_metrics_count",
        "mmds.rx_accepted",
        "net.tx_packets_count",
        "net.tap_write_agg.max_us",
        "patch_api_requests.drive_count",
        "put_api_requests.actions_count",
        "seccomp.num_faults",
        "vcpu.exit_io_out",
        "vcpu.exit_mmio_read_agg.min_us",
        "vmm.panic_count",
        "signals.sigpipe",
        "vsock.conns_added",
        "entropy.entropy_bytes",
        "interrupts.triggers",
    ] {
        assert_eq!(at(&line, path), 0, "{path}");
    }
}

#[test]
fn devices_are_told_each_and_together_and_once_more_when_they_are_gone() {
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let metrics = metrics();
    let (root, data): (Arc<BlockMetrics>, _) =
        (metrics.block.member("root"), metrics.block.member("data"));
    root.read_bytes.add(512);
    data.read_bytes.add(1024);
    let told = line(&mut sink, metrics);
    assert_eq!(at(&told, "block_root.read_bytes"), 512);
    assert_eq!(at(&told, "block_data.read_bytes"), 1024);
    assert_eq!(at(&told, "block.read_bytes"), 1536);
    let text = text(metrics);
    assert!(text.contains("\nhusk_block_read_bytes_total{drive_id=\"data\"} 1024\n"));
    // One that is made again counts on.
    drop(data);
    let data = metrics.block.member("data");
    data.read_bytes.add(1);
    assert_eq!(data.read_bytes.total(), 1025);
    drop(data);
    let told = line(&mut sink, metrics);
    assert_eq!(at(&told, "block_data.read_bytes"), 1);
    assert_eq!(at(&told, "block.read_bytes"), 1);
    let told = line(&mut sink, metrics);
    assert!(told.get("block_data").is_none(), "{told}");
    assert!(told.get("block_root").is_some());
    // Without a file, too, those that are gone do not pile up.
    for number in 0..1000 {
        metrics.net.member(&number.to_string()).rx_count.inc();
    }
    let left: Vec<(_, Arc<NetMetrics>)> = metrics.net.all();
    assert!(left.len() <= 65, "{}", left.len());
    assert_eq!(&*left.last().unwrap().0, "999");
}

#[test]
fn strange_names_stay_inside_their_quotes() {
    let metrics = metrics();
    let name = "a\"b\\c\nd";
    metrics.block.member(name).read_count.inc();
    let text = text(metrics);
    assert!(
        text.contains("\nhusk_block_read_total{drive_id=\"a\\\"b\\\\c\\nd\"} 1\n"),
        "{text}"
    );
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let told = line(&mut sink, metrics);
    assert_eq!(told[format!("block_{name}")]["read_count"], 1);
}

#[test]
fn a_fifo_that_nobody_reads_holds_nothing_up_and_loses_no_count() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("fifo");
    let status = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(status.unwrap().success());
    let mut sink = Sink::open(&path).unwrap();
    let metrics = metrics();
    let mut count = 0;
    let missed = loop {
        metrics.uart.write_count.inc();
        count += 1;
        match sink.flush(metrics) {
            Ok(()) => assert!(count < 1000, "the FIFO is never full"),
            Err(Error::Full(full)) => break full,
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(missed, path);
    assert_eq!(metrics.logger.missed_metrics_count.total(), 1);
    assert!(sink.flush(metrics).is_err());
    // A reader comes: every line is whole, and together they tell all that was counted.
    let mut reader = File::open(&path).unwrap();
    let mut text = vec![0; 1 << 16];
    let mut read = reader.read(&mut text).unwrap();
    text.truncate(read);
    sink.flush(metrics).unwrap();
    let mut more = vec![0; 1 << 16];
    read = reader.read(&mut more).unwrap();
    text.extend(&more[..read]);
    let lines = text
        .strip_suffix(b"\n")
        .unwrap()
        .split(|&byte| byte == b'\n');
    let lines: Vec<Value> = lines.map(|l| serde_json::from_slice(l).unwrap()).collect();
    let told: u64 = lines.iter().map(|line| at(line, "uart.write_count")).sum();
    assert_eq!(told, count);
    let missed = lines.last().unwrap();
    assert_eq!(at(missed, "logger.missed_metrics_count"), 2);
}

#[test]
fn a_full_disk_is_told_of_and_the_counts_wait() {
    let metrics = metrics();
    metrics.uart.write_count.add(5);
    let mut full = Sink::open(Path::new("/dev/full")).unwrap();
    let error = full.flush(metrics).unwrap_err();
    assert!(error.to_string().contains("/dev/full"), "{error}");
    assert_eq!(metrics.logger.missed_metrics_count.total(), 1);
    let dir = TempDir::new().unwrap();
    let (mut sink, _) = sink(&dir);
    let told = line(&mut sink, metrics);
    assert_eq!(at(&told, "uart.write_count"), 5);
    assert_eq!(at(&told, "logger.missed_metrics_count"), 1);
}

#[test]
fn a_file_is_made_or_appended_to_once_per_process() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("metrics");
    assert!(!flush().unwrap() && next_flush().is_none());
    let nowhere = dir.path().join("no/metrics");
    assert!(matches!(configure(&nowhere), Err(Error::Open(..))));
    assert!(matches!(configure(dir.path()), Err(Error::Open(..))));
    std::fs::write(&path, "before\n").unwrap();
    configure(&path).unwrap();
    assert!(matches!(configure(&path), Err(Error::Configured(_))));
    assert!(!flush_if_due(Instant::now()).unwrap());
    let due = next_flush().unwrap();
    assert!(flush_if_due(due).unwrap());
    assert!(next_flush().unwrap() >= due + PERIOD);
    assert!(flush().unwrap());
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("before\n{\"utc_timestamp_ms\":"), "{text}");
    assert_eq!(text.lines().count(), 3);
}

/// With something of every kind, told and untold.
fn busy() -> &'static Metrics {
    let metrics = metrics();
    metrics.signals.sigsegv.set(1);
    metrics.uart.write_count.add(7);
    metrics.latencies_us.pause_vm.set(Duration::from_millis(3));
    for (name, bytes) in [("root", 4096), ("a\"b\\c\n", u64::MAX)] {
        let disk = metrics.block.member(name);
        disk.read_bytes.add(bytes);
        disk.read_agg.record(Duration::from_micros(bytes % 1000));
        // It is still there.
        std::mem::forget(disk);
    }
    for (cpu, us) in [("0", 7), ("1", 2)] {
        metrics.vcpu.member(cpu).exit_io_out.inc();
        let own = metrics.vcpu.member(cpu);
        own.exit_io_out_agg.record(Duration::from_micros(us));
    }
    metrics
}

#[test]
fn the_last_line_is_what_any_line_would_have_been() {
    let dir = TempDir::new().unwrap();
    let (mut sink, path) = sink(&dir);
    let metrics = busy();
    let parse = |text: &str| {
        let mut line: Value = serde_json::from_str(text).unwrap();
        let ms = line["utc_timestamp_ms"].take().as_u64().unwrap();
        assert!(now_ms() - ms < 60_000, "{ms}");
        line
    };
    let last = |sink: &mut Sink| {
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        sink.flush_last(metrics);
        let after = std::fs::read_to_string(&path).unwrap();
        assert_eq!(after.lines().count(), before.lines().count() + 1);
        std::mem::swap(&mut sink.last, &mut sink.rest);
        parse(&after[before.len()..])
    };
    let untold = last(&mut sink);
    let before = std::fs::read_to_string(&path).unwrap().len();
    sink.flush(metrics).unwrap();
    let wanted = parse(&std::fs::read_to_string(&path).unwrap()[before..]);
    assert_eq!(untold, wanted);
    assert_eq!(at(&untold, "block_root.read_bytes"), 4096);
    assert_eq!(at(&untold, "vcpu.exit_io_out"), 2);
    assert_eq!(at(&untold, "vcpu.exit_io_out_agg.min_us"), 2);
    assert_eq!(at(&untold, "vcpu.exit_io_out_agg.sum_us"), 9);
    // What was told is not told again.
    let told = last(&mut sink);
    assert_eq!(at(&told, "block_root.read_bytes"), 0);
    assert_eq!(at(&told, "vcpu.exit_io_out_agg.sum_us"), 0);
    assert_eq!(at(&told, "signals.sigsegv"), 1);
}

#[test]
fn the_last_line_never_grows_its_memory_and_is_whole_or_not_there() {
    let metrics = busy();
    let mut whole = Vec::with_capacity(LAST_LINE);
    assert!(last::line(1, metrics, &mut whole));
    assert_eq!(whole.capacity(), LAST_LINE);
    for room in [0, 1, 100, whole.len() - 1] {
        let mut bytes = Vec::with_capacity(room);
        // An allocator may give more.
        assert!(bytes.capacity() < whole.len());
        let capacity = bytes.capacity();
        assert!(!last::line(1, metrics, &mut bytes), "{room}");
        assert_eq!(bytes.capacity(), capacity);
    }
    let dir = TempDir::new().unwrap();
    let (mut sink, path) = sink(&dir);
    sink.last = Vec::with_capacity(100);
    sink.flush_last(metrics);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
}

#[test]
fn the_last_line_comes_behind_the_rest_of_the_one_before() {
    let dir = TempDir::new().unwrap();
    let (mut sink, path) = sink(&dir);
    sink.rest = b"the rest\n".to_vec();
    sink.flush_last(metrics());
    let text = std::fs::read_to_string(&path).unwrap();
    let (rest, line) = text.split_once('\n').unwrap();
    assert_eq!(rest, "the rest");
    assert_eq!(line.lines().count(), 1);
    serde_json::from_str::<Value>(line).unwrap();
}

#[test]
fn the_last_line_waits_for_nobody_who_is_at_a_list_of_devices() {
    let metrics = busy();
    let mut bytes = Vec::with_capacity(LAST_LINE);
    // This thread is: waiting would be for ever.
    metrics.block.with_all_at_once(|all| {
        assert_eq!(all.len(), 2);
        assert!(last::line(1, metrics, &mut bytes));
    });
    let line: Value = serde_json::from_slice(&bytes).unwrap();
    assert!(line.get("block_root").is_none());
    assert_eq!(at(&line, "block.read_bytes"), 0);
    assert_eq!(at(&line, "vcpu.exit_io_out"), 2);
}
