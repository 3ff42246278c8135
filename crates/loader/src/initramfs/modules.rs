//! Kernel modules: found by `modules.dep`, unpacked, in the order to load them in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path};

use super::MAX_FILE;
use crate::unpack::{Compression, unpack};

/// Names (as in `lsmod`, with `_`) and contents of `wanted` and what they depend on, each once, each
/// after what it depends on. What is built in or missing is left out.
pub(super) fn load(directory: Option<&Path>, wanted: &[String]) -> Vec<(String, Vec<u8>)> {
    let Some(directory) = directory else {
        log::debug!("no modules directory: the initramfs has no modules");
        return Vec::new();
    };
    let dependencies = match fs::read_to_string(directory.join("modules.dep")) {
        Ok(text) => text,
        Err(error) => {
            log::debug!("no modules for the initramfs: {directory:?} has no modules.dep ({error})");
            return Vec::new();
        }
    };
    let built_in = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
    let mut loaded = Vec::new();
    for path in order(&dependencies, &built_in, wanted) {
        match read(directory, path) {
            Ok(data) => loaded.push((name(path), data)),
            Err(error) => log::warn!("the initramfs has no module {path:?}: {error}"),
        }
    }
    loaded
}

/// The paths to load, in order. A line of `modules.dep` is `MODULE: DEPENDENCY...`, where the last
/// is loaded first.
fn order<'a>(dependencies: &'a str, built_in: &str, wanted: &[String]) -> Vec<&'a str> {
    let lines: BTreeMap<String, (&str, &str)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, rest)| (name(path), (path, rest)))
        .collect();
    let built_in: BTreeSet<String> = built_in.lines().map(name).collect();
    let mut seen = BTreeSet::new();
    let mut paths = Vec::new();
    for module in wanted.iter().map(|module| name(module)) {
        let Some((path, rest)) = lines.get(&module) else {
            let why = if built_in.contains(&module) {
                "it is built in"
            } else {
                "there is none"
            };
            log::debug!("the initramfs has no module {module}: {why}");
            continue;
        };
        for path in rest.split_whitespace().rev().chain([*path]) {
            if seen.insert(name(path)) {
                paths.push(path);
            }
        }
    }
    paths
}

/// `kernel/drivers/acpi/a-b.ko.xz` is the module `a_b`.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path).trim();
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn read(directory: &Path, path: &str) -> Result<Vec<u8>, String> {
    let path = Path::new(path);
    if !path
        .components()
        .all(|component| matches!(component, Component::Normal(_)))
    {
        return Err("modules.dep names it outside its directory".to_owned());
    }
    let file = File::open(directory.join(path)).map_err(|error| error.to_string())?;
    let mut data = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut data)
        .map_err(|error| error.to_string())?;
    let Some(compression) = Compression::detect(&data) else {
        return Ok(data);
    };
    let mut unpacked = Vec::new();
    match unpack(compression, &data, MAX_FILE, &mut unpacked) {
        Ok(_) => Ok(unpacked),
        Err(fault) => Err(format!("its {compression} data do not unpack ({fault:?})")),
    }
}
