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

#[cfg(feature = "daemon")]
pub mod admin;
pub mod cgroup;
#[cfg(feature = "daemon")]
pub mod client;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod cri;
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod errchain;
pub mod ids;
#[cfg(feature = "daemon")]
pub mod image;
#[cfg(feature = "daemon")]
pub mod model;
pub mod monitor;
pub mod monitor_api;
#[cfg(feature = "daemon")]
pub mod net;
pub mod oci;
pub mod plan;
#[cfg(feature = "spec")]
pub mod seccomp;
#[cfg(feature = "daemon")]
pub mod service;
#[cfg(feature = "daemon")]
pub mod store;
pub mod sys;
#[cfg(feature = "daemon")]
pub mod telemetry;
pub mod wire;
