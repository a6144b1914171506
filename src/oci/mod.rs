//! The embedded runtime: functions over a [`crate::plan::ContainerPlan`], called inside a *creator*.
//!
//! A creator is a short-lived fork of the single-threaded monitor, in the host's mount, PID and network namespaces. It may
//! block on anybody's disk or mount, and it is thrown away afterwards: these functions change its namespaces and working
//! directory. What they make (a container's init, an exec's helper, a pause process) is a child of the monitor
//! (CLONE_PARENT), and what they hand back are descriptors.
//!
//! It reads no JSON and no spec, keeps no state on disk, reaps nothing and knows nothing of logs. The monitor calls it; so does
//! the OCI command line.

pub mod create;
pub mod delete;
pub mod error;
pub mod exec;
pub mod handshake;
pub mod own_program;
pub mod probe;
pub mod sandbox;

mod cgroup_view;
mod devices;
mod helper;
mod hide;
mod host;
mod image_volume;
mod init;
mod label;
mod mounts;
mod paths;
mod process;
mod relabel;
mod root;
mod terminal;
mod user;
mod userns;
mod volume;

pub use crate::cgroup::Hierarchy;
pub use error::OciError;
