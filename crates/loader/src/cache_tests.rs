use std::io::{Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;

use super::*;

fn fill(mut file: &File) -> Result<u64, StoreFault> {
    file.write_all(b"contents")?;
    Ok(8)
}

fn store(cache: &Cache, key: &Key) -> File {
    cache.store(key, Path::new("source"), &fill).unwrap()
}

fn text(mut file: File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn identity(changed: i64) -> Identity {
    Identity {
        device: 1,
        inode: 2,
        size: 3,
        modified: (4, 5),
        changed: (changed, 7),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn what_is_stored_is_found_by_key_and_by_source() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("a/b"));
    let key = Key::new("kernel", &[b"x"]);
    assert!(cache.find(&key.name()).is_none());
    assert_eq!(text(store(&cache, &key)), "contents");
    assert_eq!(text(cache.find(&key.name()).unwrap()), "contents");
    cache.link(&identity(6), &key);
    assert_eq!(text(cache.find(&identity(6).name()).unwrap()), "contents");
    assert!(cache.find(&identity(8).name()).is_none());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let directory = directory.path().join("a/b");
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join(key.name())), 0o600);
    assert_eq!(names(&directory).len(), 3, "{:?}", names(&directory));
}

#[test]
fn a_source_changed_just_now_is_not_linked() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let key = Key::new("kernel", &[b"x"]);
    store(&cache, &key);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let fresh = identity(now as i64);
    cache.link(&fresh, &key);
    assert!(cache.find(&fresh.name()).is_none());
    assert!(!identity(i64::MAX).settled(SystemTime::now()));
}

#[test]
fn keys_differ_by_kind_and_by_where_parts_end() {
    let keys = [
        Key::new("kernel", &[b"ab", b"c"]),
        Key::new("kernel", &[b"a", b"bc"]),
        Key::new("kernel", &[b"abc"]),
        Key::new("initramfs", &[b"abc"]),
    ];
    let names: std::collections::BTreeSet<String> = keys.iter().map(Key::name).collect();
    assert_eq!(names.len(), keys.len());
}

#[test]
fn an_entry_of_another_length_is_not_found_and_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let key = Key::new("kernel", &[b"x"]);
    store(&cache, &key);
    fs::write(directory.path().join("cache").join(key.name()), b"torn").unwrap();
    assert!(cache.find(&key.name()).is_none());
    store(&cache, &key);
    assert_eq!(text(cache.find(&key.name()).unwrap()), "contents");
}

#[test]
fn links_out_of_the_directory_are_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    store(&cache, &Key::new("kernel", &[b"x"]));
    fs::write(directory.path().join("secret-8"), b"contents").unwrap();
    for (name, target) in [
        ("up", "../secret-8"),
        ("away", "/etc/a-8"),
        ("none", "x"),
        ("bad", "x--1"),
    ] {
        symlink(target, directory.path().join("cache").join(name)).unwrap();
        assert!(cache.find(name).is_none(), "{target}");
    }
    let key = Key::new("kernel", &[b"y"]);
    let entry = directory
        .path()
        .join("cache")
        .join(format!("{}-8", key.name()));
    symlink(directory.path().join("secret-8"), &entry).unwrap();
    symlink(
        entry.file_name().unwrap(),
        directory.path().join("cache").join(key.name()),
    )
    .unwrap();
    assert!(cache.find(&key.name()).is_none());
}

#[test]
fn a_directory_that_others_can_write_to_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().to_owned());
    let key = Key::new("kernel", &[b"x"]);
    store(&cache, &key);
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    assert!(cache.find(&key.name()).is_none());
    let before = names(directory.path()).len();
    assert_eq!(
        text(store(&cache, &Key::new("kernel", &[b"y"]))),
        "contents"
    );
    assert_eq!(names(directory.path()).len(), before);
}

#[test]
fn where_nothing_can_be_written_memory_serves() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let key = Key::new("kernel", &[b"x"]);
    let below_a_file = Cache::new(file.path().join("cache"));
    for cache in [
        below_a_file,
        Cache::new("/proc/husk".into()),
        Cache::disabled(),
    ] {
        assert_eq!(text(store(&cache, &key)), "contents");
        assert!(cache.find(&key.name()).is_none());
    }
}

#[test]
fn when_the_disk_fills_up_memory_serves_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let tries = std::cell::Cell::new(0);
    // The first try writes a part and then meets the error of a device that is always full.
    let fill = |mut file: &File| {
        file.write_all(b"cont")?;
        tries.set(tries.get() + 1);
        if tries.get() == 1 {
            File::options()
                .write(true)
                .open("/dev/full")?
                .write_all(b"ents")?;
        }
        file.write_all(b"ents")?;
        Ok(8)
    };
    let file = cache
        .store(&Key::new("kernel", &[b"x"]), Path::new("source"), &fill)
        .unwrap();
    assert_eq!((text(file).as_str(), tries.get()), ("contents", 2));
    assert_eq!(names(&directory.path().join("cache")), Vec::<String>::new());
}

#[test]
fn a_bad_source_leaves_nothing_and_is_not_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let fill = |_: &File| {
        Err(StoreFault::Source(Error::Empty {
            path: "source".into(),
        }))
    };
    let result = cache.store(&Key::new("kernel", &[b"x"]), Path::new("source"), &fill);
    assert!(matches!(result, Err(Error::Empty { .. })));
    assert_eq!(names(&directory.path().join("cache")), Vec::<String>::new());
}

#[test]
fn adding_removes_what_was_not_used_for_a_month_and_nothing_of_others() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().to_owned());
    let (old, used) = (
        Key::new("kernel", &[b"old"]),
        Key::new("kernel", &[b"used"]),
    );
    let mut aged = Vec::new();
    for key in [&old, &used] {
        store(&cache, key);
        aged.push(format!("{}-8", key.name()));
    }
    aged.extend(["tmp-1-0-0".to_owned(), "notes.txt".to_owned()]);
    for name in &aged {
        let path = directory.path().join(name);
        let file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        file.set_modified(SystemTime::now() - KEPT - DAY).unwrap();
    }
    assert!(cache.find(&used.name()).is_some());
    store(&cache, &Key::new("kernel", &[b"new"]));
    assert!(cache.find(&old.name()).is_none());
    assert!(cache.find(&used.name()).is_some());
    let left = names(directory.path());
    assert!(left.contains(&"notes.txt".to_owned()));
    assert!(
        !left.iter().any(|name| name.starts_with("tmp-")),
        "{left:?}"
    );
}

#[test]
fn many_at_once_all_get_the_contents() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let key = Key::new("kernel", &[b"x"]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let file = cache
                        .find(&key.name())
                        .unwrap_or_else(|| store(&cache, &key));
                    assert_eq!(text(file), "contents");
                }
            });
        }
    });
    assert_eq!(names(&directory.path().join("cache")).len(), 2);
}

#[test]
fn the_default_directory_follows_the_variables_in_order() {
    let all = [
        ("HUSK_CACHE", "/h"),
        ("XDG_CACHE_HOME", "/x"),
        ("HOME", "/home/u"),
    ];
    let with = |pairs: &[(&str, &str)]| {
        default_dir(|name| {
            pairs
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| PathBuf::from(value))
        })
    };
    assert_eq!(with(&all), Some("/h".into()));
    assert_eq!(with(&all[1..]), Some("/x/husk".into()));
    assert_eq!(with(&all[2..]), Some("/home/u/.cache/husk".into()));
    assert_eq!(
        with(&[("HUSK_CACHE", ""), ("XDG_CACHE_HOME", "relative")]),
        None
    );
}
