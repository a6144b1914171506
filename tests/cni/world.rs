//! A node for one test: directories, pods with pinned namespaces, plugins written as shell scripts.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use copepod::errchain::Chain;
use copepod::net::cni::{Config, NetError, Networks, Pod};
use copepod::net::netns;
use copepod::sys;
use tempfile::TempDir;

/// Debian's, or upstream's.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

pub struct World {
    pub dir: TempDir,
    /// The node's end of the network and its subnet: 10.90.N.1, 10.90.N.0/24.
    pub net: u8,
    pins: std::cell::RefCell<Vec<PathBuf>>,
}

impl World {
    /// `net`: a number of this test's own.
    pub fn new(net: u8) -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap(), net, pins: Vec::new().into() };
        for dir in ["conf", "bin", "cache", "ipam", "ns"] {
            std::fs::create_dir(world.path(dir)).unwrap();
        }
        for plugin in ["bridge", "host-local", "portmap", "tuning"] {
            assert!(
                PLUGINS.iter().any(|dir| Path::new(dir).join(plugin).exists()),
                "the CNI plugin {plugin} is not installed: apt-get install containernetworking-plugins"
            );
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> Config {
        let bins = [self.path("bin")].into_iter().chain(PLUGINS.iter().map(PathBuf::from));
        Config {
            conf_dir: self.path("conf"),
            bin_dirs: bins.collect(),
            cache_dir: self.path("cache"),
            owner: "/run/test".into(),
            add_timeout: Duration::from_secs(60),
            del_timeout: Duration::from_secs(60),
            // So that only inotify can tell.
            look_every: Duration::from_secs(3600),
            ..Config::default()
        }
    }

    /// The networks of a daemon that starts now.
    pub fn networks(&self) -> Arc<Networks> {
        Networks::new(self.config()).unwrap()
    }

    /// The bridge plugin's configuration, without braces, and whether it makes a gateway and masquerades.
    pub fn bridge(&self) -> String {
        format!(
            r#""type":"bridge","bridge":"test{net}","isGateway":true,"ipam":{{"type":"host-local","dataDir":"{ipam}","ranges":[[{{"subnet":"10.90.{net}.0/24"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}"#,
            net = self.net,
            ipam = self.path("ipam").display()
        )
    }

    /// Writes a conflist of these plugins (each without braces).
    pub fn conf(&self, version: &str, plugins: &[&str]) {
        let plugins: Vec<_> = plugins.iter().map(|plugin| format!("{{{plugin}}}")).collect();
        self.write("conf/10-pods.conflist", &format!(r#"{{"name":"pods","cniVersion":"{version}","plugins":[{}]}}"#, plugins.join(",")));
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// A plugin that is a shell script; `$D` is the test's directory. It appears at once, whole and executable.
    pub fn plugin(&self, name: &str, script: &str) {
        let tmp = self.path("plugin.tmp");
        std::fs::write(&tmp, format!("#!/bin/sh\nD={}\n{script}\n", self.dir.path().display())).unwrap();
        std::fs::set_permissions(&tmp, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&tmp, self.path("bin").join(name)).unwrap();
    }

    /// A pod with a namespace of its own.
    pub fn pod(&self, id: &str) -> Pod {
        let path = self.path("ns").join(id);
        netns::pin(sys::netns::create().unwrap().as_fd(), &path).unwrap();
        self.pins.borrow_mut().push(path.clone());
        Pod { id: id.into(), name: format!("pod-{id}"), namespace: "test".into(), uid: format!("uid-{id}"), netns: path, ..Pod::default() }
    }

    /// Addresses that host-local holds.
    pub fn leases(&self) -> Vec<String> {
        let mut names = names(&self.path("ipam/pods"));
        names.retain(|name| name.starts_with("10."));
        names
    }

    /// Files of the cache.
    pub fn cached(&self) -> Vec<String> {
        names(&self.path("cache/results"))
    }

    /// That nothing of any pod is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.leases(), [""; 0], "leases");
        assert_eq!(self.cached(), [""; 0], "cache");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for path in self.pins.borrow().iter() {
            netns::unpin(path).unwrap();
        }
        if Path::new(&format!("/sys/class/net/test{}", self.net)).exists() {
            sh(&format!("ip link delete test{}", self.net));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs a test's body.
pub fn block_on<T>(body: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), body).await.expect("the test came to no end") })
}

/// What a shell prints.
pub fn sh(script: &str) -> String {
    let output = copepod::sys::process::command("sh").args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a shell prints in a pod's network namespace.
pub fn sh_in(pod: &Pod, script: &str) -> String {
    sh(&format!("nsenter --net={} sh -c '{script}'", pod.netns.display()))
}

/// Runs something on a thread in a pod's network namespace.
pub fn inside<T: Send + 'static>(pod: &Pod, run: impl FnOnce() -> T + Send + 'static) -> T {
    let path = pod.netns.clone();
    let (send, receive) = std::sync::mpsc::channel();
    sys::netns::scratch("inside", move || {
        sys::netns::enter(std::fs::File::open(path).unwrap().as_fd()).unwrap();
        let _ = send.send(run());
    })
    .unwrap();
    receive.recv().expect("the thread in the pod panicked")
}

/// Serves one connection with a word.
pub fn serve(listener: TcpListener, word: &'static str) {
    std::thread::spawn(move || std::io::Write::write_all(&mut listener.accept().unwrap().0, word.as_bytes()).unwrap());
}

/// The word that is served at an address.
pub fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The whole chain of an error.
pub fn chain(error: &NetError) -> String {
    Chain(error).to_string()
}

/// Waits for the end of a process that is not our child, by its pid.
pub fn wait_gone(pid: u32) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // Gone and reaped: there is nothing to wait for.
    let Ok(pidfd) = sys::process::pidfd_open(pid) else { return };
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).unwrap(), 1, "process {pid} lives on");
}
