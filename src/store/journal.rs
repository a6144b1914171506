//! The journal: what an operation has done so far and how to undo it, on disk before each step with a side effect.
//!
//! One file per running operation. It is written before a step with the undo of that step, and removed when the operation
//! has published its result or has undone everything. After a crash the files that are left are the operations that were
//! cut; `service::recovery` undoes them in reverse. Undoing a step that never ran must be harmless.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::StoreError;
use super::record::{ProcessId, StateDir, get, put};
use crate::ids::{ContainerId, SandboxId};

/// How one step is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// Remove a directory of ours with all it holds.
    RemoveDir(PathBuf),
    /// Kill a sandbox's monitor, and the process of its own that it may have.
    KillMonitor(ProcessId),
    /// Unpin a network namespace.
    Unpin(PathBuf),
    /// CNI DEL for a sandbox, from the cached attachment or what is written here.
    NetworkDel {
        /// The sandbox.
        sandbox: SandboxId,
        /// Its network namespace.
        netns: PathBuf,
    },
    /// Tell the sandbox's monitor to remove a container; with a monitor that is gone, kill and remove the control group.
    RemoveContainer {
        /// The sandbox.
        sandbox: SandboxId,
        /// The container.
        container: ContainerId,
        /// Its control group.
        cgroup: String,
    },
    /// Remove a control group, if nothing is in it.
    RemoveCgroup(String),
}

/// One operation under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// The RPC.
    pub op: String,
    /// The name that it reserves.
    pub key: String,
    /// The id of what it makes.
    pub id: String,
    /// The step it is in, for people.
    pub stage: String,
    /// Nanoseconds since the epoch.
    pub started_at: u64,
    /// How to undo what it did, in the order in which it was done.
    pub undo: Vec<Undo>,
}

/// A running operation's file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    entry: Entry,
}

impl Journal {
    /// Begins an operation: its intent is on disk when this returns.
    pub fn begin(state: &StateDir, op: &str, key: &str, id: &str, now: u64) -> Result<Self, StoreError> {
        let path = state.journal().join(format!("{id}.json"));
        let entry = Entry { op: op.into(), key: key.into(), id: id.into(), stage: "begin".into(), started_at: now, undo: Vec::new() };
        let journal = Self { path, entry };
        journal.write()?;
        Ok(journal)
    }

    /// Enters a stage whose step `undo` undoes. To be called before the step.
    pub fn enter(&mut self, stage: &str, undo: Undo) -> Result<(), StoreError> {
        self.entry.stage = stage.into();
        self.entry.undo.push(undo);
        self.write()
    }

    /// The operation as it stands.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Takes the next step to undo, last first. The file still names it until [`Journal::undone`].
    pub fn last(&self) -> Option<Undo> {
        self.entry.undo.last().cloned()
    }

    /// The last step is undone.
    pub fn undone(&mut self) -> Result<(), StoreError> {
        self.entry.undo.pop();
        self.write()
    }

    /// The operation is over: published, or undone.
    pub fn end(self) -> Result<(), StoreError> {
        super::remove_all(&self.path)
    }

    fn write(&self) -> Result<(), StoreError> {
        put(&self.path, &self.entry)
    }
}

/// The operations that were cut. A file that can't be read is reported and left.
pub fn load(state: &StateDir) -> Result<(Vec<Journal>, Vec<StoreError>), StoreError> {
    let dir = state.journal();
    let failed = |source| StoreError::Read { path: dir.clone(), source };
    let (mut entries, mut errors) = (Vec::new(), Vec::new());
    for file in fs::read_dir(&dir).map_err(failed)? {
        let path = file.map_err(failed)?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        match get(&path) {
            Ok(entry) => entries.push(Journal { path, entry }),
            Err(error) => errors.push(error),
        }
    }
    Ok((entries, errors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_cut_operation_is_found_with_its_undo() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let mut journal = Journal::begin(&state, "RunPodSandbox", "ns/p/u/0", "abc", 1).unwrap();
        journal.enter("dir", Undo::RemoveDir("/x".into())).unwrap();
        journal.enter("pin", Undo::Unpin("/y".into())).unwrap();
        let (mut cut, errors) = load(&state).unwrap();
        assert!(errors.is_empty());
        let mut cut = cut.pop().unwrap();
        assert_eq!(cut.entry().stage, "pin");
        assert_eq!(cut.last(), Some(Undo::Unpin("/y".into())));
        cut.undone().unwrap();
        assert_eq!(cut.last(), Some(Undo::RemoveDir(Path::new("/x").into())));
        cut.end().unwrap();
        assert!(load(&state).unwrap().0.is_empty());
    }
}
