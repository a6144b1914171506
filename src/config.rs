//! The configuration: one YAML file, drop-ins merged over it, every key with a default and checked when it is read.
//!
//! `kind: RuntimeConfiguration`, camelCase keys as in kubelet's own file. Files in `NAME.d/` beside the file (`config.d/`
//! beside `copepod.yaml`'s directory default) are merged in lexical order: mappings by key, everything else replaced.
//! Nothing here is global: the value is passed to whoever needs it. `config/copepod.yaml` explains every key.

mod image;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::errchain::{Kind, Kinded};

/// Where the daemon looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/copepod/copepod.yaml";
const API_VERSION: &str = "copepod.dev/v1alpha1";
const KIND: &str = "RuntimeConfiguration";
/// Bytes of one configuration file.
const MAX_FILE: u64 = 1 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file can't be read.
    #[error("cannot read configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is no YAML.
    #[error("configuration file {path} is not valid YAML: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        reason: String,
    },
    /// A file or the merged whole has a wrong key or a value of the wrong type.
    #[error("configuration {path} is not a {KIND}: {reason}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the key.
        reason: String,
    },
    /// A value is of the right type but makes no sense.
    #[error("configuration key {key}: {value:?} {reason}")]
    Value {
        /// The key with its path.
        key: &'static str,
        /// The value.
        value: String,
        /// What it must be.
        reason: &'static str,
    },
}

impl Kinded for ConfigError {
    fn kind(&self) -> Kind {
        Kind::InvalidArgument
    }
}

/// A span of time, written as in Go: `90s`, `5m`, `1h30m`, `250ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let ms = self.0.as_millis();
        to.serialize_str(&if ms.is_multiple_of(1000) { format!("{}s", ms / 1000) } else { format!("{ms}ms") })
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        parse_span(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no duration such as 90s, 5m or 1h30m")))
    }
}

fn parse_span(text: &str) -> Option<Span> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total = total.checked_add(match &rest[..unit] {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            _ => return None,
        })?;
        rest = &rest[unit..];
    }
    Some(Span(total))
}

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty = $default:expr),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default),* }
            }
        }
    };
}

section! {
    /// The whole configuration.
    Config {
        /// `copepod.dev/v1alpha1`.
        api_version: String = API_VERSION.into(),
        /// `RuntimeConfiguration`.
        kind: String = KIND.into(),
        /// The socket on which the CRI is served.
        listen: PathBuf = "/run/copepod/copepod.sock".into(),
        /// What outlives a reboot: images, layers, writable layers.
        root: PathBuf = "/var/lib/copepod".into(),
        /// What dies with the kernel: pods, containers, the journal. On tmpfs.
        state: PathBuf = "/run/copepod".into(),
        /// The daemon's own log.
        log: Log = Log::default(),
        /// The per-pod monitor.
        monitor: Monitor = Monitor::default(),
        /// Control groups.
        cgroup: Cgroup = Cgroup::default(),
        /// Defaults of containers.
        runtime: Runtime = Runtime::default(),
        /// CNI.
        network: Network = Network::default(),
        /// Images and registries.
        image: Image = Image::default(),
        /// Exec, attach and port-forward.
        streaming: Streaming = Streaming::default(),
    }
}

