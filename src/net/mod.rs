//! Pod networking: the CNI client, pinned network namespaces, interface counters.
//!
//! `cni` runs the plugin binaries that a network configuration names, with what they printed kept for later; `netns` gives a
//! namespace a path that outlives its makers; `stats` reads the counters of a pod's interfaces; `dial` connects to a port inside a
//! pod. Called by `service` alone. What this is not: it makes no namespace and brings no `lo` up (the sandbox's child does).

pub mod cni;
pub mod dial;
pub mod netns;
pub mod stats;
