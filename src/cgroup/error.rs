//! What can go wrong with a control group.

use std::io;
use std::path::PathBuf;

use crate::errchain::{Kind, Kinded};

/// An operation on a control group that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Neither version is mounted.
    #[error("no cgroup hierarchy is mounted at /sys/fs/cgroup or elsewhere")]
    NoHierarchy,
    /// What is mounted where can't be learnt.
    #[error("cannot find the cgroup hierarchies in {path}")]
    Detect {
        /// The file or directory that was read.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A path can't name a control group.
    #[error("{path:?} does not name a cgroup: {why}")]
    BadPath {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A control group of this name exists, with processes in it.
    #[error("cgroup {path} exists and has processes in it")]
    InUse {
        /// Its directory.
        path: PathBuf,
    },
    /// A directory can't be made.
    #[error("cannot make cgroup {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An existing v1 cpuset is empty, so that nothing below it can run.
    #[error("{file} is empty: no process can run in a cgroup below it")]
    EmptyCpuset {
        /// The parent's file.
        file: PathBuf,
    },
    /// A directory can't be opened.
    #[error("cannot open cgroup {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file can't be read.
    #[error("cannot read {file}")]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file holds what this kernel interface never should.
    #[error("cannot make sense of {value:?} in {file}")]
    Parse {
        /// The file.
        file: PathBuf,
        /// The part that was not understood.
        value: String,
    },
    /// A value can't be written.
    #[error("cannot write {value:?} to {file}")]
    Write {
        /// The file.
        file: PathBuf,
        /// The value.
        value: String,
        /// The cause.
        source: io::Error,
    },
    /// This node lacks the controller or the file that a limit needs.
    #[error("cannot write {value:?} to {file}: this node has no such file")]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The value.
        value: String,
    },
    /// This node lacks a controller.
    #[error("this node has no cgroup controller {controller}")]
    NoController {
        /// The controller.
        controller: &'static str,
    },
    /// A limit makes no sense on its own terms.
    #[error("{what} cannot be {value}: {why}")]
    BadValue {
        /// The limit.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A `unified` key that is no plain file of a controller.
    #[error("{key:?} is not a cgroup v2 setting")]
    BadKey {
        /// The key.
        key: String,
    },
    /// A `unified` key on a node with cgroup v1.
    #[error("{key} is a cgroup v2 setting, and this node has cgroup v1")]
    UnifiedOnV1 {
        /// The key.
        key: String,
    },
    /// A new limit lies below what is in use and can't be given back.
    #[error("cannot lower {file} to {limit}: {used} bytes are in use")]
    Shrink {
        /// The file.
        file: PathBuf,
        /// The limit, in bytes.
        limit: u64,
        /// What is in use without page cache, in bytes.
        used: u64,
    },
    /// A device rule that means nothing, or that this cgroup version can't express.
    #[error("cannot apply device rule {rule}: {why}")]
    DeviceRule {
        /// The rule, as text.
        rule: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device filter could not be installed.
    #[error("cannot {step} the device filter of cgroup {path}")]
    DeviceFilter {
        /// `load`, `find`, `attach` or `detach`.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A process can't be moved.
    #[error("cannot move process {pid} into cgroup {path}")]
    Enter {
        /// The process; 0: the caller.
        pid: u32,
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel was asked to freeze, and has not in time.
    #[error("cgroup {path} is not frozen after {ms} ms")]
    NotFrozen {
        /// The directory.
        path: PathBuf,
        /// The deadline.
        ms: u128,
    },
    /// Processes are left after they were killed.
    #[error("processes {pids:?} of cgroup {path} are alive {ms} ms after SIGKILL")]
    StillAlive {
        /// The group.
        path: String,
        /// Some of them; the first sixteen at most.
        pids: Vec<u32>,
        /// The deadline.
        ms: u128,
    },
    /// A process can't be signalled.
    #[error("cannot kill process {pid} of cgroup {path}")]
    Kill {
        /// The process.
        pid: u32,
        /// The group.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// A directory can't be removed.
    #[error("cannot remove cgroup {path}")]
    Remove {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Kinded for CgroupError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoHierarchy | Self::EmptyCpuset { .. } => Kind::FailedPrecondition,
            Self::BadPath { .. } | Self::BadValue { .. } | Self::BadKey { .. } | Self::UnifiedOnV1 { .. } | Self::DeviceRule { .. } => {
                Kind::InvalidArgument
            }
            Self::InUse { .. } => Kind::AlreadyExists,
            Self::Unsupported { .. } | Self::NoController { .. } => Kind::Unimplemented,
            Self::Shrink { .. } => Kind::ResourceExhausted,
            Self::Parse { .. } => Kind::Internal,
            Self::NotFrozen { .. } | Self::StillAlive { .. } => Kind::DeadlineExceeded,
            Self::Write { file, source, .. } => {
                write_kind(file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"cpuset.")), source)
            }
            // A group with groups below it takes no process (v2's EBUSY, and EOPNOTSUPP where it is invalid); a v1 cpuset
            // without CPUs takes none either (ENOSPC).
            Self::Enter { source, .. } => match source.raw_os_error() {
                Some(libc::EBUSY | libc::EOPNOTSUPP | libc::ENOSPC) => Kind::FailedPrecondition,
                _ => io_kind(source),
            },
            Self::Detect { source, .. }
            | Self::Create { source, .. }
            | Self::Open { source, .. }
            | Self::Read { source, .. }
            | Self::DeviceFilter { source, .. }
            | Self::Kill { source, .. }
            | Self::Remove { source, .. } => io_kind(source),
        }
    }
}

fn write_kind(cpuset: bool, source: &io::Error) -> Kind {
    match source.raw_os_error() {
        Some(libc::EINVAL | libc::ERANGE | libc::E2BIG) => Kind::InvalidArgument,
        // v1 answers EACCES to CPUs or nodes that the parent lacks.
        Some(libc::EACCES) if cpuset => Kind::InvalidArgument,
        // v1 answers EBUSY to a memory limit that reclaim can't reach.
        Some(libc::EBUSY) => Kind::ResourceExhausted,
        _ => io_kind(source),
    }
}

fn io_kind(source: &io::Error) -> Kind {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ESRCH) => Kind::NotFound,
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => Kind::PermissionDenied,
        // EAGAIN: cgroup.max.descendants or cgroup.max.depth of an ancestor is reached.
        Some(libc::ENOSPC | libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Kind::ResourceExhausted,
        Some(libc::EBUSY) => Kind::FailedPrecondition,
        _ => Kind::Internal,
    }
}
