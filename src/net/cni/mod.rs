//! The CNI 1.1 client: what libcni is to the peers.
//!
//! [`Networks`] follows the directory of network configurations and runs ADD, DEL, CHECK, GC and STATUS over the plugins of
//! the network that pods get. What was added is kept in libcni's own cache, in its form, so that its tools read it; the entry is
//! written before the first plugin runs, so that an ADD cut short by a crash is undone by DEL.
//!
//! `conf` reads configurations, `args` is what a plugin gets beside one, `exec` runs one plugin, `chain` all of a network,
//! `result` reads what came out, `cache` keeps it, `watch` follows the directory. No task is started here: the daemon runs
//! [`Networks::watch`] in one of its own.

mod args;
mod cache;
mod chain;
mod conf;
mod error;
mod exec;
mod networks;
mod result;
mod watch;

pub use args::{Bandwidth, Dns, Pod, PortMapping, Protocol};
pub use cache::CachedAttachment;
pub use conf::BadConf;
pub use error::{Call, CallError, Failures, NetError, NotReady, PluginError, Verb};
pub use networks::{Changes, Collected, Config, Networks};
pub use result::{Attachment, BadResult};
