//! AppArmor: the profile that containers have by default, and whether a profile that a container asks for is loaded.
//!
//! As with both peers, a container that asks for nothing gets the default profile where the kernel has AppArmor enabled; one
//! that names a profile of the node's gets an error where that is not loaded. The profile is loaded by `apparmor_parser`, the
//! one compiler of policy there is. `oci` writes the name for execve to change to; the kernel has the last word there.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::errchain::{Chain, Kind, Kinded};
use crate::model::container::SecurityProfile;
use crate::sys::process::command;

/// The default profile's name.
pub const DEFAULT: &str = "copepod-default";
/// How long the parser may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes that are kept of what the parser says.
const MAX_OUTPUT: u64 = 4096;
/// Bytes of the kernel's list of profiles: thousands of them.
const MAX_LIST: u64 = 4 << 20;

/// A profile that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The kernel has no AppArmor, or it is switched off.
    #[error("profile {profile:?} is asked for, but AppArmor is not enabled on this node")]
    Disabled {
        /// The profile.
        profile: String,
    },
    /// Nobody loaded it.
    #[error("profile {profile:?} is not loaded on this node")]
    NotLoaded {
        /// The profile.
        profile: String,
    },
    /// The kernel's list of profiles.
    #[error("cannot read {path}")]
    List {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The parser isn't installed.
    #[error("cannot load profile {DEFAULT}: apparmor_parser is not installed")]
    NoParser,
    /// The parser can't be run, or does not end.
    #[error("cannot run {program}")]
    Run {
        /// The parser.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The parser failed.
    #[error("{program} failed: {said}")]
    Parser {
        /// The parser.
        program: PathBuf,
        /// What it said.
        said: String,
    },
}

impl Kinded for AppArmorError {
    fn kind(&self) -> Kind {
        match self {
            AppArmorError::Disabled { .. } | AppArmorError::NotLoaded { .. } | AppArmorError::NoParser => Kind::FailedPrecondition,
            AppArmorError::List { .. } | AppArmorError::Run { .. } | AppArmorError::Parser { .. } => Kind::Internal,
        }
    }
}

/// Where AppArmor is looked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/etc/apparmor.d`.
    pub policy: PathBuf,
    /// The parser's possible paths.
    pub parsers: Vec<PathBuf>,
}

impl Default for Places {
    fn default() -> Self {
        let parsers = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/local/sbin/apparmor_parser"];
        Self { sys: "/sys".into(), policy: "/etc/apparmor.d".into(), parsers: parsers.map(PathBuf::from).to_vec() }
    }
}

/// This node's AppArmor.
#[derive(Debug)]
pub struct AppArmor {
    places: Places,
    enabled: bool,
    /// Held while the default profile is loaded: two creates do it once.
    loading: tokio::sync::Mutex<()>,
}

impl AppArmor {
    /// Looks whether it is enabled, which no running kernel changes, and loads the default profile: also over one that an older
    /// release left there. That it can't is said, and does not keep the daemon from starting.
    pub async fn start(places: Places) -> Self {
        let parameter = fs::read(places.sys.join("module/apparmor/parameters/enabled")).unwrap_or_default();
        let this = Self { places, enabled: parameter.first() == Some(&b'Y'), loading: tokio::sync::Mutex::default() };
        if this.enabled
            && let Err(error) = this.load_default().await
        {
            tracing::warn!(error = %Chain(&error), "containers that ask for no AppArmor profile run without one");
        }
        this
    }

    /// The profile for a process; empty: none. An explicit wish that can't be fulfilled is an error, but for the default
    /// profile on a node without AppArmor: Kubernetes' own checks pass such a pod.
    pub async fn profile(&self, asked: &SecurityProfile, privileged: bool) -> Result<String, AppArmorError> {
        match asked {
            SecurityProfile::Unconfined => Ok(String::new()),
            SecurityProfile::Localhost(name) if !self.enabled => Err(AppArmorError::Disabled { profile: name.clone() }),
            // Privileged or not: whoever names a profile wants it.
            SecurityProfile::Localhost(name) if self.is_loaded(name)? => Ok(name.clone()),
            SecurityProfile::Localhost(name) => Err(AppArmorError::NotLoaded { profile: name.clone() }),
            SecurityProfile::Unset | SecurityProfile::RuntimeDefault if !self.enabled || privileged => Ok(String::new()),
            SecurityProfile::RuntimeDefault => self.default_profile().await,
            // Said at the start.
            SecurityProfile::Unset => Ok(self.default_profile().await.unwrap_or_default()),
        }
    }

