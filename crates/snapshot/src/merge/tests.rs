use super::*;
use crate::MemoryFile;
use crate::sparse::copy_by_hand;
use serde_json::json;

const SIZE: u64 = 64 * PAGE;

/// Snapshots in one directory, and what memory was like.
struct Chain {
    dir: tempfile::TempDir,
    memory: Vec<u8>,
}

impl Chain {
    /// With a complete one called "a", whose memory is 1 in pages 0 to 15, and 0 in all others.
    fn new() -> Self {
        let mut memory = vec![0; SIZE as usize];
        memory[..16 * PAGE as usize].fill(1);
        let chain = Self {
            dir: tempfile::tempdir().unwrap(),
            memory,
        };
        chain.keep("a", Lineage::full("a".into()), &[(0, 16)]);
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// These pages of memory, where they are not zero, and a state.
    fn keep(&self, name: &str, lineage: Lineage, pages: &[(u64, u64)]) {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        let file = MemoryFile::create(&dir.join(MEMORY), SIZE).unwrap();
        for page in pages
            .iter()
            .flat_map(|&(first, count)| first..first + count)
        {
            let bytes = &self.memory[(page * PAGE) as usize..][..PAGE as usize];
            if bytes.iter().any(|&byte| byte != 0) {
                file.write(page * PAGE, bytes).unwrap();
            }
        }
        file.finish().unwrap();
        let state = json!({ "memory_size": SIZE, "of": name, "lineage": lineage });
        write_state(&dir.join(STATE), &state).unwrap();
    }

    /// Fill pages with `value`, and keep what has changed.
    fn change(&mut self, (name, parent): (&str, &str), value: u8, pages: &[(u64, u64)]) {
        for &(first, count) in pages {
            let (start, end) = (first * PAGE, (first + count) * PAGE);
            self.memory[start as usize..end as usize].fill(value);
        }
        let words = pages
            .iter()
            .flat_map(|&(first, count)| first..first + count);
        let word = words.fold(0, |word, page| word | 1 << page);
        let list = Pages::of_bits([(&[word][..], SIZE / PAGE)]);
        let lineage = Lineage::diff(name.into(), parent.into(), &list);
        self.keep(name, lineage, pages);
    }

    fn merge(&self, base: &str, diff: &str) -> Result<Merged, Error> {
        merge(&self.path(base), &self.path(diff), None)
    }

    fn read(&self, name: &str) -> (Value, Vec<u8>) {
        let dir = self.path(name);
        let memory = fs::read(dir.join(MEMORY)).unwrap();
        (read_state(&dir.join(STATE)).unwrap().1, memory)
    }

    /// The snapshot in directory `name` is complete, called `id`, and has what memory is now.
    #[track_caller]
    fn assert_has(&self, name: &str, id: &str) {
        let (state, memory) = self.read(name);
        assert!(memory == self.memory, "memory is another");
        assert_eq!(state["of"], id);
        assert_eq!(state["lineage"], json!({ "id": id }));
    }

    #[track_caller]
    fn assert_names(&self, wanted: &[&str]) {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, wanted);
    }
}

#[test]
fn ten_diffs_are_laid_over_their_base_one_by_one() {
    let mut chain = Chain::new();
    let names: Vec<String> = (0..11).map(|n| format!("{:x}", n + 10)).collect();
    for (n, pair) in names.windows(2).enumerate() {
        let n = n as u64;
        // Some that were there, some that were not, and some that become zero.
        let value = if n % 3 == 2 { 0 } else { n as u8 + 2 };
        chain.change((&pair[1], &pair[0]), value, &[(n, 2), (20 + n * 4, 3)]);
        let merged = chain.merge("a", &pair[1]).unwrap();
        assert_eq!((merged.pages, merged.is_diff), (5, false));
        chain.assert_has("a", &pair[1]);
    }
}

