//! The networks of pods: what they are now, and the verbs over them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant;

use super::args::{self, Pod};
use super::cache::{Cache, CachedAttachment, Entry};
use super::chain::{Chain, Valid};
use super::conf::{Directory, Network, Version, find};
use super::error::{Failures, NetError, NotReady};
use super::result::{self, Attachment};
use crate::errchain;

/// Where networks are configured and how long their plugins may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory of `.conflist`, `.conf` and `.json` files.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// libcni's own directory; other runtimes on the node use it too.
    pub cache_dir: PathBuf,
    /// Which daemon's attachments are ours: its state directory, so that a second daemon's on the same node are not touched.
    pub owner: String,
    /// The name of the network that pods get. `None`: of the first valid file, in lexical order.
    pub network: Option<String>,
    /// The pod's interface.
    pub interface: String,
    /// For each plugin's ADD, CHECK.
    pub add_timeout: Duration,
    /// For each plugin's DEL.
    pub del_timeout: Duration,
    /// For each plugin's GC: other verbs wait for it.
    pub gc_timeout: Duration,
    /// For each plugin's STATUS.
    pub status_timeout: Duration,
    /// How long an answer of STATUS is taken for the present state.
    pub status_age: Duration,
    /// How often [`Networks::watch`] looks at the directories though it has seen no event.
    pub look_every: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/cni".into(),
            owner: "/run/copepod".into(),
            network: None,
            interface: "eth0".into(),
            // Some plugins wait for a controller to hand out an address; kubelet itself gives up after two minutes and asks again.
            add_timeout: Duration::from_secs(300),
            del_timeout: Duration::from_secs(60),
            gc_timeout: Duration::from_secs(30),
            status_timeout: Duration::from_secs(10),
            status_age: Duration::from_secs(5),
            look_every: Duration::from_secs(10),
        }
    }
}

/// What a collection did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Attachments that were detached: sandbox id and interface.
    pub detached: Vec<(String, String)>,
    /// Whether the network's plugins ran their GC. They do from version 1.1.0 on, unless the configuration forbids it or another
    /// verb was running.
    pub collected: bool,
}

/// The networks of pods. One for each daemon; all its methods may run at the same time.
#[derive(Debug)]
pub struct Networks {
    pub(super) config: Config,
    cache: Arc<Cache>,
    /// What the last look at the directory found.
    loaded: watch::Sender<Arc<Loaded>>,
    /// The last answer of STATUS.
    status: Mutex<Option<Status>>,
    /// Held while STATUS runs.
    asking: tokio::sync::Mutex<()>,
    /// One lock for each pod whose network is being changed.
    pods: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Read by ADD and DEL, written by GC, which must run alone (the specification's section 3, "Lifecycle & Ordering").
    gate: tokio::sync::RwLock<()>,
    /// Attached by this process: alive, whatever a list that was made before says.
    live: Mutex<BTreeSet<(String, String)>>,
}

/// What a look at the directory came to.
#[derive(Debug)]
pub(super) struct Loaded {
    generation: u64,
    network: Option<Arc<Network>>,
    ready: Result<(), NotReady>,
}

#[derive(Debug)]
struct Status {
    /// Of which load.
    generation: u64,
    at: Instant,
    outcome: Result<(), NotReady>,
}

/// A poisoned lock's data is whole here: nothing panics while it is held half-written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Networks {
    /// Reads the directory, which need not exist yet. Starts no task.
    pub fn new(config: Config) -> Result<Arc<Self>, NetError> {
        check_config(&config)?;
        let loaded = load(&config, 1);
        Ok(Arc::new(Self {
            cache: Arc::new(Cache::new(&config.cache_dir, &config.owner)),
            loaded: watch::Sender::new(Arc::new(loaded)),
            status: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
            pods: Mutex::default(),
            gate: tokio::sync::RwLock::default(),
            live: Mutex::default(),
            config,
        }))
    }