    /// The default profile's name. Loads it where somebody unloaded it, as `aa-remove-unknown` does.
    async fn default_profile(&self) -> Result<String, AppArmorError> {
        if !self.is_loaded(DEFAULT)? {
            let _one = self.loading.lock().await;
            if !self.is_loaded(DEFAULT)? {
                self.load_default().await?;
            }
            if !self.is_loaded(DEFAULT)? {
                return Err(AppArmorError::NotLoaded { profile: DEFAULT.into() });
            }
        }
        Ok(DEFAULT.into())
    }

    fn is_loaded(&self, name: &str) -> Result<bool, AppArmorError> {
        let path = self.places.sys.join("kernel/security/apparmor/profiles");
        let failed = |source| AppArmorError::List { path: path.clone(), source };
        let mut list = Vec::new();
        fs::File::open(&path).and_then(|file| file.take(MAX_LIST).read_to_end(&mut list)).map_err(failed)?;
        // `NAME (MODE)`; a name may have spaces.
        let names = list.split(|&b| b == b'\n').filter_map(|line| line.iter().rposition(|&b| b == b'(').map(|end| line[..end].trim_ascii_end()));
        let mut names = names;
        Ok(names.any(|other| other == name.as_bytes()))
    }

    /// Loads the default profile, replacing one of its name: the node's own file of that name if there is one, else ours.
    async fn load_default(&self) -> Result<(), AppArmorError> {
        let parser = self.places.parsers.iter().find(|path| path.exists()).ok_or(AppArmorError::NoParser)?;
        let own = self.places.policy.join(DEFAULT);
        let text = if own.exists() { None } else { Some(default_profile(self.places.policy.join("abi/3.0").exists())) };
        let run = |source| AppArmorError::Run { program: parser.clone(), source };
        let mut start = command(parser);
        start.args(["--replace", "--skip-read-cache"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        if text.is_none() {
            start.arg(&own).stdin(Stdio::null());
        }
        let mut child = tokio::process::Command::from(start).kill_on_drop(true).spawn().map_err(run)?;
        let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let talk = async {
            if let (Some(stdin), Some(text)) = (&mut stdin, &text) {
                // A parser that ends early says why itself.
                let _ = stdin.write_all(text.as_bytes()).await;
            }
            drop(stdin);
            let mut said = Vec::new();
            if let Some(mut stderr) = stderr {
                (&mut stderr).take(MAX_OUTPUT).read_to_end(&mut said).await?;
                // What is beyond is dropped, so that the parser does not wait for a reader.
                tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
            }
            Ok::<_, io::Error>((child.wait().await?, said))
        };
        let (status, said) = tokio::time::timeout(TIMEOUT, talk).await.map_err(|_| run(io::ErrorKind::TimedOut.into()))?.map_err(run)?;
        if status.success() {
            return Ok(());
        }
        Err(AppArmorError::Parser { program: parser.clone(), said: String::from_utf8_lossy(&said).trim().replace('\n', "; ") })
    }
}

/// The default profile, in the language of apparmor.d(5). It allows what Docker's and containerd's allow, which workloads have
/// been written against; nothing is included, so that it needs no other file.
fn default_profile(abi: bool) -> String {
    // With a newer interface to the kernel `network` alone would not cover Unix sockets. Older parsers know none.
    let abi = if abi { "abi <abi/3.0>,\n" } else { "" };
    format!(
        "{abi}@{{PROC}}=/proc/

profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (send,receive) peer={DEFAULT},
  ptrace (trace,read,tracedby,readby) peer={DEFAULT},
  deny mount,

  # Of /proc only what belongs to a process, and the limits of shared memory.
  deny @{{PROC}}/* w,
  deny @{{PROC}}/[^0-9s]*/** w,
  deny @{{PROC}}/s[^y]*/** w,
  deny @{{PROC}}/sys/[^k]** w,
  deny @{{PROC}}/sys/kernel/{{?,??,[^s][^h][^m]**}} w,
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/kcore rwklx,

  # Of /sys only control groups, which mounts keep read-only where they must.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node whose kernel says `enabled` and has `profiles` loaded, with a parser that is this shell script.
    fn node(enabled: &str, profiles: &str, parser: Option<&str>) -> (tempfile::TempDir, Places) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let places = Places { sys: dir.path().join("sys"), policy: dir.path().join("policy"), parsers: vec![dir.path().join("parser")] };
        for (path, text) in [("module/apparmor/parameters/enabled", enabled), ("kernel/security/apparmor/profiles", profiles)] {
            let path = places.sys.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(&places.policy).unwrap();
        if let Some(script) = parser {
            fs::write(&places.parsers[0], format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display())).unwrap();
            fs::set_permissions(&places.parsers[0], fs::Permissions::from_mode(0o755)).unwrap();
        }
        (dir, places)
    }

    const LOADS: &str = "echo \"$@\" >arguments; cat >text; echo 'copepod-default (enforce)' >>sys/kernel/security/apparmor/profiles";

    fn localhost(name: &str) -> SecurityProfile {
        SecurityProfile::Localhost(name.into())
    }

    #[tokio::test]
    async fn without_apparmor_only_a_named_profile_is_an_error() {
        for enabled in ["N\n", ""] {
            let (_dir, places) = node(enabled, "", Some(LOADS));
            let apparmor = AppArmor::start(places.clone()).await;
            for asked in [SecurityProfile::Unset, SecurityProfile::RuntimeDefault, SecurityProfile::Unconfined] {
                assert_eq!(apparmor.profile(&asked, false).await.unwrap(), "");
            }
            let error = apparmor.profile(&localhost("mine"), false).await.unwrap_err();
            assert!(matches!(&error, AppArmorError::Disabled { profile } if profile == "mine"), "{error}");
            assert!(!places.policy.with_file_name("text").exists(), "nothing is loaded");
        }
    }

    #[tokio::test]
    async fn the_default_profile_is_loaded_at_start_and_again_when_it_is_gone() {
        let (dir, places) = node("Y\n", "other (enforce)\nwith space (complain)\n", Some(LOADS));
        let apparmor = AppArmor::start(places.clone()).await;
        let text = fs::read_to_string(dir.path().join("text")).unwrap();
        assert!(text.starts_with("@{PROC}=/proc/") && text.contains("profile copepod-default"), "{text}");
        assert_eq!(fs::read_to_string(dir.path().join("arguments")).unwrap(), "--replace --skip-read-cache\n");
        let profile = async |asked: &SecurityProfile, privileged| apparmor.profile(asked, privileged).await.unwrap();
        assert_eq!(profile(&SecurityProfile::Unset, false).await, DEFAULT);
        assert_eq!(profile(&SecurityProfile::RuntimeDefault, false).await, DEFAULT);
        assert_eq!(profile(&SecurityProfile::Unset, true).await, "");
        assert_eq!(profile(&SecurityProfile::RuntimeDefault, true).await, "");
        assert_eq!(profile(&SecurityProfile::Unconfined, false).await, "");
        assert_eq!(profile(&localhost("with space"), true).await, "with space");
        for missing in ["with", "missing", "other (enforce)", ""] {
            assert!(matches!(apparmor.profile(&localhost(missing), false).await, Err(AppArmorError::NotLoaded { .. })), "{missing}");
        }

        fs::write(places.sys.join("kernel/security/apparmor/profiles"), "").unwrap();
        fs::remove_file(dir.path().join("text")).unwrap();
        assert_eq!(profile(&SecurityProfile::RuntimeDefault, false).await, DEFAULT);
        assert!(dir.path().join("text").exists());
    }

    #[tokio::test]
    async fn the_nodes_own_default_profile_is_taken_instead_of_ours() {
        let (dir, places) = node("Y\n", "", Some(LOADS));
        fs::write(places.policy.join(DEFAULT), "profile copepod-default {}").unwrap();
        let apparmor = AppArmor::start(places.clone()).await;
        let own = places.policy.join(DEFAULT);
        assert_eq!(fs::read_to_string(dir.path().join("arguments")).unwrap(), format!("--replace --skip-read-cache {}\n", own.display()));
        assert_eq!(apparmor.profile(&SecurityProfile::Unset, false).await.unwrap(), DEFAULT);
    }

    #[tokio::test]
    async fn without_a_parser_that_works_an_explicit_default_is_an_error() {
        let check = async |parser: Option<&str>, word: &str| {
            let (_dir, places) = node("Y\n", "", parser);
            let apparmor = AppArmor::start(places).await;
            assert_eq!(apparmor.profile(&SecurityProfile::Unset, false).await.unwrap(), "");
            let error = apparmor.profile(&SecurityProfile::RuntimeDefault, false).await.unwrap_err();
            assert!(Chain(&error).to_string().contains(word), "{}", Chain(&error));
        };
        check(None, "not installed").await;
        check(Some("echo no such thing >&2; exit 3"), "no such thing").await;
        // It says that all is well, and nothing is loaded.
        check(Some("exit 0"), "not loaded").await;
        check(Some("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1"), "xxx").await;
    }

    #[test]
    fn the_profile_names_an_interface_only_where_there_is_one() {
        assert!(default_profile(true).starts_with("abi <abi/3.0>,\n"));
        assert!(!default_profile(false).contains("abi <"));
    }
}
