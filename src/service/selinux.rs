//! SELinux: whether this node has it, the labels of pods and containers, and which pod has which level.
//!
//! Every pod has a pair of categories of its own, so that its files are closed to others of the same type. On a node without
//! SELinux, or whose policy knows no containers, options are checked for their form and otherwise ignored, as by both
//! peers. `oci` has execve change to the labels and mounts with them.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::errchain::{Chain, Kind, Kinded};
use crate::model::selinux::{self, Defaults, Labels, Options, PAIRS};

/// The mode in which a node's SELinux is left alone.
const OFF: &str = "off";
/// Bytes of one of the policy's small files.
const MAX_FILE: usize = 64 << 10;

/// Options that can't be honoured.
#[derive(Debug, thiserror::Error)]
pub enum SeLinuxError {
    /// The loaded policy has no such context.
    #[error("SELinux context {context:?} is not valid in this node's policy")]
    Unknown {
        /// The context.
        context: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Every pair of categories is a pod's.
    #[error("all {PAIRS} pairs of SELinux categories are in use")]
    Exhausted,
    /// There is no randomness.
    #[error("cannot choose SELinux categories")]
    Random(#[source] getrandom::Error),
}

impl Kinded for SeLinuxError {
    fn kind(&self) -> Kind {
        match self {
            SeLinuxError::Unknown { .. } => Kind::InvalidArgument,
            SeLinuxError::Exhausted => Kind::ResourceExhausted,
            SeLinuxError::Random(_) => Kind::Internal,
        }
    }
}

/// Where SELinux is looked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/sys/fs/selinux`.
    pub fs: PathBuf,
    /// `/etc/selinux`.
    pub policy: PathBuf,
    /// `/proc/self/attr/current`.
    pub current: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { fs: "/sys/fs/selinux".into(), policy: "/etc/selinux".into(), current: "/proc/self/attr/current".into() }
    }
}

/// This node's SELinux.
#[derive(Debug)]
pub struct SeLinux {
    places: Places,
    /// `None`: it is not enabled.
    defaults: Option<Defaults>,
    /// Levels, and how many pods have each: more than one only where a pod asked for one.
    levels: Mutex<HashMap<String, usize>>,
}

/// A level that a pod has until this is dropped, or for good: see [`Level::keep`].
#[derive(Debug)]
pub struct Level {
    of: Arc<SeLinux>,
    level: String,
}

impl Level {
    /// The level; empty on a node without SELinux.
    pub fn name(&self) -> &str {
        &self.level
    }

    /// It stays with the pod, whose record names it, until [`SeLinux::release`].
    pub fn keep(mut self) -> String {
        std::mem::take(&mut self.level)
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        self.of.release(&self.level);
    }
}

impl SeLinux {
    /// Looks whether it is enabled: its filesystem is there, a policy is loaded, and that policy knows containers.
    /// `mode` is the configuration's: `off` has it taken for a node without.
    pub fn detect(mode: &str, places: Places) -> Arc<Self> {
        let mut this = Self { places, defaults: None, levels: Mutex::default() };
        // Without a policy everything has the kernel's initial context.
        let loaded = fs::read(&this.places.current).is_ok_and(|context| !context.is_empty() && !context.starts_with(b"kernel"));
        if mode != OFF && this.places.fs.join("context").exists() && loaded {
            let defaults = this.read_defaults();
            let known = this.check(&defaults.process).and_then(|()| this.check(&defaults.file));
            match known {
                Ok(()) => this.defaults = Some(defaults),
                Err(error) => tracing::warn!(error = %Chain(&error), "SELinux is enabled, but its policy knows no containers: they are not labelled"),
            }
        }
        Arc::new(this)
    }

    /// The policy's own defaults for containers: `lxc_contexts` of the policy that `/etc/selinux/config` names.
    fn read_defaults(&self) -> Defaults {
        let mut defaults = Defaults::default();
        let config = read(&self.places.policy.join("config"));
        let policy = assignments(&config).find(|(key, _)| *key == "SELINUXTYPE").map_or("targeted", |(_, value)| value);
        if policy.contains('/') {
            return defaults;
        }
        for (key, value) in assignments(&read(&self.places.policy.join(policy).join("contexts/lxc_contexts"))) {
            match key {
                "process" => defaults.process = value.into(),
                "file" => defaults.file = value.into(),
                _ => {}
            }
        }
        defaults
    }

    /// The kernel's word on a context: it takes valid ones on `context` of selinuxfs.
    fn check(&self, context: &str) -> Result<(), SeLinuxError> {
        let opened = fs::OpenOptions::new().write(true).open(self.places.fs.join("context"));
        opened
            .and_then(|mut file| file.write_all(format!("{context}\0").as_bytes()))
            .map_err(|source| SeLinuxError::Unknown { context: context.into(), source })
    }

    /// A level for a pod: the one that it asks for, else a pair of categories that no other pod has.
    pub fn level(self: &Arc<Self>, options: &Options) -> Result<Level, SeLinuxError> {
        if self.defaults.is_none() {
            return Ok(Level { of: self.clone(), level: String::new() });
        }
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        let level = if options.level.is_empty() {
            let mut random = [0; 4];
            getrandom::fill(&mut random).map_err(SeLinuxError::Random)?;
            let first = u32::from_ne_bytes(random) % PAIRS;
            let free = (0..PAIRS).map(|step| selinux::pair((first + step) % PAIRS)).find(|level| !levels.contains_key(level));
            free.ok_or(SeLinuxError::Exhausted)?
        } else {
            options.level.clone()
        };
        *levels.entry(level.clone()).or_default() += 1;
        drop(levels);
        Ok(Level { of: self.clone(), level })
    }