    /// Follows the configuration directory and the plugins' directories, which may come, go and be replaced, and asks the network's
    /// STATUS now and then. Runs until it is dropped.
    pub async fn watch(self: Arc<Self>) {
        tokio::join!(super::watch::follow(&self), super::watch::ask(&self));
    }

    /// A channel that changes when the directory was read anew or STATUS answered otherwise: time to ask [`Networks::ready`] again.
    pub fn changes(&self) -> Changes {
        Changes(self.loaded.subscribe())
    }

    /// Whether pods can get a network, as of the last look at the directory and the last STATUS. Never waits.
    pub fn ready(&self) -> Result<(), NotReady> {
        let loaded = self.loaded.borrow().clone();
        loaded.ready.clone()?;
        match &*lock(&self.status) {
            Some(status) if status.generation == loaded.generation => status.outcome.clone(),
            _ => Ok(()),
        }
    }

    /// Like [`Networks::ready`], but asks the plugins' STATUS first (from version 1.1.0 on), if the last answer is not of late.
    pub async fn status(&self) -> Result<(), NotReady> {
        let loaded = self.loaded.borrow().clone();
        let Some(network) = loaded.network.as_ref().filter(|network| loaded.ready.is_ok() && network.version >= Version::V1_1_0) else {
            return self.ready();
        };
        let _asking = self.asking.lock().await;
        let fresh = |status: &Status| status.generation == loaded.generation && status.at.elapsed() < self.config.status_age;
        if lock(&self.status).as_ref().is_some_and(fresh) {
            return self.ready();
        }
        let asked = self.chain(network, self.config.status_timeout).status().await;
        let outcome = asked.map_err(|error| NotReady::new(errchain::Chain(&error).to_string()));
        let before = lock(&self.status).replace(Status { generation: loaded.generation, at: Instant::now(), outcome: outcome.clone() });
        if before.is_none_or(|before| before.outcome != outcome) {
            self.loaded.send_modify(|_| ());
        }
        self.ready()
    }

    /// Attaches a pod. On failure nothing of it is left, unless the error says so. What an earlier ADD of the same pod left, one cut
    /// short by a crash, is undone first.
    pub async fn add(&self, pod: &Pod) -> Result<Attachment, NetError> {
        args::check_id(&pod.id)?;
        if !pod.netns.is_absolute() || pod.netns.to_str().is_none() {
            return Err(NetError::BadPod { field: "netns", value: pod.netns.display().to_string(), why: "is no absolute path in UTF-8" });
        }
        let cni_args = args::cni_args(pod)?;
        let _turn = self.turn(&pod.id).await;
        let _gate = self.gate.read().await;
        self.undo(&pod.id).await?;

        let network = self.network()?;
        let mut entry = Entry::new(&network, &pod.id, &self.config.interface, &pod.netns, self.cache.owner());
        entry.args = Some(cni_args);
        entry.capabilities = Some(args::capabilities(pod));
        // Before the first plugin runs: a crash from here on is undone from this.
        self.put(entry.clone()).await?;
        lock(&self.live).insert((pod.id.clone(), self.config.interface.clone()));

        let added = match self.chain(&network, self.config.add_timeout).add(&entry).await {
            Err(error) => Err(error),
            Ok(result) => self.keep(&network, entry, result).await,
        };
        match added {
            Ok(attachment) => Ok(attachment),
            Err(source) => match self.undo(&pod.id).await {
                Ok(_) => Err(source),
                Err(NetError::Detach { failures, .. }) => Err(NetError::NotUndone { pod: pod.id.clone(), undo: failures, source: Box::new(source) }),
                Err(error) => Err(NetError::NotUndone { pod: pod.id.clone(), undo: Failures(vec![error]), source: Box::new(source) }),
            },
        }
    }

