//! Requests of the API's clients.

use crate::sections::METRICS;
use crate::value::Counter;

/// Count a request of `method` for `path`, when it has come: a request to flush is in the line that it asks for. Only what
/// Firecracker counts is.
pub fn count_request(method: &str, path: &str) {
    if let Some((count, _)) = counters(method, path) {
        count.inc();
    }
}

/// Such a request has failed.
pub fn count_failed_request(method: &str, path: &str) {
    if let Some((_, Some(fails))) = counters(method, path) {
        fails.inc();
    }
}

/// Count a request with a deprecated path or field.
pub fn count_deprecated_request() {
    METRICS.deprecated_api.deprecated_http_api_calls.inc();
}

type Counters = (&'static Counter, Option<&'static Counter>);

fn counters(method: &str, path: &str) -> Option<Counters> {
    let mut parts = path.trim_start_matches('/').splitn(3, '/');
    let (first, second) = (parts.next().unwrap_or_default(), parts.next());
    let (get, put, patch) = (
        &METRICS.get_api_requests,
        &METRICS.put_api_requests,
        &METRICS.patch_api_requests,
    );
    let (count, fails) = match (method, first, second) {
        ("GET", "", None) => (&get.instance_info_count, None),
        ("GET", "version", None) => (&get.vmm_version_count, None),
        ("GET", "machine-config", None) => (&get.machine_cfg_count, None),
        ("GET", "mmds", None) => (&get.mmds_count, None),
        ("GET", "hotplug", Some("memory")) => (&get.hotplug_memory_count, None),
        ("PUT", "actions", None) => (&put.actions_count, Some(&put.actions_fails)),
        ("PUT", "boot-source", None) => (&put.boot_source_count, Some(&put.boot_source_fails)),
        ("PUT", "drives", _) => (&put.drive_count, Some(&put.drive_fails)),
        ("PUT", "logger", None) => (&put.logger_count, Some(&put.logger_fails)),
        ("PUT", "machine-config", None) => (&put.machine_cfg_count, Some(&put.machine_cfg_fails)),
        ("PUT", "cpu-config", None) => (&put.cpu_cfg_count, Some(&put.cpu_cfg_fails)),
        ("PUT", "metrics", None) => (&put.metrics_count, Some(&put.metrics_fails)),
        ("PUT", "network-interfaces", _) => (&put.network_count, Some(&put.network_fails)),
        ("PUT", "mmds", _) => (&put.mmds_count, Some(&put.mmds_fails)),
        ("PUT", "vsock", None) => (&put.vsock_count, Some(&put.vsock_fails)),
        ("PUT", "pmem", _) => (&put.pmem_count, Some(&put.pmem_fails)),
        ("PUT", "serial", None) => (&put.serial_count, Some(&put.serial_fails)),
        ("PUT", "hotplug", Some("memory")) => {
            (&put.hotplug_memory_count, Some(&put.hotplug_memory_fails))
        }
        ("PATCH", "drives", _) => (&patch.drive_count, Some(&patch.drive_fails)),
        ("PATCH", "network-interfaces", _) => (&patch.network_count, Some(&patch.network_fails)),
        ("PATCH", "machine-config", None) => {
            (&patch.machine_cfg_count, Some(&patch.machine_cfg_fails))
        }
        ("PATCH", "mmds", None) => (&patch.mmds_count, Some(&patch.mmds_fails)),
        ("PATCH", "hotplug", Some("memory")) => (
            &patch.hotplug_memory_count,
            Some(&patch.hotplug_memory_fails),
        ),
        _ => return None,
    };
    Some((count, fails))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_method_and_path() {
        let put = &METRICS.put_api_requests;
        count_request("PUT", "/drives/root");
        for (method, path) in [
            ("PUT", "/drives/root"),
            ("PUT", "/mmds/config"),
            ("DELETE", "/drives/root"),
            ("PUT", "/nowhere"),
            ("GET", "/"),
        ] {
            count_request(method, path);
            count_failed_request(method, path);
        }
        assert_eq!((put.drive_count.total(), put.drive_fails.total()), (2, 1));
        assert_eq!((put.mmds_count.total(), put.mmds_fails.total()), (1, 1));
        assert_eq!(METRICS.get_api_requests.instance_info_count.total(), 1);
    }
}