#[test]
fn diffs_are_laid_over_each_other() {
    let mut chain = Chain::new();
    chain.change(("b", "a"), 2, &[(0, 4), (20, 1)]);
    chain.change(("c", "b"), 0, &[(3, 3)]);
    assert!(chain.merge("b", "c").unwrap().is_diff);
    let (state, _) = chain.read("b");
    assert_eq!(
        state["lineage"],
        json!({ "id": "c", "diff": { "parent": "a", "pages": "0+5,e" } })
    );
    chain.merge("a", "b").unwrap();
    chain.assert_has("a", "c");
}

#[test]
fn the_list_counts_and_not_the_extents() {
    let mut chain = Chain::new();
    chain.change(("b", "a"), 3, &[(2, 1)]);
    // What is not in the list: data in a hole, as file systems may have it. What is: a hole, and zeros as data.
    let file = File::options()
        .write(true)
        .open(chain.path("b").join(MEMORY));
    let file = file.unwrap();
    file.write_all_at(&[9; 2 * PAGE as usize], 7 * PAGE)
        .unwrap();
    chain.merge("a", "b").unwrap();
    chain.assert_has("a", "b");
    chain.change(("c", "b"), 0, &[(0, 5)]);
    let file = File::options()
        .write(true)
        .open(chain.path("c").join(MEMORY));
    file.unwrap()
        .write_all_at(&[0; PAGE as usize], PAGE)
        .unwrap();
    chain.merge("a", "c").unwrap();
    chain.assert_has("a", "c");
}

#[test]
fn the_result_may_be_a_new_directory() {
    use std::os::unix::fs::PermissionsExt;
    let mut chain = Chain::new();
    let before = chain.read("a");
    chain.change(("b", "a"), 2, &[(1, 1)]);
    let (a, b, out) = (chain.path("a"), chain.path("b"), chain.path("out"));
    merge(&a, &b, Some(&out)).unwrap();
    chain.assert_has("out", "b");
    assert_eq!(chain.read("a"), before);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&out), mode(&out.join(MEMORY))), (0o700, 0o600));
    let error = merge(&a, &b, Some(&out)).unwrap_err();
    assert!(matches!(error, Error::Write { path, .. } if path == out));
    chain.assert_names(&["a", "b", "out"]);
}

#[test]
fn what_does_not_belong_together_is_refused_and_changes_nothing() {
    let mut chain = Chain::new();
    chain.change(("b", "a"), 2, &[(1, 1)]);
    chain.change(("c", "b"), 3, &[(2, 1)]);
    chain.keep("old", Lineage::default(), &[(0, 64)]);
    let nameless = Lineage {
        id: "d".into(),
        diff: Some(crate::Diff {
            parent: String::new(),
            pages: "0".into(),
        }),
    };
    chain.keep("d", nameless, &[]);
    for (number, pages) in ["0+3f", "3f+1", "x", "0,ffffffffffffffff", "40", "0+40"]
        .iter()
        .enumerate()
    {
        let diff = crate::Diff {
            parent: "a".into(),
            pages: (*pages).into(),
        };
        let lineage = Lineage {
            id: "e".into(),
            diff: Some(diff),
        };
        chain.keep(&format!("bad{number}"), lineage, &[(1, 1)]);
    }
    let small = chain.path("small");
    fs::create_dir(&small).unwrap();
    let list = Pages::of_bits([(&[1][..], 1)]);
    let lineage = Lineage::diff("f".into(), "a".into(), &list);
    let state = json!({ "memory_size": PAGE, "lineage": lineage });
    write_state(&small.join(STATE), &state).unwrap();
    MemoryFile::create(&small.join(MEMORY), PAGE)
        .unwrap()
        .finish()
        .unwrap();
    let before = chain.read("a");
    let all = fs::read_dir(chain.dir.path()).unwrap().count();
    for (base, diff, word) in [
        ("a", "c", "another snapshot"),
        ("a", "a", "no diff"),
        ("a", "old", "no diff"),
        ("old", "b", "another snapshot"),
        ("old", "d", "names or pages"),
        ("a", "small", "another snapshot"),
        ("a", "bad1", "names or pages"),
        ("a", "bad2", "names or pages"),
        ("a", "bad3", "names or pages"),
        ("a", "bad4", "names or pages"),
        ("a", "bad5", "names or pages"),
        ("a", "none", "cannot read"),
        ("none", "b", "cannot read"),
    ] {
        let said = chain.merge(base, diff).unwrap_err().to_string();
        assert!(said.contains(word), "{base} {diff}: {said}");
    }
    assert_eq!(chain.read("a"), before);
    assert_eq!(fs::read_dir(chain.dir.path()).unwrap().count(), all);
    // The first of them is all of memory, no more.
    chain.merge("a", "bad0").unwrap();
}