    /// A pod that was there before the daemon has this level.
    pub fn reserve(&self, level: &str) {
        if !level.is_empty() {
            *self.levels.lock().unwrap_or_else(PoisonError::into_inner).entry(level.into()).or_default() += 1;
        }
    }

    /// A pod with this level is gone.
    pub fn release(&self, level: &str) {
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pods) = levels.get_mut(level) {
            *pods -= 1;
            if *pods == 0 {
                levels.remove(level);
            }
        }
    }

    /// The labels of a container with these options in a pod with this level; empty without SELinux.
    pub fn labels(&self, options: &Options, level: &str, privileged: bool) -> Result<Labels, SeLinuxError> {
        let Some(defaults) = &self.defaults else { return Ok(Labels::default()) };
        let labels = selinux::labels(defaults, options, level, privileged);
        self.check(&labels.process)?;
        self.check(&labels.mount)?;
        Ok(labels)
    }
}

fn read(path: &std::path::Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    if text.len() > MAX_FILE { String::new() } else { text }
}

/// `KEY=value` and `key = "value"`, less comments.
fn assignments(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.trim(), value.trim().trim_matches('"')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(current: &str) -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { fs: dir.path().join("fs"), policy: dir.path().join("etc"), current: dir.path().join("current") };
        fs::create_dir_all(&places.fs).unwrap();
        fs::create_dir_all(places.policy.join("own/contexts")).unwrap();
        fs::write(places.fs.join("context"), "").unwrap();
        fs::write(&places.current, current).unwrap();
        (dir, places)
    }

    #[test]
    fn without_selinux_there_are_no_labels() {
        let check = |places: Places| {
            let selinux = SeLinux::detect("auto", places);
            let level = selinux.level(&Options { level: "s0:c1,c2".into(), ..Options::default() }).unwrap();
            assert_eq!(level.name(), "");
            assert_eq!(selinux.labels(&Options::default(), "", false).unwrap(), Labels::default());
        };
        let (_dir, places) = node("kernel\0");
        check(places.clone());
        fs::write(&places.current, "u:r:t:s0").unwrap();
        fs::remove_file(places.fs.join("context")).unwrap();
        check(places.clone());
        // A policy that knows no containers: the kernel refuses the write.
        fs::create_dir(places.fs.join("context")).unwrap();
        check(places);
    }

    #[test]
    fn it_can_be_switched_off() {
        let (_dir, places) = node("u:r:t:s0");
        assert_eq!(
            SeLinux::detect("auto", places.clone()).labels(&Options::default(), "s0", false).unwrap().process,
            "system_u:system_r:container_t:s0"
        );
        assert_eq!(SeLinux::detect("off", places).labels(&Options::default(), "s0", false).unwrap(), Labels::default());
    }

    #[test]
    fn labels_are_of_the_nodes_policy_and_options() {
        let (_dir, places) = node("u:r:t:s0");
        fs::write(places.policy.join("config"), "# SELINUXTYPE=no\nSELINUX=enforcing\nSELINUXTYPE=own\n").unwrap();
        fs::write(places.policy.join("own/contexts/lxc_contexts"), "process = \"a_u:a_r:a_t:s0\"\nfile = \"a_u:object_r:f_t:s0\"\n").unwrap();
        let selinux = SeLinux::detect("auto", places.clone());
        let labels = selinux.labels(&Options::default(), "s0:c1,c2", false).unwrap();
        assert_eq!((labels.process.as_str(), labels.mount.as_str()), ("a_u:a_r:a_t:s0:c1,c2", "a_u:object_r:f_t:s0:c1,c2"));
        fs::remove_file(places.fs.join("context")).unwrap();
        let error = selinux.labels(&Options { kind: "no_t".into(), ..Options::default() }, "s0", false).unwrap_err();
        assert!(error.to_string().contains("a_u:a_r:no_t:s0"), "{error}");
    }

    #[test]
    fn a_level_is_one_pods_until_it_is_released() {
        let (_dir, places) = node("u:r:t:s0");
        let selinux = SeLinux::detect("auto", places);
        let mut levels: Vec<Level> = (0..1000).map(|_| selinux.level(&Options::default()).unwrap()).collect();
        let names: std::collections::BTreeSet<_> = levels.iter().map(|level| level.name().to_string()).collect();
        assert_eq!(names.len(), 1000);
        let kept = levels.pop().unwrap().keep();
        drop(levels);
        assert_eq!(selinux.levels.lock().unwrap().keys().collect::<Vec<_>>(), [&kept]);

        // Two pods that ask for one level share it.
        let asked = Options { level: kept.clone(), ..Options::default() };
        drop(selinux.level(&asked).unwrap());
        assert!(selinux.levels.lock().unwrap().contains_key(&kept));
        selinux.release(&kept);
        assert!(selinux.levels.lock().unwrap().is_empty());

        for number in 0..PAIRS {
            selinux.reserve(&selinux::pair(number));
        }
        assert!(matches!(selinux.level(&Options::default()), Err(SeLinuxError::Exhausted)));
        selinux.release("s0:c7,c1000");
        assert_eq!(selinux.level(&Options::default()).unwrap().name(), "s0:c7,c1000");
    }
}
