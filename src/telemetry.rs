//! The daemon's log: events on stderr, where systemd's journal or a shell takes them.

use tracing_subscriber::EnvFilter;

/// Starts logging. A second call does nothing.
pub fn start(config: &crate::config::Log) {
    let filter = config.level.parse::<EnvFilter>().unwrap_or_default();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    let _ = if config.format == "json" { builder.json().try_init() } else { builder.try_init() };
}