section! {
    /// The daemon's own log, on stderr.
    Log {
        /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,copepod::net=debug`.
        level: String = "info".into(),
        /// `text` or `json`.
        format: String = "text".into(),
    }
}

section! {
    /// The per-pod monitor.
    Monitor {
        /// The program; empty: `copepod-monitor` beside the daemon's own program.
        path: PathBuf = PathBuf::new(),
        /// The control group in which monitors live, outside of the pods'. Empty: the daemon's own.
        cgroup: String = "/copepod-monitors".into(),
        /// How long one request to a monitor may take before it is given up.
        timeout: Span = Span(Duration::from_secs(120)),
    }
}

section! {
    /// Control groups.
    Cgroup {
        /// `auto`, `cgroupfs` or `systemd`.
        driver: String = "auto".into(),
        /// The parent of pods for which kubelet names none.
        default_parent: String = "/copepod".into(),
    }
}

section! {
    /// Defaults of containers.
    Runtime {
        /// Capabilities of a container that isn't privileged.
        default_capabilities: Vec<String> = ["CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP",
            "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"].map(String::from).to_vec(),
        /// Resource limits, `NAME=SOFT:HARD`; `nofile=1024:524288`. Numbers or `unlimited`.
        default_ulimits: Vec<String> = vec!["nofile=1024:524288".into()],
        /// Sysctls of pods with a network namespace of their own.
        default_sysctls: BTreeMap<String, String> = BTreeMap::from([
            ("net.ipv4.ip_unprivileged_port_start".to_string(), "0".to_string()),
            ("net.ipv4.ping_group_range".to_string(), "0 2147483647".to_string()),
        ]),
        /// Processes and threads of a container for which kubelet names no limit; 0: none.
        pids_limit: i64 = 0,
        /// Bytes of a pod's /dev/shm.
        shm_bytes: u64 = 64 << 20,
        /// Bytes after which a log line is cut into partial lines.
        log_max_line: u32 = 16 << 10,
        /// Bytes of ExecSync's output, both streams together; what is beyond is dropped. Below kubelet's 16 MiB message.
        exec_sync_max_output: u64 = 15 << 20,
        /// Exec sessions (not ExecSync) that one container may have at once.
        max_exec_sessions: usize = 256,
        /// Clients that may be attached to one container at once.
        max_attach_sessions: usize = 16,
        /// `auto`: pods are labelled where SELinux is enabled and its policy knows containers. `off`: never.
        selinux: String = "auto".into(),
        /// A request may lower oom_score_adj only as far as the daemon's own value where it lacks CAP_SYS_RESOURCE.
        restrict_oom_score_adj: bool = true,
    }
}

section! {
    /// CNI.
    Network {
        /// Directory of conflists, followed live.
        cni_conf_dir: PathBuf = "/etc/cni/net.d".into(),
        /// Directories of plugins, searched in order.
        cni_bin_dirs: Vec<PathBuf> = vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
        /// Cached results, in libcni's form.
        cni_cache_dir: PathBuf = "/var/lib/cni".into(),
        /// Name of the network; empty: the first conflist in lexical order.
        network: String = String::new(),
        /// Where pods' network namespaces are pinned.
        netns_dir: PathBuf = "/run/netns".into(),
        /// How long the plugins of one ADD may take.
        add_timeout: Span = Span(Duration::from_secs(300)),
        /// How long the plugins of one DEL may take.
        del_timeout: Span = Span(Duration::from_secs(60)),
    }
}

section! {
    /// Images and registries.
    Image {
        /// registries.conf, version 2. It and its drop-ins are read again when they change.
        registries_conf: PathBuf = "/etc/containers/registries.conf".into(),
        /// Drop-ins of registries.conf.
        registries_conf_dir: PathBuf = "/etc/containers/registries.conf.d".into(),
        /// Directories with `HOST[:PORT]/*.crt`, `*.cert` and `*.key`; the first that has a registry wins. Read at each pull.
        certs_dirs: Vec<PathBuf> = vec!["/etc/containers/certs.d".into(), "/etc/docker/certs.d".into()],
        /// Auth files, asked in order where a request has no credentials. Read when a registry asks for some.
        auth_files: Vec<PathBuf> = ["/etc/containers/auth.json", "/run/containers/0/auth.json", "/root/.config/containers/auth.json",
            "/root/.docker/config.json"].map(PathBuf::from).to_vec(),
        /// Directory with `NAMESPACE.json`, auth files for pods of one namespace, asked first. Empty: none.
        namespace_auth_dir: PathBuf = PathBuf::new(),
        /// How long a credential helper (`docker-credential-NAME`) may take.
        credential_helper_timeout: Span = Span(Duration::from_secs(30)),
        /// Layers that are fetched at once, per pull.
        max_parallel_layers: usize = 3,
        /// A pull that gets no byte for so long is given up.
        progress_timeout: Span = Span(Duration::from_secs(300)),
        /// Images that kubelet must not remove; a `*` at the end stands for anything.
        pinned: Vec<String> = Vec::new(),
    }
}

section! {
    /// The server behind the URLs of exec, attach and port-forward.
    Streaming {
        /// The address it listens on; with an unspecified one, URLs name the loopback.
        address: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST),
        /// The port; 0: any that is free.
        port: u16 = 0,
        /// A session in which nothing moves for so long is ended.
        idle_timeout: Span = Span(Duration::from_secs(4 * 3600)),
        /// Connections at once; further ones are turned away.
        max_connections: usize = 1000,
        /// The certificate with its chain, PEM; empty: no TLS. Read again when it changes, as the files below.
        tls_cert_file: PathBuf = PathBuf::new(),
        /// The certificate's key, PEM.
        tls_key_file: PathBuf = PathBuf::new(),
        /// Authorities of clients' certificates, PEM; empty: clients need no certificate.
        tls_client_ca_file: PathBuf = PathBuf::new(),
        /// The oldest version of TLS: `"1.2"` or `"1.3"`.
        tls_min_version: String = "1.2".into(),
    }
}

impl Config {
    /// Reads `path` and its drop-ins. A missing file at the default path is an empty one.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut merged = match read(path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => Value::Null,
            value => value?,
        };
        for drop_in in drop_ins(path)? {
            merge(&mut merged, read(&drop_in)?);
        }
        if merged.is_null() {
            merged = Value::Object(serde_json::Map::new());
        }
        let config: Config = serde_json::from_value(merged).map_err(|error| ConfigError::Shape { path: path.into(), reason: error.to_string() })?;
        config.check()?;
        Ok(config)
    }

    /// The configuration as YAML.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).unwrap_or_default()
    }

    fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn ToString, reason| Err(ConfigError::Value { key, value: value.to_string(), reason });
        if self.api_version != API_VERSION {
            return bad("apiVersion", &self.api_version, "must be copepod.dev/v1alpha1");
        }
        if self.kind != KIND {
            return bad("kind", &self.kind, "must be RuntimeConfiguration");
        }
        let paths = [
            ("listen", &self.listen),
            ("root", &self.root),
            ("state", &self.state),
            ("network.cniConfDir", &self.network.cni_conf_dir),
            ("network.cniCacheDir", &self.network.cni_cache_dir),
            ("network.netnsDir", &self.network.netns_dir),
        ];
        for (key, path) in paths {
            if !path.is_absolute() {
                return bad(key, &path.display(), "must be an absolute path");
            }
        }
        if !self.monitor.path.as_os_str().is_empty() && !self.monitor.path.is_absolute() {
            return bad("monitor.path", &self.monitor.path.display(), "must be an absolute path or empty");
        }
        if !matches!(self.cgroup.driver.as_str(), "auto" | "cgroupfs" | "systemd") {
            return bad("cgroup.driver", &self.cgroup.driver, "must be auto, cgroupfs or systemd");
        }
        for (key, path) in [("cgroup.defaultParent", &self.cgroup.default_parent), ("monitor.cgroup", &self.monitor.cgroup)] {
            if (key != "monitor.cgroup" || !path.is_empty()) && (!path.starts_with('/') || path.split('/').any(|part| part == "..")) {
                return bad(key, path, "must be an absolute control group path");
            }
        }
        if !matches!(self.log.format.as_str(), "text" | "json") {
            return bad("log.format", &self.log.format, "must be text or json");
        }
        if self.log.level.parse::<tracing_subscriber::EnvFilter>().is_err() {
            return bad("log.level", &self.log.level, "must be error, warn, info, debug, trace or a filter");
        }
        if !(1024..=1 << 20).contains(&self.runtime.log_max_line) {
            return bad("runtime.logMaxLine", &self.runtime.log_max_line, "must be 1024 to 1048576");
        }
        if self.runtime.exec_sync_max_output > 15 << 20 {
            return bad("runtime.execSyncMaxOutput", &self.runtime.exec_sync_max_output, "must be at most 15 MiB: kubelet takes 16 MiB in a message");
        }
        for (key, value, most) in
            [("runtime.maxExecSessions", self.runtime.max_exec_sessions, 4096), ("runtime.maxAttachSessions", self.runtime.max_attach_sessions, 64)]
        {
            if !(1..=most).contains(&value) {
                return bad(key, &value, "must be 1 to 4096 execs, 1 to 64 attached clients");
            }
        }
        self.streaming.check()?;
        self.image.check()?;
        if !matches!(self.runtime.selinux.as_str(), "auto" | "off") {
            return bad("runtime.selinux", &self.runtime.selinux, "must be auto or off");
        }
        for name in &self.runtime.default_capabilities {
            if crate::plan::capability::parse(name).is_none() {
                return bad("runtime.defaultCapabilities", name, "is no capability");
            }
        }
        for limit in &self.runtime.default_ulimits {
            if crate::model::rlimit::parse(limit).is_none() {
                return bad("runtime.defaultUlimits", limit, "must be NAME=SOFT:HARD with a limit's name, and soft no higher than hard");
            }
        }
        for (name, value) in &self.runtime.default_sysctls {
            if crate::model::sysctl::parse(name, value).is_err() {
                return bad("runtime.defaultSysctls", name, "is no sysctl that a pod's namespaces hold");
            }
        }
        Ok(())
    }
}

impl Streaming {
    fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn ToString, reason| Err(ConfigError::Value { key, value: value.to_string(), reason });
        if self.idle_timeout.0 < Duration::from_secs(1) {
            return bad("streaming.idleTimeout", &format!("{:?}", self.idle_timeout.0), "must be at least 1s");
        }
        if !(1..=65536).contains(&self.max_connections) {
            return bad("streaming.maxConnections", &self.max_connections, "must be 1 to 65536");
        }
        if !matches!(self.tls_min_version.as_str(), "1.2" | "1.3") {
            return bad("streaming.tlsMinVersion", &self.tls_min_version, "must be 1.2 or 1.3");
        }
        let files = [
            ("streaming.tlsCertFile", &self.tls_cert_file),
            ("streaming.tlsKeyFile", &self.tls_key_file),
            ("streaming.tlsClientCaFile", &self.tls_client_ca_file),
        ];
        for (key, path) in files {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                return bad(key, &path.display(), "must be an absolute path or empty");
            }
        }
        if self.tls_cert_file.as_os_str().is_empty() != self.tls_key_file.as_os_str().is_empty() {
            return bad("streaming.tlsKeyFile", &self.tls_key_file.display(), "must be given together with streaming.tlsCertFile");
        }
        if self.tls_cert_file.as_os_str().is_empty() && !self.tls_client_ca_file.as_os_str().is_empty() {
            return bad(
                "streaming.tlsClientCaFile",
                &self.tls_client_ca_file.display(),
                "needs streaming.tlsCertFile: without TLS nobody shows a certificate",
            );
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Value, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, format!("{size} bytes are more than {MAX_FILE}"))));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Value::Null);
    }
    let value: Value = serde_saphyr::from_str(&text).map_err(|error| ConfigError::Syntax { path: path.into(), reason: error.to_string() })?;
    if !value.is_object() {
        return Err(ConfigError::Shape { path: path.into(), reason: "it is not a mapping".into() });
    }
    // Each file must be right by itself, so that an error names the file it is in.
    serde_json::from_value::<Config>(value.clone()).map_err(|error| ConfigError::Shape { path: path.into(), reason: error.to_string() })?;
    Ok(value)
}

/// `config.d/*.yaml` beside the file, in lexical order.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let dir = path.with_file_name("config.d");
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|source| ConfigError::Read { path: dir.clone(), source })?,
    };
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "yaml" || e == "yml")).collect();
    files.sort();
    Ok(files)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (_, Value::Null) => {}
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(main: &str, drop_in: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copepod.yaml");
        fs::write(&path, main).unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        fs::write(dir.path().join("config.d/10-x.yaml"), drop_in).unwrap();
        Config::load(&path)
    }

    #[test]
    fn drop_ins_are_merged_by_key() {
        let config = load("root: /a\nimage: {maxParallelLayers: 2}\n", "image:\n  pinned: [x]\n  progressTimeout: 1m30s\n").unwrap();
        assert_eq!(config.root, Path::new("/a"));
        assert_eq!(config.image.max_parallel_layers, 2);
        assert_eq!(config.image.pinned, ["x"]);
        assert_eq!(config.image.progress_timeout.0, Duration::from_secs(90));
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        let check = |text: &str, words: &[&str]| {
            let error = load(text, "").unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{text:?}: {error}");
            }
        };
        check("rooot: /a\n", &["rooot"]);
        check("root: a\n", &["root", "\"a\"", "absolute"]);
        check("root: [\n", &["YAML"]);
        check("kind: Pod\n", &["kind", "Pod"]);
        check("cgroup: {driver: x}\n", &["cgroup.driver", "\"x\""]);
        check("runtime: {defaultCapabilities: [FLY]}\n", &["defaultCapabilities", "FLY"]);
        check("runtime: {defaultUlimits: ['nofile=2:1']}\n", &["defaultUlimits", "nofile=2:1"]);
        check("runtime: {defaultSysctls: {'kernel.core_pattern': x}}\n", &["defaultSysctls", "kernel.core_pattern"]);
        check("streaming: {address: here}\n", &["IP address"]);
        check("streaming: {idleTimeout: 10ms}\n", &["streaming.idleTimeout", "10ms"]);
        check("streaming: {maxConnections: 0}\n", &["streaming.maxConnections", "0"]);
        check("streaming: {tlsCertFile: /c.pem}\n", &["streaming.tlsKeyFile", "tlsCertFile"]);
        check("streaming: {tlsCertFile: c.pem, tlsKeyFile: /k.pem}\n", &["streaming.tlsCertFile", "c.pem", "absolute"]);
        check("streaming: {tlsClientCaFile: /ca.pem}\n", &["streaming.tlsClientCaFile", "tlsCertFile"]);
        check("streaming: {tlsMinVersion: '1.1'}\n", &["streaming.tlsMinVersion", "1.1"]);
        check("runtime: {maxExecSessions: 0}\n", &["maxExecSessions", "\"0\""]);
        check("runtime: {maxAttachSessions: 65}\n", &["maxAttachSessions", "\"65\""]);
        check("network: {addTimeout: soon}\n", &["soon", "duration"]);
    }

    #[test]
    fn the_default_is_valid_and_prints_itself() {
        let config = Config::default();
        config.check().unwrap();
        let back: Config = serde_saphyr::from_str(&config.to_yaml()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn the_sample_file_holds_the_defaults() {
        let sample: Config = serde_saphyr::from_str(include_str!("../config/copepod.yaml")).unwrap();
        assert_eq!(sample, Config::default());
    }
}