    async fn keep(&self, network: &Network, mut entry: Entry, result: Box<RawValue>) -> Result<Attachment, NetError> {
        let attachment = result::attachment(&network.name, &entry.interface, &result, network.version);
        let pod = entry.id.clone();
        // Kept though it may be of no use: DEL wants it.
        entry.result = Some(result);
        self.put(entry).await?;
        attachment.map_err(|source| NetError::NoAddress { pod, network: network.name.clone(), source })
    }

    /// Detaches a pod, with the configuration and the arguments that it was attached with, whatever the directory holds now and though
    /// its namespace is gone. A pod of which nothing is kept gets a DEL of the present network, if there is one. All plugins run though
    /// some fail; then the attachment stays in the cache, and the same call tries again.
    pub async fn del(&self, pod: &Pod) -> Result<(), NetError> {
        args::check_id(&pod.id)?;
        let _turn = self.turn(&pod.id).await;
        let _gate = self.gate.read().await;
        if self.undo(&pod.id).await? {
            return Ok(());
        }
        let Some(network) = self.loaded.borrow().network.clone() else { return Ok(()) };
        let mut entry = Entry::new(&network, &pod.id, &self.config.interface, &pod.netns, self.cache.owner());
        entry.args = Some(args::cni_args(pod)?);
        entry.capabilities = Some(args::capabilities(pod));
        let failures = self.chain(&network, self.config.del_timeout).del(&entry, present(&pod.netns).await).await;
        if failures.is_empty() { Ok(()) } else { Err(NetError::Detach { pod: pod.id.clone(), failures: Failures(failures) }) }
    }

    /// Whether a pod's attachment is as it was made. Networks before 0.4.0, and those that forbid it, are taken to be well.
    pub async fn check(&self, pod: &Pod) -> Result<(), NetError> {
        args::check_id(&pod.id)?;
        let _turn = self.turn(&pod.id).await;
        let kept = self.kept(&pod.id).await?;
        let Some((path, entry)) = kept.iter().find(|(_, entry)| entry.result.is_some()) else {
            return Err(NetError::NotAttached { pod: pod.id.clone() });
        };
        let network = entry.network(path)?;
        if network.disable_check || network.version < Version::V0_4_0 {
            return Ok(());
        }
        self.chain(&network, self.config.add_timeout).check(entry, Path::new(&entry.netns)).await
    }

    /// Detaches what earlier daemons with our owner attached and `valid` (sandbox ids and interfaces) does not name, then has the plugins
    /// release what belongs to nobody. What this process attached, and what other runtimes keep in the cache, counts as valid.
    pub async fn gc(&self, valid: &[(String, String)]) -> Result<Collected, NetError> {
        let mut done = Collected::default();
        let mut failures = Vec::new();
        let known = |key: &(String, String)| valid.contains(key) || lock(&self.live).contains(key);
        for (_, entry) in self.on_disk(Cache::ours).await? {
            let key = (entry.id, entry.interface);
            if key.1 != self.config.interface || known(&key) {
                continue;
            }
            let _turn = self.turn(&key.0).await;
            let _gate = self.gate.read().await;
            // An ADD may have come before us.
            if known(&key) {
                continue;
            }
            match self.undo(&key.0).await {
                Ok(_) => done.detached.push(key),
                Err(error) => failures.push(error),
            }
        }
        done.collected = self.collect(valid, &mut failures).await?;
        if failures.is_empty() { Ok(done) } else { Err(NetError::Collect { failures: Failures(failures) }) }
    }

