//! Copepod: a Kubernetes container runtime, in one library behind three programs.
//!
//! # Bird's-eye view
//!
//! ```text
//! kubelet / crictl ──gRPC, unix socket──▶ copepod           daemon: tokio, many threads, only spawns programs
//!                                           │ unix socket per pod (SOCK_SEQPACKET, descriptors beside messages)
//!                                           └─▶ copepod-monitor  one per pod, one thread: polls, reaps, answers
//!                                                 ├─ stdio       its one forked child: pipes → log files
//!                                                 ├─ creator …   a short-lived fork per create or exec: mounts, paths, cgroups
//!                                                 └─ inits and exec'd processes: the monitor's own children
//! ```
//!
//! The daemon keeps no pipe and no child that matters: killed at any instruction and started again, it reads its state
//! directory, greets every monitor and carries on. A monitor's death ends its pod, reported, and nothing else.
//!
//! # Code map, top down; imports point down only (`tests/layering.rs`)
//!
//! - [`daemon`]: the composition root. [`admin`], [`client`]: `copepod status` and `drain`, over the daemon's own socket.
//! - [`cri`]: gRPC handlers, `from_proto`, `to_proto`. **Proto types stop here.**
//! - [`service`]: sandboxes, containers, execs, stats, metrics, events, the monitors' client, recovery. **Never sees a proto.**
//! - [`stream`]: the streaming server: exec, attach and port-forward over SPDY and WebSocket. **Its clients are hostile.**
//! - [`image`]: references, registries, pulls, layers. [`net`]: CNI client, pinned namespaces, counters. [`store`]: records
//!   and the journal, on tmpfs. [`seccomp`]: profiles to BPF. [`config`], [`telemetry`].
//! - [`model`]: what is asked for and how it becomes a plan; the state machine. **No I/O.**
//! - [`monitor`]: the monitor's loop, children, stdio process, logs. **One thread. Never blocks on anybody's disk or mount:**
//!   whatever may is done by a forked creator.
//! - [`oci`]: the embedded runtime, as functions over a [`plan`]. **No string path is resolved inside a container's root.**
//! - [`cgroup`]: both versions of control groups behind one type.
//! - [`monitor_api`]: the protocol between daemon and monitor. [`plan`]: what a container is to be, fully checked. [`wire`]:
//!   their encoding. **Unknown fields are refused: a security setting is never dropped.**
//! - [`ids`], [`errchain`]: identifiers; errors with their causes, also across processes.
//! - [`sys`]: the kernel, wrapped. **The only `unsafe`.**
//!
//! The monitor is built without the feature `daemon`: no tokio, gRPC, TLS or JSON is in it.

#[cfg(feature = "daemon")]
#[allow(missing_docs, clippy::all)]
pub mod api {
    //! The CRI's messages and services, generated from `proto/`.
    tonic::include_proto!("runtime.v1");
}

#[cfg(test)]
#[path = "../tests/common/root.rs"]
pub mod testing;

#[cfg(test)]
#[path = "../tests/common/random.rs"]
pub mod random;

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
#[cfg(feature = "daemon")]
pub mod stream;
pub mod sys;
#[cfg(feature = "daemon")]
pub mod telemetry;
pub mod wire;
