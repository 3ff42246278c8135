//! Kernel modules: found, unpacked, in the order to load them in.

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
    let text = |name: &str| fs::read_to_string(directory.join(name));
    let paths = match (text("modules.dep"), text("modules.order")) {
        (Ok(dependencies), _) => {
            let built_in = text("modules.builtin").unwrap_or_default();
            order(&dependencies, &built_in, wanted)
        }
        // A package that was unpacked and not installed: depmod has not run.
        (Err(_), Ok(all)) => order_by_contents(directory, &all, wanted),
        (Err(error), Err(_)) => {
            log::debug!("no modules for the initramfs: {directory:?} has no modules.dep ({error})");
            return Vec::new();
        }
    };
    let mut loaded = Vec::new();
    for path in paths {
        match read(directory, &path) {
            Ok(data) => loaded.push((name(&path), data)),
            Err(error) => log::warn!("the initramfs has no module {path:?}: {error}"),
        }
    }
    loaded
}

/// The paths to load, in order. A line of `modules.dep` is `MODULE: DEPENDENCY...`, where the last
/// is loaded first.
fn order(dependencies: &str, built_in: &str, wanted: &[String]) -> Vec<String> {
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
                paths.push(path.to_owned());
            }
        }
    }
    paths
}

/// The same without `modules.dep`: `all` is `modules.order`, one path a line, and each module says
/// itself what it depends on.
fn order_by_contents(directory: &Path, all: &str, wanted: &[String]) -> Vec<String> {
    let all: BTreeMap<String, &str> = all.lines().map(|path| (name(path), path)).collect();
    // Each is met twice: first to look at what it needs, then, after that, to be loaded.
    let mut ahead: Vec<(String, Option<String>)> = wanted
        .iter()
        .rev()
        .map(|module| (name(module), None))
        .collect();
    let mut seen = BTreeSet::new();
    let mut paths = Vec::new();
    while let Some((module, ready)) = ahead.pop() {
        if let Some(path) = ready {
            paths.push(path);
            continue;
        }
        let path = all.get(&module).and_then(|path| {
            let packed = ["", ".xz", ".zst", ".gz"].map(|suffix| format!("{path}{suffix}"));
            packed
                .into_iter()
                .find(|path| directory.join(path).is_file())
        });
        if let Some(path) = path
            && seen.insert(module.clone())
        {
            let data = read(directory, &path).unwrap_or_default();
            ahead.push((module, Some(path)));
            ahead.extend(depends(&data).into_iter().map(|module| (module, None)));
        }
    }
    paths
}

/// What a module says in its `.modinfo` section that it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let at = module
        .windows(FIELD.len())
        .position(|window| window == FIELD);
    let value = at
        .and_then(|at| module.get(at + FIELD.len()..))
        .unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|module| !module.is_empty())
        .map(name)
        .collect()
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
        return Err("it is listed outside its directory".to_owned());
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
