//! What can fail in networking, and what kind of failure it is.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::conf::BadConf;
use super::result::BadResult;
use crate::errchain::{Chain, Kind, Kinded};

/// A verb of CNI (the specification's section 2), as CNI_COMMAND says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Look whether an attachment is as it was made.
    Check,
    /// Release what belongs to no attachment (CNI 1.1).
    Gc,
    /// Whether an ADD could succeed now (CNI 1.1).
    Status,
}

impl Verb {
    /// The value of CNI_COMMAND.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
        }
    }
}

/// One run of one plugin: `CNI ADD bridge (network "pods")`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What the plugin is to do.
    pub verb: Verb,
    /// The plugin's `type`.
    pub plugin: String,
    /// The network's name.
    pub network: String,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CNI {} {} (network {:?})", self.verb.as_str(), self.plugin, self.network)
    }
}

/// What a plugin says when it fails (the specification's section 5, "Error").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginError {
    /// 1 to 99 are the specification's, from 100 the plugin's own. 11: try again later.
    pub code: u64,
    /// A short message.
    pub msg: String,
    /// A longer one, often empty.
    pub details: String,
    /// What it wrote to stderr, cut.
    pub stderr: String,
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.msg)?;
        if !self.details.is_empty() && self.details != self.msg {
            write!(f, "; {}", self.details)?;
        }
        write!(f, " (code {})", self.code)?;
        f.write_str(&said(&self.stderr))
    }
}

/// Why one run of a plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No file of that name that can be executed.
    #[error("there is no such plugin in {}", join(.dirs))]
    NoPlugin {
        /// Where it was looked for.
        dirs: Vec<PathBuf>,
    },
    /// The program did not start.
    #[error("cannot start {path}")]
    Start {
        /// The plugin's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The plugin's pipes or its end could not be followed.
    #[error("cannot follow the running plugin")]
    Follow {
        /// Why.
        source: io::Error,
    },
    /// It ran for too long; it and its process group were killed.
    #[error("deadline of {} s passed{}", seconds(*.limit), said(.stderr))]
    Deadline {
        /// The limit.
        limit: Duration,
        /// What it wrote to stderr, cut.
        stderr: String,
    },
    /// It printed without end; it and its process group were killed.
    #[error("it printed more than {limit} bytes{}", said(.stderr))]
    TooMuch {
        /// The limit, in bytes.
        limit: usize,
        /// What it wrote to stderr, cut.
        stderr: String,
    },
    /// It ended, but a process that it left behind holds its output open; that one was killed.
    #[error("it left a process behind that holds its output open{}", said(.stderr))]
    LeftBehind {
        /// What it wrote to stderr, cut.
        stderr: String,
    },
    /// It failed and said why.
    #[error("{0}")]
    Refused(PluginError),
    /// It failed and did not say why as the specification asks.
    #[error("it ended with {status} and no error that can be read{}{}", printed(.stdout), said(.stderr))]
    NoReason {
        /// `exit code 1`, `signal 9`.
        status: String,
        /// The start of what it printed.
        stdout: String,
        /// What it wrote to stderr, cut.
        stderr: String,
    },
    /// It succeeded and printed something that is no result.
    #[error("what it printed is no result{}{}", printed(.stdout), said(.stderr))]
    BadResult {
        /// The start of what it printed.
        stdout: String,
        /// What it wrote to stderr, cut.
        stderr: String,
        /// What is wrong with it.
        source: BadResult,
    },
}

fn join(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn seconds(limit: Duration) -> f64 {
    limit.as_millis() as f64 / 1000.0
}

fn said(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; stderr: {text}") }
}

fn printed(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; stdout: {text}") }
}

impl CallError {
    fn kind(&self) -> Kind {
        match self {
            // 11: try again later; 50 and 51 are STATUS's "not available" (the specification's sections 2 and 5).
            CallError::Refused(PluginError { code: 11 | 50 | 51, .. }) | CallError::NoPlugin { .. } => Kind::Unavailable,
            CallError::Deadline { .. } => Kind::DeadlineExceeded,
            _ => Kind::Internal,
        }
    }
}

/// Errors of several steps that were all tried.
#[derive(Debug)]
pub struct Failures(pub Vec<NetError>);

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { "; " }, Chain(error))?;
        }
        Ok(())
    }
}

impl std::error::Error for Failures {}

/// Why pods can get no network now: the reason and message of the CRI's NetworkReady condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NotReady {
    /// Always `NetworkPluginNotReady`, which kubelet's peers say too.
    pub reason: &'static str,
    /// What is missing, by name: the directory, the file, the plugin.
    pub message: String,
}

impl NotReady {
    pub(super) fn new(message: String) -> Self {
        Self { reason: "NetworkPluginNotReady", message }
    }
}

/// What can fail in networking.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no network to attach to.
    #[error("no network is ready")]
    NotReady {
        /// What is missing.
        source: NotReady,
    },
    /// Something about the pod can't be passed to a plugin.
    #[error("{field} {value:?} of the pod {why}")]
    BadPod {
        /// Which field.
        field: &'static str,
        /// Its value, cut.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A field of our own configuration.
    #[error("{field} {value:?} of the network's configuration {why}")]
    BadConfig {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// One plugin failed.
    #[error("{call}")]
    Plugin {
        /// Which one, doing what.
        call: Call,
        /// Why.
        source: Box<CallError>,
    },
    /// The whole chain ran and its result is of no use to a pod.
    #[error("network {network:?} gave pod {pod} no address that can be used")]
    NoAddress {
        /// The pod's id.
        pod: String,
        /// The network's name.
        network: String,
        /// What is wrong with the result.
        source: BadResult,
    },
    /// A pod could not be attached, and what had been done could not all be undone.
    #[error("cannot attach pod {pod}, and undoing it failed too ({undo})")]
    NotUndone {
        /// The pod's id.
        pod: String,
        /// What DEL said.
        undo: Failures,
        /// Why the pod could not be attached.
        #[source]
        source: Box<NetError>,
    },
    /// Steps of a teardown failed; all were tried.
    #[error("cannot detach pod {pod}")]
    Detach {
        /// The pod's id.
        pod: String,
        /// Each failure.
        #[source]
        failures: Failures,
    },
    /// Steps of a collection failed; all were tried.
    #[error("cannot release all stale attachments")]
    Collect {
        /// Each failure.
        #[source]
        failures: Failures,
    },
    /// CHECK of a pod that was never attached.
    #[error("pod {pod} is not attached to a network")]
    NotAttached {
        /// The pod's id.
        pod: String,
    },
    /// A configuration that is kept with an attachment can't be read.
    #[error("the configuration kept with {path} is of no use")]
    KeptConf {
        /// The cache's file.
        path: PathBuf,
        /// What is wrong with it.
        source: BadConf,
    },
    /// The cache of attachments.
    #[error("cannot {what} {path}")]
    Cache {
        /// `read`, `write`, `remove`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for NetError {
    fn kind(&self) -> Kind {
        match self {
            NetError::NotReady { .. } => Kind::Unavailable,
            NetError::BadPod { .. } | NetError::BadConfig { .. } => Kind::InvalidArgument,
            NetError::Plugin { source, .. } => source.kind(),
            NetError::NotUndone { source, .. } => source.kind(),
            NetError::NotAttached { .. } => Kind::NotFound,
            NetError::Detach { failures, .. } | NetError::Collect { failures, .. } => match failures.0.as_slice() {
                [one] => one.kind(),
                _ => Kind::Internal,
            },
            NetError::NoAddress { .. } | NetError::KeptConf { .. } | NetError::Cache { .. } => Kind::Internal,
        }
    }
}
