//! What a sandbox and a container are, apart from any protocol: pure types and policies, no I/O.
//!
//! `sandbox` and `container` are what the CRI asked for, parsed; `lifecycle` is the state machine; `spec` turns a
//! container, its pod and its image into a [`crate::plan::ContainerPlan`], which `oci` shows as an OCI configuration.

pub mod container;
pub mod lifecycle;
pub mod oci;
pub mod rlimit;
pub mod sandbox;
pub mod selinux;
pub mod signal;
pub mod spec;
pub mod sysctl;
