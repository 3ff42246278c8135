//! Which snapshot a snapshot is, and of which it is a diff.

use crate::Pages;
use serde::{Deserialize, Serialize};

/// What a state says of this. Snapshots of before there was any have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The snapshot's own name, unlike all others: hexadecimal.
    #[serde(default)]
    pub id: String,
    /// The snapshot is a diff: its memory file has only some of the pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<Diff>,
}

/// A diff.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The `id` of the snapshot to which it is the difference.
    pub parent: String,
    /// The pages that it has, as [`Pages::to_text`] says. Those that are holes in the memory file are zero; all others, whatever
    /// the file has there, are as they are in the parent.
    pub pages: String,
}

impl Lineage {
    /// One that is complete.
    pub fn full(id: String) -> Self {
        Self { id, diff: None }
    }

    /// `pages` are those that may differ from the snapshot called `parent`.
    pub fn diff(id: String, parent: String, pages: &Pages) -> Self {
        let pages = pages.to_text();
        Self {
            id,
            diff: Some(Diff { parent, pages }),
        }
    }

    /// The name, if there is one.
    pub fn id(&self) -> Option<&str> {
        Some(self.id.as_str()).filter(|id| !id.is_empty())
    }

    /// The names are such as Husk gives, and the list of pages is one, for memory of so many bytes.
    pub fn is_sound(&self, memory_size: u64) -> bool {
        let is_name = |id: &str| id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_name(&self.id)
            && self.diff.as_ref().is_none_or(|diff| {
                is_name(&diff.parent)
                    && !diff.parent.is_empty()
                    && diff.pages(memory_size).is_some()
            })
    }
}

impl Diff {
    /// The pages, if the list is one, and all of them lie within memory of so many bytes.
    pub fn pages(&self, memory_size: u64) -> Option<Pages> {
        Pages::of_text(&self.pages).filter(|pages| pages.end() <= memory_size / crate::PAGE)
    }
}
