//! The streaming server with clients of our own, which send what real ones never would. Sessions are played by tasks.

mod client;
mod forward;
mod hostile;
mod http;
#[path = "../common/random.rs"]
mod random;
mod remote;
mod world;