    async fn collect(&self, valid: &[(String, String)], failures: &mut Vec<NetError>) -> Result<bool, NetError> {
        let Some(network) = self.loaded.borrow().network.clone() else { return Ok(false) };
        if network.disable_gc || network.version < Version::V1_1_0 {
            return Ok(false);
        }
        // Not waited for: one ADD that hangs would then hold up all that come after it.
        let Ok(_gate) = self.gate.try_write() else { return Ok(false) };
        let name = network.name.clone();
        let (others, ours) = self.on_disk(move |cache| Ok((cache.others(&name)?, cache.ours()?))).await?;
        let others = others.into_iter().map(|entry| (entry.id, entry.interface));
        let ours = ours.into_iter().map(|(_, entry)| (entry.id, entry.interface));
        let all: BTreeSet<(String, String)> = others.chain(ours).chain(valid.iter().cloned()).chain(lock(&self.live).iter().cloned()).collect();
        let all: Vec<Valid> = all.into_iter().map(|(id, ifname)| Valid { id, ifname }).collect();
        failures.extend(self.chain(&network, self.config.gc_timeout).gc(&all).await);
        Ok(true)
    }

    /// What the cache holds that is ours: attachments of this and of earlier daemons with our owner, also of earlier boots. Reads a
    /// file for each: not for a worker of tokio's.
    pub fn cached(&self) -> Result<Vec<CachedAttachment>, NetError> {
        Ok(self.cache.ours()?.iter().map(|(_, entry)| CachedAttachment::from(entry)).collect())
    }

    /// Runs DEL for everything that is kept of a pod, and forgets it. Whether there was anything. The pod's turn is the caller's.
    async fn undo(&self, id: &str) -> Result<bool, NetError> {
        let kept = self.kept(id).await?;
        let mut failures = Vec::new();
        for (path, entry) in &kept {
            let network = match entry.network(path) {
                Ok(network) => network,
                Err(error) => {
                    failures.push(error);
                    continue;
                }
            };
            let failed = self.chain(&network, self.config.del_timeout).del(entry, present(Path::new(&entry.netns)).await).await;
            let failed = if failed.is_empty() { self.forget(path).await.err().into_iter().collect() } else { failed };
            failures.extend(failed);
        }
        if !failures.is_empty() {
            return Err(NetError::Detach { pod: id.to_string(), failures: Failures(failures) });
        }
        lock(&self.live).remove(&(id.to_string(), self.config.interface.clone()));
        Ok(!kept.is_empty())
    }

    /// The cache is on a disk, which may be slow: not on a worker.
    async fn on_disk<T: Send + 'static>(&self, run: impl FnOnce(&Cache) -> Result<T, NetError> + Send + 'static) -> Result<T, NetError> {
        let cache = self.cache.clone();
        let done = tokio::task::spawn_blocking(move || run(&cache)).await;
        done.unwrap_or_else(|error| Err(NetError::Cache { what: "use", path: self.config.cache_dir.clone(), source: std::io::Error::other(error) }))
    }

    async fn put(&self, entry: Entry) -> Result<(), NetError> {
        self.on_disk(move |cache| cache.put(&entry)).await
    }

    async fn kept(&self, id: &str) -> Result<Vec<(PathBuf, Entry)>, NetError> {
        let (id, interface) = (id.to_string(), self.config.interface.clone());
        self.on_disk(move |cache| cache.of(&id, &interface)).await
    }

    async fn forget(&self, path: &Path) -> Result<(), NetError> {
        let path = path.to_path_buf();
        self.on_disk(move |cache| cache.remove(&path)).await
    }

    fn network(&self) -> Result<Arc<Network>, NetError> {
        let loaded = self.loaded.borrow().clone();
        loaded.ready.clone().map_err(|source| NetError::NotReady { source })?;
        // A load that is ready has a network.
        loaded.network.clone().ok_or_else(|| NetError::NotReady { source: NotReady::new("no network".to_string()) })
    }

    fn chain<'a>(&'a self, network: &'a Network, limit: Duration) -> Chain<'a> {
        Chain { network, bin_dirs: &self.config.bin_dirs, limit }
    }

    /// Waits until nothing else changes this pod's network.
    async fn turn(&self, id: &str) -> Turn<'_> {
        let mutex = lock(&self.pods).entry(id.to_string()).or_default().clone();
        let guard = mutex.lock_owned().await;
        Turn { networks: self, id: id.to_string(), guard: Some(guard) }
    }

    /// Reads the directory again. What is as it was changes nothing: STATUS's last answer holds on.
    pub(super) fn reload(&self) {
        let before = self.loaded.borrow().clone();
        let now = load(&self.config, before.generation + 1);
        let json = |loaded: &Loaded| loaded.network.as_ref().map(|network| network.json.clone());
        if now.ready != before.ready || json(&now) != json(&before) {
            self.loaded.send_replace(Arc::new(now));
        }
    }
}