#[test]
fn other_files_in_the_base_are_not_lost() {
    let mut chain = Chain::new();
    chain.change(("b", "a"), 2, &[(1, 1)]);
    let notes = chain.path("a").join("notes");
    fs::write(&notes, "mine").unwrap();
    let error = chain.merge("a", "b").unwrap_err();
    let Error::Write { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.to_string(), "notes is in it, too; use -o");
    fs::remove_file(notes).unwrap();
    // What a snapshot left that was ended goes with it.
    fs::write(chain.path("a").join(".memory.123"), "").unwrap();
    chain.merge("a", "b").unwrap();
    chain.assert_has("a", "b");
    assert_eq!(fs::read_dir(chain.path("a")).unwrap().count(), 2);
}

#[test]
fn what_a_merge_left_that_was_ended_goes_and_one_at_work_is_not_disturbed() {
    let mut chain = Chain::new();
    chain.change(("b", "a"), 2, &[(1, 1)]);
    let before = chain.read("a");
    let left = chain.path(".a.merge");
    fs::create_dir(&left).unwrap();
    fs::write(left.join(MEMORY), "half").unwrap();
    let locked = lock(&left).unwrap();
    let said = crate_chain(&chain.merge("a", "b").unwrap_err());
    assert!(said.contains("another merge"), "{said}");
    drop(locked);
    let locked = lock(&chain.path("a")).unwrap();
    let said = crate_chain(&chain.merge("a", "b").unwrap_err());
    assert!(said.contains("another merge"), "{said}");
    drop(locked);
    assert_eq!(chain.read("a"), before);
    chain.merge("a", "b").unwrap();
    chain.assert_has("a", "b");
    chain.assert_names(&["a", "b"]);
}

fn crate_chain(error: &Error) -> String {
    use std::error::Error;
    let source = error.source().map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

#[test]
fn parts_are_copied_and_cleared_without_the_kernels_help() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("1"), dir.path().join("2"));
    let bytes: Vec<u8> = (0..3 * PIECE).map(|n| (n / 1000) as u8).collect();
    fs::write(&one, &bytes).unwrap();
    fs::write(&two, vec![7; bytes.len()]).unwrap();
    let from = File::open(&one).unwrap();
    let to = File::options().read(true).write(true).open(&two).unwrap();
    let (start, end) = (PAGE, 2 * PIECE as u64 + PAGE);
    copy_by_hand(&from, &to, start, end).unwrap();
    let (start, end) = (start as usize, end as usize);
    let mut wanted = vec![7; bytes.len()];
    wanted[start..end].copy_from_slice(&bytes[start..end]);
    assert!(fs::read(&two).unwrap() == wanted);
    clear(&to, PAGE, 2 * PAGE).unwrap();
    wanted[PAGE as usize..3 * PAGE as usize].fill(0);
    assert!(fs::read(&two).unwrap() == wanted);
    // A file that has become shorter is an error, and no end.
    let behind = bytes.len() as u64;
    assert!(copy(&from, &to, behind - PAGE, 2 * PAGE).is_err());
    assert!(copy_by_hand(&from, &to, behind - PAGE, behind + PAGE).is_err());
}
