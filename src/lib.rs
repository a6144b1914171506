//! Copepod: a Kubernetes container runtime.

#[cfg(feature = "daemon")]
#[allow(missing_docs, clippy::all)]
pub mod api {
    //! The CRI's messages and services, generated from `proto/`.
    tonic::include_proto!("runtime.v1");
}

#[cfg(test)]
#[path = "../tests/common/root.rs"]
pub mod testing;

pub mod cgroup;
pub mod errchain;
pub mod ids;
#[cfg(feature = "daemon")]
pub mod image;
pub mod monitor;
pub mod monitor_api;
#[cfg(feature = "daemon")]
pub mod net;
pub mod oci;
pub mod plan;
#[cfg(feature = "spec")]
pub mod seccomp;
pub mod sys;
pub mod wire;
