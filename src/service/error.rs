//! Why an operation of the service failed.

use std::io;
use std::path::PathBuf;

use super::apparmor::AppArmorError;
use super::monitors::MonitorError;
use super::seccomp::ProfileError;
use super::selinux::SeLinuxError;
use super::systemd::SystemdError;
use crate::cgroup::CgroupError;
use crate::errchain::{Kind, Kinded, Remote};
use crate::image::ImageError;
use crate::model::lifecycle::Refused;
use crate::model::sandbox::SandboxSpecError;
use crate::model::spec::SpecError;
use crate::net::cni::NetError;
use crate::net::dial::DialError;
use crate::net::netns::NetnsError;
use crate::store::StoreError;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No such sandbox.
    #[error("sandbox {id:?} not found")]
    NoSandbox {
        /// What was asked for.
        id: String,
    },
    /// No such container.
    #[error("container {id:?} not found")]
    NoContainer {
        /// What was asked for.
        id: String,
    },
    /// No such image.
    #[error("image {image:?} not found")]
    NoImage {
        /// What was asked for.
        image: String,
    },
    /// Somebody has the name.
    #[error("name {key} is reserved for {holder}")]
    NameTaken {
        /// The name.
        key: String,
        /// Who has it.
        holder: String,
    },
    /// The sandbox is stopped, or its monitor died.
    #[error("sandbox {id} is not ready")]
    NotReady {
        /// The sandbox.
        id: String,
    },
    /// No pod network can be made now.
    #[error("NetworkPluginNotReady: {message}")]
    NetworkNotReady {
        /// Why.
        message: String,
    },
    /// A handler that isn't configured.
    #[error("runtime handler {handler:?} is not configured")]
    NoHandler {
        /// The handler.
        handler: String,
    },
    /// The phase does not allow it.
    #[error("container {id}")]
    Refused {
        /// The container.
        id: String,
        /// Why.
        source: Refused,
    },
    /// The sandbox can't be as asked for.
    #[error("sandbox config is invalid")]
    SandboxSpec(#[source] SandboxSpecError),
    /// The container can't be as asked for.
    #[error("container config is invalid")]
    Spec(#[source] SpecError),
    /// A field's value can't be honoured.
    #[error("field {field}: {value:?} {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// The value.
        value: String,
        /// Why.
        reason: &'static str,
        /// What sort of failure.
        kind: Kind,
    },
    /// The state directory failed.
    #[error("cannot keep state")]
    Store(#[source] StoreError),
    /// The monitor failed.
    #[error("{what}")]
    Monitor {
        /// What for.
        what: &'static str,
        /// The cause.
        source: MonitorError,
    },
    /// An image failed.
    #[error("{what}")]
    Image {
        /// What for.
        what: &'static str,
        /// The cause.
        source: ImageError,
    },
    /// An image among the mounts can't be had. kubelet knows the first word (k8s.io/cri-api/pkg/errors).
    #[error("ImageVolumeMountFailed: cannot mount an image at {target}")]
    ImageVolume {
        /// Where, in the container.
        target: PathBuf,
        /// The cause.
        source: Box<ServiceError>,
    },
    /// Containers have an image among their mounts.
    #[error("image {image} is mounted in container {container}")]
    ImageInUse {
        /// The image.
        image: String,
        /// One of the containers.
        container: String,
    },
    /// The network failed.
    #[error("{what}")]
    Net {
        /// What for.
        what: &'static str,
        /// The cause.
        source: NetError,
    },
    /// A network namespace can't be pinned or unpinned.
    #[error("{what}")]
    Netns {
        /// What for.
        what: &'static str,
        /// The cause.
        source: NetnsError,
    },
    /// A control group failed.
    #[error("{what}")]
    Cgroup {
        /// What for.
        what: &'static str,
        /// The cause.
        source: CgroupError,
    },
    /// Figures that don't come.
    #[error("the figures of control group {path} can't be read in time")]
    SlowFigures {
        /// The group.
        path: String,
    },
    /// systemd failed.
    #[error("{what}")]
    Systemd {
        /// What for.
        what: &'static str,
        /// The cause.
        source: SystemdError,
    },
    /// A file on the host can't be used.
    #[error("cannot {what} {path}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The seccomp filter can't be made.
    #[error("cannot use the seccomp profile")]
    Seccomp(#[source] ProfileError),
    /// The AppArmor profile can't be used.
    #[error("cannot use the AppArmor profile")]
    AppArmor(#[source] AppArmorError),
    /// The SELinux options can't be honoured.
    #[error("cannot use the SELinux options")]
    SeLinux(#[source] SeLinuxError),
    /// There is no randomness.
    #[error("cannot make an id")]
    Random {
        /// The cause.
        source: getrandom::Error,
    },
    /// A command was still running at its deadline, and was killed.
    #[error("command {command:?} timed out after {seconds} s")]
    ExecTimeout {
        /// The command.
        command: String,
        /// The deadline.
        seconds: u64,
    },
    /// A container has as many sessions as it may.
    #[error("container {id} has {limit} {what} sessions, as many as the configuration allows")]
    TooMany {
        /// `exec` or `attach`.
        what: &'static str,
        /// The container.
        id: String,
        /// The limit.
        limit: usize,
    },
    /// A client was detached from a container.
    #[error("the client is not attached any more")]
    Detached(#[source] Remote),
    /// A port of a pod can't be reached.
    #[error("cannot forward to sandbox {sandbox}")]
    Dial {
        /// The sandbox.
        sandbox: String,
        /// The cause.
        source: DialError,
    },
    /// The operation failed, and what it had done could not be undone completely. What is left is retried at start.
    #[error("{} steps could not be undone ({})", undo.len(), undo.join("; "))]
    NotUndone {
        /// What could not be undone.
        undo: Vec<String>,
        /// Why the operation failed.
        source: Box<ServiceError>,
    },
    /// Several parts of a teardown failed.
    #[error("{what}: {}", errors.join("; "))]
    Teardown {
        /// What for.
        what: &'static str,
        /// Every error's chain.
        errors: Vec<String>,
    },
    /// Something of the operation's own task failed: a panic.
    #[error("the operation's task ended without an answer")]
    Task,
}

impl ServiceError {
    /// For `map_err`: a monitor's error with what it was for.
    pub fn monitor(what: &'static str) -> impl FnOnce(MonitorError) -> Self {
        move |source| Self::Monitor { what, source }
    }

    /// As one error that can be kept or sent.
    pub fn remote(&self) -> Remote {
        Remote::new(self)
    }
}

impl Kinded for ServiceError {
    fn kind(&self) -> Kind {
        match self {
            ServiceError::NoSandbox { .. } | ServiceError::NoContainer { .. } | ServiceError::NoImage { .. } => Kind::NotFound,
            ServiceError::NameTaken { .. } => Kind::AlreadyExists,
            ServiceError::NotReady { .. } | ServiceError::ImageInUse { .. } => Kind::FailedPrecondition,
            ServiceError::ImageVolume { source, .. } => source.kind(),
            ServiceError::NetworkNotReady { .. } => Kind::Unavailable,
            ServiceError::NoHandler { .. } | ServiceError::SandboxSpec(_) => Kind::InvalidArgument,
            ServiceError::Refused { source, .. } => source.kind(),
            ServiceError::Spec(source) => source.kind(),
            ServiceError::Field { kind, .. } => *kind,
            ServiceError::Store(source) => source.kind(),
            ServiceError::Monitor { source, .. } => source.kind(),
            ServiceError::Image { source, .. } => source.kind(),
            ServiceError::Net { source, .. } => source.kind(),
            ServiceError::Cgroup { source, .. } => source.kind(),
            ServiceError::Systemd { source, .. } => source.kind(),
            ServiceError::Seccomp(source) => source.kind(),
            ServiceError::TooMany { .. } => Kind::ResourceExhausted,
            ServiceError::Detached(source) => source.kind(),
            ServiceError::Dial { source, .. } => source.kind(),
            ServiceError::ExecTimeout { .. } | ServiceError::SlowFigures { .. } => Kind::DeadlineExceeded,
            ServiceError::AppArmor(source) => source.kind(),
            ServiceError::SeLinux(source) => source.kind(),
            ServiceError::NotUndone { source, .. } => source.kind(),
            ServiceError::Host { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
                _ => Kind::Internal,
            },
            ServiceError::Netns { .. } | ServiceError::Random { .. } | ServiceError::Teardown { .. } | ServiceError::Task => Kind::Internal,
        }
    }
}