/// Something to wait on: see [`Networks::changes`].
#[derive(Debug)]
pub struct Changes(watch::Receiver<Arc<Loaded>>);

impl Changes {
    /// Waits for the next change since the last call, or since this was made. Changes that come together are one. Without its
    /// [`Networks`] there will be none any more: false.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

/// A pod's lock, and its place in the table, which goes when nobody waits for it.
struct Turn<'a> {
    networks: &'a Networks,
    id: String,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut pods = lock(&self.networks.pods);
        self.guard = None;
        // Others that hold it got it under this table's lock.
        if pods.get(&self.id).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            pods.remove(&self.id);
        }
    }
}

/// The namespace, if it is one still: not where the pin is gone, or its file was left by a crash or a reboot.
async fn present(netns: &Path) -> Option<&Path> {
    let path = netns.to_path_buf();
    let pinned = tokio::task::spawn_blocking(move || crate::net::netns::is_pinned(&path).unwrap_or(false)).await;
    pinned.unwrap_or(false).then_some(netns)
}

fn check_config(config: &Config) -> Result<(), NetError> {
    let bad = |field, value: &str, why| Err(NetError::BadConfig { field, value: value.to_string(), why });
    let name = &config.interface;
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        return bad("interface", name, "is no name of an interface");
    }
    for (field, dir) in
        [("conf_dir", &config.conf_dir), ("cache_dir", &config.cache_dir)].into_iter().chain(config.bin_dirs.iter().map(|dir| ("bin_dirs", dir)))
    {
        if !dir.is_absolute() || dir.to_str().is_none_or(|text| text.contains([':', '\0'])) {
            return bad(field, &dir.display().to_string(), "is no absolute path without ':'");
        }
    }
    if config.bin_dirs.is_empty() { bad("bin_dirs", "", "is empty") } else { Ok(()) }
}

fn load(config: &Config, generation: u64) -> Loaded {
    let found = Directory::load(&config.conf_dir, config.network.as_deref());
    let dir = config.conf_dir.display();
    let ready = match &found {
        Directory { unreadable: Some(error), .. } => Err(format!("cannot read {dir}: {error}")),
        Directory { network: Some(network), .. } => {
            let missing: BTreeSet<&str> =
                network.plugins.iter().filter(|plugin| find(&plugin.kind, &config.bin_dirs).is_none()).map(|plugin| plugin.kind.as_str()).collect();
            if missing.is_empty() {
                Ok(())
            } else {
                let missing = missing.into_iter().collect::<Vec<_>>().join(", ");
                let dirs = config.bin_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ");
                Err(format!("network {:?} needs plugin {missing}, which is not in {dirs}", network.name))
            }
        }
        Directory { bad, others, .. } => {
            let mut parts = Vec::new();
            match (&config.network, others.is_empty()) {
                (Some(name), true) => parts.push(format!("no network {name:?} in {dir}")),
                (Some(name), false) => parts.push(format!("no network {name:?} in {dir}, which has {}", others.join(", "))),
                (None, _) => parts.push(format!("no network in {dir}")),
            }
            // The first few are what the operator will look at.
            parts.extend(bad.iter().take(5).map(|(path, error)| format!("{}: {}", path.display(), errchain::Chain(error))));
            Err(parts.join("; "))
        }
    };
    Loaded { generation, network: found.network.map(Arc::new), ready: ready.map_err(NotReady::new) }
}
