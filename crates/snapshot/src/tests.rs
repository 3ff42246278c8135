use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Old {
    vcpus: Vec<u64>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct New {
    vcpus: Vec<u64>,
    #[serde(default)]
    more: u32,
}

fn sample(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("state");
    let state = New {
        vcpus: vec![1, 2, 3],
        more: 4,
    };
    write_state(&path, &state).unwrap();
    path
}

#[test]
fn what_was_written_is_read_by_who_knows_less_or_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(&dir);
    let vcpus = vec![1, 2, 3];
    assert_eq!(read_state::<Old>(&path).unwrap().1, Old { vcpus });
    let vcpus = vec![9];
    write_state(&path, &Old { vcpus }).unwrap();
    let vcpus = vec![9];
    assert_eq!(read_state::<New>(&path).unwrap().1, New { vcpus, more: 0 });
    // Nothing was left beside it, and nobody else may read it.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn every_torn_or_changed_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(&dir);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(read_state::<New>(&path).is_err(), "{length}");
    }
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        fs::write(&path, &changed).unwrap();
        // In the first line the version of Husk is for people, and so is how the letters of the checksum are written.
        if let Ok((_, state)) = read_state::<New>(&path) {
            assert_eq!(state.vcpus, [1, 2, 3], "{at}");
            let line = whole.iter().position(|&byte| byte == b'\n').unwrap();
            assert!(at < line, "{at}");
        }
    }
    let longer = [&whole[..], b"x"].concat();
    fs::write(&path, longer).unwrap();
    assert!(matches!(
        read_state::<New>(&path),
        Err(Error::Length { .. })
    ));
}

#[test]
fn what_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let refused = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        read_state::<New>(&path).unwrap_err()
    };
    for foreign in [&b""[..], b"{}\n", b"\x7fELF", &[b'x'; 10_000], b"[[[[[[\n"] {
        assert!(matches!(refused(foreign), Error::Foreign(_)));
    }
    let newer = br#"{"format":"husk snapshot","version":2,"husk":"9","length":0,"xxh64":"0"}"#;
    let newer = [&newer[..], b"\n"].concat();
    assert!(matches!(refused(&newer), Error::Version { version: 2, .. }));
    let huge = br#"{"format":"husk snapshot","version":1,"husk":"9","length":18446744073709551615,"xxh64":"0"}"#;
    let huge = [&huge[..], b"\n"].concat();
    assert!(matches!(refused(&huge), Error::Length { .. }));
    write_state(&path, &vec![1]).unwrap();
    assert!(matches!(
        read_state::<New>(&path),
        Err(Error::Content { .. })
    ));
    assert!(matches!(
        read_state::<New>(dir.path()),
        Err(Error::Read { .. })
    ));
}

#[test]
fn memory_is_sparse_and_replaces_the_old_file_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    fs::write(&path, "old").unwrap();
    let memory = MemoryFile::create(&path, 64 << 20).unwrap();
    memory.write(5 << 20, &[7; 8192]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    memory.finish().unwrap();
    let file = open_memory(&path, 64 << 20).unwrap();
    use std::os::unix::fs::MetadataExt;
    let written = file.metadata().unwrap().blocks() * 512;
    assert!((8192..=1 << 20).contains(&written), "{written}");
    let mut byte = [0];
    file.read_exact_at(&mut byte, (5 << 20) + 8191).unwrap();
    assert_eq!(byte, [7]);
    assert!(matches!(
        open_memory(&path, 1),
        Err(Error::MemorySize { .. })
    ));
    // One that is given up leaves nothing.
    drop(MemoryFile::create(&path, 1 << 20).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Values take much more memory than their text.
#[test]
fn a_state_of_too_many_values_is_refused_and_a_long_text_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let read = |state: serde_json::Value| {
        write_state(&path, &state).unwrap();
        read_state::<serde_json::Value>(&path).map(|(_, read)| assert_eq!(read, state))
    };
    let many = vec![serde_json::json!([0]); MOST_VALUES / 2 + 1];
    let refused = read(serde_json::json!({ "config": many })).unwrap_err();
    let why = std::error::Error::source(&refused).map(ToString::to_string);
    assert!(why.is_some_and(|why| why.contains("1048576 values")));
    read(vec![0; MOST_VALUES - 1].into()).unwrap();
    // Commas, brackets and quotes of a text are none.
    let text = r#"[,{\"\\"#.repeat(MOST_VALUES / 2);
    read(serde_json::json!({ "pages": text, "more": [1, { "a": 2 }] })).unwrap();
    assert!(has_more_values(br#"["\\",1,"\",,,",{}"#, 3));
    assert!(!has_more_values(br#"["\\",1,"\",,,",{}"#, 5));
    assert!(!has_more_values(br#""\"#, 0));
}
