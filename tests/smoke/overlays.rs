//! Disks whose writes are thrown away, as the API and the command line have them.

use crate::api::Served;
use crate::common::payload::payload;
use crate::common::{temp_dir, text};
use crate::errors::Refused;
use crate::file;
use serde_json::json;

#[test]
fn a_vm_with_an_overlay_keeps_its_image_and_is_not_kept() {
    let dir = temp_dir();
    let image = file(&dir, "image", &[7; 8192]);
    let overlay = json!({ "directory": dir.path() });
    let mut drive = json!({ "drive_id": "d", "path_on_host": image, "is_root_device": false, "overlay": overlay });
    // Two VMs have it at once.
    let vms = [Served::start(&[]), Served::start(&[])];
    for served in &vms {
        let source = json!({ "kernel_image_path": payload("ticks", "") });
        served.done("PUT", "/boot-source", source);
        let machine = json!({ "mem_size_mib": 64, "vcpu_count": 1 });
        served.done("PUT", "/machine-config", machine);
        served.done("PUT", "/drives/d", drive.clone());
        served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
        assert_eq!(served.get("/vm/config")["drives"][0]["overlay"], overlay);
    }
    let [served, _other] = &vms;
    let patch = json!({ "drive_id": "d", "path_on_host": image });
    let said = served.refused("PATCH", "/drives/d", patch);
    assert!(said.contains("overlay"), "{said}");
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    let places =
        json!({ "snapshot_path": dir.path().join("s"), "mem_file_path": dir.path().join("m") });
    let said = served.refused("PUT", "/snapshot/create", places);
    assert!(said.contains("drives with overlays"), "{said}");
    // Neither an overlay nor a part of a snapshot.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let served = Served::start(&[]);
    drive["is_read_only"] = true.into();
    let said = served.refused("PUT", "/drives/d", drive.clone());
    assert!(said.contains("leave one out"), "{said}");
    drive["is_read_only"] = false.into();
    drive["overlay"] = json!({ "file": "x" });
    let said = served.refused("PUT", "/drives/d", drive);
    assert!(said.contains("file"), "{said}");
}

#[test]
fn an_overlay_that_cannot_be_made_is_said_in_one_line() {
    let dir = temp_dir();
    let image = file(&dir, "image", &[7; 8192]);
    let nowhere = dir.path().join("nowhere");
    let disk = format!("{},overlay={}", text(&image), text(&nowhere));
    let kernel = payload("ticks", "");
    let arguments = ["--kernel", &kernel, "--disk", &disk];
    Refused::by(&arguments).with(2, &[text(&nowhere), text(&image), "another directory"]);
}
