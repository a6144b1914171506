//! The mounts of a container: sources opened on the host by the creator, attached inside the root by init.
//!
//! Whatever needs the host (binds, the pod's /dev/shm, control groups) is a detached mount with its final attributes before init
//! exists; whatever needs init's own namespaces (procfs, sysfs, message queues, cgroup2) init makes itself. Targets are
//! descriptors from [`super::paths`]: no target is ever a string to the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::cgroup_view::{self, CgroupView};
use super::devices::{self, DeviceError};
use super::host::Host;
use super::image_volume::{self, ImageVolumeError};
use super::paths::{Leaf, Links, PathError, Root};
use super::relabel::{self, RelabelError};
use super::userns::{self, Joined, UserNsError};
use super::volume::{self, VolumeError};
use crate::cgroup::{Cgroup, Hierarchy};
use crate::errchain::{Kind, Kinded};
use crate::plan::{Bind, ContainerPlan, Mount, MountKind, Namespace, Propagation};
use crate::sys::mount::{self, Attributes, NewFs, NewFsError};
use crate::sys::ns;

/// A mount that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The source of a bind.
    #[error("cannot open {path} on the host")]
    Source {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A missing source of a bind can't be made.
    #[error("cannot make {path} on the host")]
    MakeSource {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The source of a bind can't be copied.
    #[error("cannot bind {path}")]
    Bind {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The source of a bind is on a mount that doesn't propagate as the plan needs.
    #[error("{path} on the host is not on a {want} mount")]
    Propagation {
        /// Its path on the host.
        path: PathBuf,
        /// What the mount should be.
        want: &'static str,
    },
    /// What is mounted below the source can't be made read-only. kubelet knows the first word (k8s.io/cri-api/pkg/errors).
    #[error("RROUnsupported: cannot make what is mounted below {path} read-only")]
    RecursiveReadonly {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An image.
    #[error("cannot prepare the image")]
    Image(#[source] ImageVolumeError),
    /// A volume that the image defines.
    #[error("cannot fill the volume")]
    Volume(#[source] VolumeError),
    /// SELinux labels of the source.
    #[error("cannot relabel {path}")]
    Relabel {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: RelabelError,
    },
    /// The host's mounts can't be read.
    #[error("cannot read the host's mount table")]
    MountTable(#[source] io::Error),
    /// There are no such mappings to show the source of a bind with.
    #[error("cannot make the mappings of {path}")]
    Mappings {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        source: UserNsError,
    },
    /// The source of a bind can't be shown with other owners.
    #[error("cannot map the ids of {path}, whose filesystem is {filesystem}")]
    Idmap {
        /// Its path on the host.
        path: PathBuf,
        /// The filesystem's type.
        filesystem: String,
        /// Why.
        source: io::Error,
    },
    /// The pod has no /dev/shm.
    #[error("the pod has no /dev/shm of its own")]
    NoPodShm,
    /// The pod's /dev/shm can't be reached.
    #[error("cannot take the pod's /dev/shm")]
    PodShm(#[source] io::Error),
    /// A filesystem can't be made.
    #[error("cannot make a filesystem")]
    Filesystem(#[source] NewFsError),
    /// /dev can't be filled.
    #[error("cannot fill /dev")]
    Devices(#[source] DeviceError),
    /// The control groups' mounts can't be copied.
    #[error("cannot show control group {path}")]
    Cgroup {
        /// The path on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The target can't be used.
    #[error("cannot use its target")]
    Target(#[source] PathError),
    /// The mount can't be attached.
    #[error("cannot attach it")]
    Attach(#[source] io::Error),
    /// The mount's attributes can't be set.
    #[error("cannot set its attributes")]
    Attributes(#[source] io::Error),
}

impl Kinded for MountError {
    fn kind(&self) -> Kind {
        match self {
            MountError::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::NotFound,
            MountError::Propagation { .. } | MountError::NoPodShm => Kind::InvalidArgument,
            MountError::Image(error) => error.kind(),
            MountError::Volume(error) => error.kind(),
            MountError::Relabel { source, .. } => source.kind(),
            MountError::Mappings { source, .. } => source.kind(),
            // The kernel's word for a filesystem that can't.
            MountError::Idmap { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => Kind::FailedPrecondition,
            MountError::Devices(error) => error.kind(),
            MountError::Target(error) => error.kind(),
            _ => Kind::Internal,
        }
    }
}

/// What is attached at a mount's target.
#[derive(Debug)]
enum Content {
    /// A detached mount, its attributes set.
    Tree(OwnedFd),
    /// The same, to be filled first with what the image has at the target.
    Volume(OwnedFd),
    /// Control groups of version 1.
    Cgroups(CgroupView),
    /// A filesystem that init makes, in its own namespaces.
    Make(&'static str),
}

/// A mount of the plan, ready for init.
#[derive(Debug)]
pub struct Prepared<'a> {
    mount: &'a Mount,
    content: Content,
    leaf: Leaf,
}

impl Prepared<'_> {
    /// Where it goes, in the container.
    pub fn target(&self) -> &Path {
        &self.mount.target
    }

    /// The descriptors that init needs for it.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match &self.content {
            Content::Tree(tree) | Content::Volume(tree) => vec![tree.as_fd()],
            Content::Cgroups(view) => view.fds(),
            Content::Make(_) => Vec::new(),
        }
    }
}

fn attributes(mount: &Mount) -> Attributes {
    Attributes { readonly: mount.readonly, nosuid: mount.nosuid, nodev: mount.nodev, noexec: mount.noexec, noatime: mount.noatime }
}

/// Where mounts come from.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// The host.
    pub host: &'a Host,
    /// The pod's staging mount namespace.
    pub staging: Option<BorrowedFd<'a>>,
    /// The container's control group, which exists.
    pub cgroup: &'a Cgroup,
    /// Where it is.
    pub hierarchy: &'a Hierarchy,
    /// The pod's user namespace.
    pub user: Option<Joined<'a>>,
}

/// Prepares one mount, in the host's mount namespace.
pub fn prepare<'a>(mount: &'a Mount, plan: &ContainerPlan, from: Sources<'_>) -> Result<Prepared<'a>, MountError> {
    let (content, leaf) = match &mount.kind {
        MountKind::Bind(bind) => {
            let (tree, leaf) = bind_source(mount, bind, from)?;
            (Content::Tree(tree), leaf)
        }
        MountKind::Image(image) => {
            let (tree, leaf) = image_volume::prepare(image, &plan.pivot_dir, from).map_err(MountError::Image)?;
            mount::set_attributes(tree.as_fd(), Attributes { readonly: true, ..attributes(mount) }, false).map_err(MountError::Attributes)?;
            (Content::Tree(tree), leaf)
        }
        MountKind::Volume(source) => {
            // On disk it belongs to the ids that the container sees, as the image's layers do.
            let (idmap, relabel) = (plan.user_namespace.clone(), mount.context.clone());
            let bind = Bind { source: source.clone(), idmap, relabel, ..Bind::default() };
            let (tree, leaf) = bind_source(mount, &bind, from)?;
            (Content::Volume(tree), leaf)
        }
        MountKind::PodShm => {
            let staging = from.staging.ok_or(MountError::NoPodShm)?;
            let tree = pod_shm(staging, from.host).map_err(MountError::PodShm)?;
            mount::set_attributes(tree.as_fd(), attributes(mount), false).map_err(MountError::Attributes)?;
            (Content::Tree(tree), Leaf::Directory)
        }
        MountKind::Tmpfs => (Content::Tree(tmpfs(mount, plan, from.user)?), Leaf::Directory),
        MountKind::Cgroup => {
            let content = match cgroup_view::prepare(from.cgroup, from.hierarchy, attributes(mount))? {
                Some(view) => Content::Cgroups(view),
                None if plan.namespaces.cgroup == Namespace::Private => Content::Make("cgroup2"),
                None => Content::Tree(cgroup_view::host_unified(from.hierarchy, attributes(mount))?),
            };
            (content, Leaf::Directory)
        }
        MountKind::Proc => (Content::Make("proc"), Leaf::Directory),
        MountKind::Sysfs => (Content::Make("sysfs"), Leaf::Directory),
        MountKind::Mqueue => (Content::Make("mqueue"), Leaf::Directory),
        MountKind::Devpts => (Content::Make("devpts"), Leaf::Directory),
    };
    Ok(Prepared { mount, content, leaf })
}

fn bind_source(mount: &Mount, bind: &Bind, from: Sources<'_>) -> Result<(OwnedFd, Leaf), MountError> {
    let path = &bind.source;
    let source = open_source(bind)?;
    let failed = |source: io::Error| MountError::Bind { path: path.clone(), source };
    let stat = rustix::fs::fstat(&source).map_err(|error| failed(error.into()))?;
    let leaf = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory { Leaf::Directory } else { Leaf::File };
    let propagation = match bind.propagation {
        Propagation::Private => mount::Propagation::Private,
        Propagation::Slave => mount::Propagation::Slave,
        Propagation::Shared => mount::Propagation::Shared,
    };
    let wanted = match bind.propagation {
        Propagation::Private => None,
        Propagation::Slave => Some(("shared or slave", ["shared:", "master:"].as_slice())),
        Propagation::Shared => Some(("shared", ["shared:"].as_slice())),
    };
    if let Some((want, tags)) = wanted {
        let id = mount::mount_id(source.as_fd()).map_err(failed)?;
        if !propagates(id, tags).map_err(MountError::MountTable)? {
            return Err(MountError::Propagation { path: path.clone(), want });
        }
    }
    if !bind.relabel.is_empty() {
        relabel::relabel(source.as_fd(), &bind.relabel).map_err(|source| MountError::Relabel { path: path.clone(), source })?;
    }
    let tree = mount::clone_tree(source.as_fd(), bind.recursive).map_err(failed)?;
    mount::set_propagation(tree.as_fd(), propagation).map_err(failed)?;
    if let Some(mappings) = &bind.idmap {
        let mappings = userns::for_mount(mappings, from.user, from.host.proc.as_fd());
        let mappings = mappings.map_err(|source| MountError::Mappings { path: path.clone(), source })?;
        let refused = |error| MountError::Idmap { path: path.clone(), filesystem: userns::filesystem(source.as_fd()), source: error };
        mount::set_idmap(tree.as_fd(), mappings.as_fd()).map_err(refused)?;
    }
    let all = attributes(mount);
    let readonly_below = mount.readonly && bind.readonly_recursive;
    mount::set_attributes(tree.as_fd(), all, false).map_err(MountError::Attributes)?;
    if readonly_below {
        let readonly = Attributes { readonly: true, ..Attributes::default() };
        mount::set_attributes(tree.as_fd(), readonly, true).map_err(|source| MountError::RecursiveReadonly { path: path.clone(), source })?;
    }
    Ok((tree, leaf))
}

/// Opens the source of a bind, links followed on the host; a missing one is made where the plan says so. A link that leads nowhere is
/// no missing directory.
fn open_source(bind: &Bind) -> Result<OwnedFd, MountError> {
    let path = &bind.source;
    // Not openat(O_PATH): this one has an automount at the end of the path mounted.
    let open = || rustix::mount::open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC);
    let mut opened = open();
    if opened.as_ref().is_err_and(|error| *error == Errno::NOENT) && bind.make_source && std::fs::symlink_metadata(path).is_err() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
        made.map_err(|source| MountError::MakeSource { path: path.clone(), source })?;
        opened = open();
    }
    opened.map_err(|error| MountError::Source { path: path.clone(), source: error.into() })
}

/// Whether the mount with this id has one of these optional fields in /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn propagates(id: u64, tags: &[&str]) -> io::Result<bool> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let id = id.to_string();
    let found = table.split(|&b| b == b'\n').find_map(|line| {
        // Paths have their spaces escaped, so that fields are what stands between spaces.
        let mut fields = line.split(|&b| b == b' ');
        (fields.next()? == id.as_bytes())
            .then(|| fields.skip(5).take_while(|field| *field != b"-").any(|field| tags.iter().any(|tag| field.starts_with(tag.as_bytes()))))
    });
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Where the pod's /dev/shm is in its staging mount namespace.
pub const STAGED_SHM: &str = "/shm";

fn pod_shm(staging: BorrowedFd<'_>, host: &Host) -> io::Result<OwnedFd> {
    ns::enter(staging, ns::Kind::Mount)?;
    let tree = rustix::fs::openat(CWD, STAGED_SHM, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|shm| mount::clone_tree(shm.as_fd(), false));
    host.come_back()?;
    let tree = tree?;
    mount::set_propagation(tree.as_fd(), mount::Propagation::Private)?;
    Ok(tree)
}

fn tmpfs(mount: &Mount, plan: &ContainerPlan, user: Option<Joined<'_>>) -> Result<OwnedFd, MountError> {
    let fs = NewFs::open("tmpfs").map_err(MountError::Filesystem)?;
    let options = tmpfs_options(&mount.options, user);
    fs.set("source", "tmpfs").and_then(|()| fs.options(&options)).and_then(|()| fs.context(&mount.context)).map_err(MountError::Filesystem)?;
    // Read-only at last, when what is mounted in it has its place: see `Attached`.
    let tree = fs.mount(Attributes { readonly: false, ..attributes(mount) }).map_err(MountError::Filesystem)?;
    if mount.target == Path::new("/dev") {
        devices::fill(tree.as_fd(), &plan.devices, user.map(|user| user.root)).map_err(MountError::Devices)?;
    }
    Ok(tree)
}

/// The options of a tmpfs that is made outside of the pod's user namespace: its owner as the host sees it.
fn tmpfs_options(options: &str, user: Option<Joined<'_>>) -> String {
    let Some(user) = user else { return options.into() };
    let mapped = options.split(',').filter(|option| !option.is_empty()).map(|option| {
        let range = match option.split_once('=') {
            Some(("uid", id)) => Some(("uid", id, &user.mappings.uids)),
            Some(("gid", id)) => Some(("gid", id, &user.mappings.gids)),
            _ => None,
        };
        // What isn't mapped is left for the kernel to refuse or to take.
        let host = range.and_then(|(key, id, range)| Some(format!("{key}={}", range.host_id(id.parse().ok()?)?)));
        host.unwrap_or_else(|| option.to_string())
    });
    let root = [format!("uid={}", user.root.0), format!("gid={}", user.root.1)];
    root.into_iter().chain(mapped).collect::<Vec<_>>().join(",")
}

/// Makes those filesystems of the container's namespaces that can't be made inside the pod's user namespace: the kernel wants to
/// see such a one already in the mount namespace for procfs and sysfs (EPERM), and the namespaces of the host take its root.
pub fn make_outside<'a>(prepared: &mut [Prepared<'a>]) -> Result<(), (&'a Path, MountError)> {
    for prepared in prepared {
        if let Content::Make(filesystem @ ("proc" | "sysfs" | "mqueue")) = prepared.content {
            let made = make(filesystem, prepared.mount);
            prepared.content = Content::Tree(made.map_err(|error| (prepared.mount.target.as_path(), MountError::Filesystem(error)))?);
        }
    }
    Ok(())
}

/// What init remembers of the mounts it attached.
#[derive(Debug, Default)]
pub struct Attached {
    /// The devpts at /dev/pts.
    pub devpts: Option<OwnedFd>,
    readonly_later: Vec<OwnedFd>,
}

impl Attached {
    /// Makes those mounts read-only in which others had to be attached first.
    pub fn finish(&self) -> io::Result<()> {
        let readonly = Attributes { readonly: true, ..Attributes::default() };
        self.readonly_later.iter().try_for_each(|fd| mount::set_attributes(fd.as_fd(), readonly, false))
    }
}

/// Fills the volumes that the image defines. Runs in init before anything is attached.
pub fn fill(prepared: &Prepared<'_>, root: Root<'_>) -> Result<(), MountError> {
    match &prepared.content {
        Content::Volume(tree) => volume::fill(tree.as_fd(), &prepared.mount.target, root).map_err(MountError::Volume),
        _ => Ok(()),
    }
}

/// Attaches a mount inside the root. Runs in init, which has left the host's mount namespace.
pub fn attach(prepared: Prepared<'_>, root: Root<'_>, attached: &mut Attached) -> Result<(), MountError> {
    let Prepared { mount: planned, content, leaf } = prepared;
    if planned.target.components().all(|part| part == std::path::Component::RootDir) {
        return Err(MountError::Target(PathError::Absolute { path: planned.target.clone() }));
    }
    let target = root.make(&planned.target, leaf, links(planned)).map_err(MountError::Target)?;
    match content {
        Content::Tree(tree) | Content::Volume(tree) => {
            mount::attach(tree.as_fd(), target.as_fd()).map_err(MountError::Attach)?;
            if planned.readonly && planned.kind == MountKind::Tmpfs {
                attached.readonly_later.push(tree);
            }
        }
        Content::Cgroups(view) => attached.readonly_later.extend(view.attach(target.as_fd()).map_err(MountError::Attach)?),
        Content::Make(filesystem) => {
            let tree = make(filesystem, planned).map_err(MountError::Filesystem)?;
            mount::attach(tree.as_fd(), target.as_fd()).map_err(MountError::Attach)?;
            if filesystem == "devpts" {
                attached.devpts = Some(tree);
            }
        }
    }
    Ok(())
}

/// Symbolic links in the image may lead a bind or a tmpfs elsewhere within the root, as /var/run does. The kernel's own
/// filesystems and /dev must be where the rest of the runtime, and the masked paths, take them to be.
fn links(mount: &Mount) -> Links {
    match mount.kind {
        MountKind::Bind(_) | MountKind::Image(_) | MountKind::Volume(_) => Links::Follow,
        MountKind::Tmpfs if mount.target != Path::new("/dev") => Links::Follow,
        _ => Links::Refuse,
    }
}

fn make(filesystem: &'static str, planned: &Mount) -> Result<OwnedFd, NewFsError> {
    let fs = NewFs::open(filesystem)?;
    fs.set("source", if filesystem == "cgroup2" { "cgroup" } else { filesystem })?;
    if filesystem == "devpts" {
        // Every mount of devpts is an instance of its own since Linux 4.7; `newinstance` is only accepted.
        let options = if planned.options.is_empty() { "newinstance,ptmxmode=0666,mode=0620,gid=5" } else { &planned.options };
        fs.options(options)?;
    }
    fs.context(&planned.context)?;
    fs.mount(attributes(planned))
}
