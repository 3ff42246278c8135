//! Which pages of a memory file a guest needs first.
//!
//! Behind the first line of a state file: a line `working set of N bytes`, and one for each run of pages of 4096 bytes, in ascending order: the
//! number of the first, and how many.

use crate::{Error, PAGE, read_parts, write_body};
use std::fmt::Write;
use std::path::Path;

/// Pages of a memory file.
#[derive(Debug, PartialEq)]
pub struct WorkingSet {
    memory_size: u64,
    runs: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// Of a memory file of `memory_size` bytes. `runs`: the number of a first page of 4096 bytes, and how many; in ascending order.
    pub fn new(memory_size: u64, runs: Vec<(u64, u64)>) -> Self {
        Self { memory_size, runs }
    }

    /// As [`WorkingSet::new`] was given them. Those of a file lie within its memory.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Write it.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut text = first_line(self.memory_size);
        for (first, count) in &self.runs {
            // Into a String.
            let _ = writeln!(text, "{first} {count}");
        }
        write_body(path, text.as_bytes(), None)?.finish()
    }

    /// Read that of a memory file of `memory_size` bytes.
    pub fn read(path: &Path, memory_size: u64) -> Result<Self, Error> {
        let (_, body) = read_parts(path)?;
        let runs = runs(&body, memory_size);
        let runs = runs.map_err(|what| Error::WorkingSet(path.into(), what))?;
        Ok(Self { memory_size, runs })
    }
}

fn first_line(memory_size: u64) -> String {
    format!("working set of {memory_size} bytes\n")
}

fn runs(body: &[u8], memory_size: u64) -> Result<Vec<(u64, u64)>, &'static str> {
    let lines = body.strip_prefix(first_line(memory_size).as_bytes());
    let lines = lines.and_then(|lines| std::str::from_utf8(lines).ok());
    let mut runs = Vec::new();
    let mut free = 0;
    for line in lines
        .ok_or("it is something else, or of another size")?
        .lines()
    {
        let numbers = line.split_once(' ');
        let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (first, count): (u64, u64) = numbers.ok_or("a line is no two numbers")?;
        let end = first.checked_add(count);
        let end = end.filter(|&end| end <= memory_size / PAGE);
        let end = end.ok_or("it has pages outside memory")?;
        if first < free || end == first {
            return Err("its pages are not in order");
        }
        free = end;
        runs.push((first, count));
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("working-set");
        let size = 16 * PAGE;
        let read = |memory: u64, runs: &[(u64, u64)]| {
            WorkingSet::new(memory, runs.to_vec()).write(&path).unwrap();
            WorkingSet::read(&path, size).map(|set| set.runs().to_vec())
        };
        for good in [&[][..], &[(0, 16)], &[(0, 1), (1, 2), (15, 1)]] {
            assert_eq!(read(size, good).unwrap(), good);
        }
        for (bad, word) in [
            (&[(0, 17)][..], "outside"),
            (&[(16, 1)], "outside"),
            (&[(1, u64::MAX)], "outside"),
            (&[(u64::MAX, 1)], "outside"),
            (&[(3, 0)], "order"),
            (&[(3, 2), (4, 1)], "order"),
            (&[(3, 2), (1, 1)], "order"),
        ] {
            let said = read(size, bad).unwrap_err().to_string();
            assert!(said.contains(word), "{bad:?}: {said}");
        }
        let said = read(size + PAGE, &[]).unwrap_err().to_string();
        assert!(said.contains("another size"), "{said}");
        // What is whole, and something else.
        let refused = |body: &str| {
            write_body(&path, body.as_bytes(), None)
                .unwrap()
                .finish()
                .unwrap();
            WorkingSet::read(&path, size).unwrap_err().to_string()
        };
        for body in ["{}", "1 2\n", ""] {
            assert!(refused(body).contains("something else"), "{body}");
        }
        for line in [
            "1",
            "1 x",
            "1 2 3",
            "-1 2",
            "1  2",
            "99999999999999999999 1",
        ] {
            let said = refused(&(first_line(size) + line));
            assert!(said.contains("two numbers"), "{line}: {said}");
        }
    }
}
