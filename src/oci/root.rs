//! The container's root as a detached mount: an overlay, or a copy of a directory's mount.
//!
//! Called by a creator in the host's mount namespace. The mount is nowhere until init's mount namespace is made: the host's
//! mount table never sees it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::host::Host;
use super::sandbox::{STAGED_LAYERS, STAGED_ROOT, STAGED_WRITABLE};
use super::userns::{self, Joined};
use crate::errchain::{Kind, Kinded};
use crate::plan::{Overlay, Rootfs};
use crate::sys::mount::{self, Attributes, NewFs, NewFsError, Propagation};
use crate::sys::ns;

/// A root that cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The plan has none.
    #[error("the plan names no root filesystem")]
    Missing,
    /// A directory on the host that cannot be opened.
    #[error("cannot open {path} on the host")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory whose mount cannot be copied.
    #[error("cannot bind {path}")]
    Bind {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The overlay cannot be mounted.
    #[error("cannot mount an overlay of {layers} layers of {dir} under {upper}")]
    Overlay {
        /// How many layers.
        layers: usize,
        /// Where they are.
        dir: PathBuf,
        /// The writable layer.
        upper: PathBuf,
        /// Why.
        source: NewFsError,
    },
    /// The overlay cannot be mounted with mount(2).
    #[error("cannot mount an overlay of {layers} layers of {dir} under {upper} on {on}")]
    OverlayMount {
        /// How many layers.
        layers: usize,
        /// Where they are.
        dir: PathBuf,
        /// The writable layer.
        upper: PathBuf,
        /// Where.
        on: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The layers can't be shown to the pod's user namespace.
    #[error("cannot map the ids of the layers in {dir}, whose filesystem is {filesystem}")]
    Idmap {
        /// Where they are.
        dir: PathBuf,
        /// The filesystem's type.
        filesystem: String,
        /// Why.
        source: io::Error,
    },
    /// The layers can't be attached where an overlay takes mapped ones from.
    #[error("cannot attach {path} in the pod's staging mount namespace")]
    Stage {
        /// The directory on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This kernel takes no more than 4096 bytes of options, and the layers' names need more.
    #[error("the names of {layers} layers need {bytes} bytes, and this kernel takes 4095")]
    TooManyLayers {
        /// How many layers.
        layers: usize,
        /// What their names and the other options need.
        bytes: usize,
    },
    /// It cannot become the root.
    #[error("cannot make the container's root the root at {path}")]
    Pivot {
        /// The plan's directory for it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for RootError {
    fn kind(&self) -> Kind {
        match self {
            RootError::Missing => Kind::InvalidArgument,
            RootError::TooManyLayers { .. } => Kind::ResourceExhausted,
            RootError::Idmap { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => Kind::FailedPrecondition,
            RootError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Internal,
        }
    }
}

/// A root that is ready to be attached.
#[derive(Debug)]
pub enum Prepared<'a> {
    /// A detached mount.
    Detached(OwnedFd),
    /// An overlay that this kernel can only mount in place, with mount(2).
    InPlace(&'a Overlay),
}

impl Prepared<'_> {
    /// Its descriptor.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Prepared::Detached(tree) => Some(tree.as_fd()),
            Prepared::InPlace(_) => None,
        }
    }
}

/// Longest value of one option of fsconfig(2).
const MAX_VALUE: usize = 255;
/// Longest options of mount(2), without the final NUL.
const MAX_OPTIONS: usize = 4095;

/// Prepares the root.
pub fn prepare(rootfs: &Rootfs) -> Result<Prepared<'_>, RootError> {
    match rootfs {
        Rootfs::None => Err(RootError::Missing),
        Rootfs::Directory(path) => directory(path).map(Prepared::Detached),
        Rootfs::Overlay(overlay) => overlay_by_fd(overlay),
    }
}

/// Prepares the root of a container in the pod's user namespace. A directory stays as it is: whoever made it has made it for these ids.
pub fn prepare_mapped<'a>(rootfs: &'a Rootfs, user: Joined<'_>, staging: BorrowedFd<'_>, host: &Host) -> Result<Prepared<'a>, RootError> {
    match rootfs {
        Rootfs::Overlay(overlay) => mapped_overlay(overlay, user, staging, host).map(Prepared::Detached),
        other => prepare(other),
    }
}

/// A detached overlay whose layers are shown with the ids of the pod's user namespace; not a file of theirs changes its owner.
///
/// Below Linux 6.15 overlay takes no layer from a detached mount, so that mapped layers and the writable one are attached in a copy of
/// the pod's staging mount namespace, which ends with the creator's stay in it; overlay keeps mounts of its own.
pub(super) fn mapped_overlay(overlay: &Overlay, user: Joined<'_>, staging: BorrowedFd<'_>, host: &Host) -> Result<OwnedFd, RootError> {
    let layers = open_directory(&overlay.layers_dir)?;
    let bind = |path: &Path, source| RootError::Bind { path: path.into(), source };
    let mapped = mount::clone_tree(layers.as_fd(), false).map_err(|error| bind(&overlay.layers_dir, error))?;
    mount::set_idmap(mapped.as_fd(), user.user).map_err(|source| RootError::Idmap {
        dir: overlay.layers_dir.clone(),
        filesystem: userns::filesystem(layers.as_fd()),
        source,
    })?;
    let mut trees = vec![(mapped, STAGED_LAYERS, overlay.layers_dir.as_path())];
    // A layer that is no name in `layers_dir` is the empty one below a single layer.
    let lower = overlay.lower.iter().map(|name| if name.starts_with('/') { STAGED_WRITABLE.into() } else { name.clone() }).collect();
    let mut staged = Overlay { layers_dir: STAGED_LAYERS.into(), lower, ..Overlay::default() };
    if let Some(above) = overlay.upper.parent() {
        // One mount for both: overlay wants the writable layer and its own directory on the same one.
        let stray = |path: &Path| RootError::Stage { path: path.into(), source: io::ErrorKind::InvalidInput.into() };
        let inside = |path: &Path| Ok(Path::new(STAGED_WRITABLE).join(path.strip_prefix(above).map_err(|_| stray(path))?));
        (staged.upper, staged.work) = (inside(&overlay.upper)?, inside(&overlay.work)?);
        let writable = mount::clone_tree(open_directory(above)?.as_fd(), false).map_err(|error| bind(above, error))?;
        trees.push((writable, STAGED_WRITABLE, above));
    }
    let stage = || -> Result<OwnedFd, RootError> {
        let enter = |source| RootError::Stage { path: overlay.layers_dir.clone(), source };
        ns::enter(staging, ns::Kind::Mount).and_then(|()| ns::unshare(&[ns::Kind::Mount])).map_err(enter)?;
        for (tree, at, path) in &trees {
            mount::set_propagation(tree.as_fd(), Propagation::Private)
                .and_then(|()| mount::attach_at(tree.as_fd(), Path::new(at)))
                .map_err(|source| RootError::Stage { path: path.to_path_buf(), source })?;
        }
        match overlay_by_fd(&staged)? {
            Prepared::Detached(tree) => Ok(tree),
            Prepared::InPlace(staged) => {
                mount_in_place(staged, Path::new(STAGED_ROOT))?;
                mount::clone_tree(open_directory(Path::new(STAGED_ROOT))?.as_fd(), false).map_err(|error| bind(&overlay.layers_dir, error))
            }
        }
    };
    // The paths that its errors name are those of the host.
    let tree = stage().map_err(|error| error.on_host(overlay));
    host.come_back().map_err(|source| RootError::Stage { path: overlay.layers_dir.clone(), source })?;
    tree
}

impl RootError {
    fn on_host(self, overlay: &Overlay) -> Self {
        let (layers, dir, upper) = (overlay.lower.len(), overlay.layers_dir.clone(), overlay.upper.clone());
        match self {
            RootError::Overlay { source, .. } => RootError::Overlay { layers, dir, upper, source },
            RootError::OverlayMount { on, source, .. } => RootError::OverlayMount { layers, dir, upper, on, source },
            other => other,
        }
    }
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, RootError> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| RootError::Open { path: path.into(), source: error.into() })
}

fn directory(path: &Path) -> Result<OwnedFd, RootError> {
    let opened = open_directory(path)?;
    let bind = |source| RootError::Bind { path: path.into(), source };
    let tree = mount::clone_tree(opened.as_fd(), true).map_err(bind)?;
    // A copy of a shared mount is its peer: what is mounted in the container would appear on the host.
    mount::set_propagation(tree.as_fd(), Propagation::Private).map_err(bind)?;
    Ok(tree)
}

pub(super) fn overlay_by_fd(overlay: &Overlay) -> Result<Prepared<'_>, RootError> {
    let layers_dir = open_directory(&overlay.layers_dir)?;
    // Layers are named relative to their directory: with 4096 bytes for all of them, every byte counts.
    rustix::process::fchdir(&layers_dir).map_err(|error| RootError::Open { path: overlay.layers_dir.clone(), source: error.into() })?;
    let appended = match append_layers(overlay) {
        Ok(tree) => return Ok(Prepared::Detached(tree)),
        Err(error) => error,
    };
    // `lowerdir+` is of Linux 6.7; 6.1's fsconfig takes it and fails at the end. So whatever went wrong, what older kernels
    // know is tried; where that fails too, the first error is the one that says why.
    let names = lower_names(overlay);
    if names.len() <= MAX_VALUE {
        if let Ok(tree) = listed_layers(overlay, &names) {
            return Ok(Prepared::Detached(tree));
        }
    } else if appended.cause().raw_os_error() == Some(libc::EINVAL) {
        return Ok(Prepared::InPlace(overlay));
    }
    Err(RootError::Overlay { layers: overlay.lower.len(), dir: overlay.layers_dir.clone(), upper: overlay.upper.clone(), source: appended })
}

fn append_layers(overlay: &Overlay) -> Result<OwnedFd, NewFsError> {
    let fs = NewFs::open("overlay")?;
    for layer in &overlay.lower {
        fs.set("lowerdir+", layer.as_str())?;
    }
    finish(fs, overlay)
}

fn listed_layers(overlay: &Overlay, names: &OsStr) -> Result<OwnedFd, NewFsError> {
    let fs = NewFs::open("overlay")?;
    fs.set("lowerdir", names)?;
    finish(fs, overlay)
}

fn finish(fs: NewFs, overlay: &Overlay) -> Result<OwnedFd, NewFsError> {
    fs.set("source", "overlay")?;
    fs.context(&overlay.context)?;
    if overlay.upper.as_os_str().is_empty() {
        return fs.mount(Attributes { readonly: true, ..Attributes::default() });
    }
    fs.set("upperdir", overlay.upper.as_path())?;
    fs.set("workdir", overlay.work.as_path())?;
    // Without it, unmounting syncs the whole filesystem that holds the writable layer. The layer is new and never mounted
    // again, so that there is nothing a crash could spoil.
    fs.flag("volatile")?;
    fs.mount(Attributes::default())
}

/// The layers as `lowerdir=` takes them: topmost first, between colons, with colons and backslashes in names escaped.
fn lower_names(overlay: &Overlay) -> std::ffi::OsString {
    let escaped: Vec<String> = overlay.lower.iter().map(|name| name.replace('\\', "\\\\").replace(':', "\\:")).collect();
    escaped.join(":").into()
}

/// `path` as a value in the options of mount(2), where a comma ends it.
fn option_value(path: &OsStr) -> Vec<u8> {
    path.as_bytes().iter().flat_map(|&b| if b == b',' || b == b'\\' { vec![b'\\', b] } else { vec![b] }).collect()
}

/// Mounts an overlay in place, in a mount namespace of the caller's own.
pub fn mount_in_place(overlay: &Overlay, on: &Path) -> Result<(), RootError> {
    let writable = !overlay.upper.as_os_str().is_empty();
    let mut options = if writable { b"volatile,lowerdir=".to_vec() } else { b"lowerdir=".to_vec() };
    options.extend_from_slice(
        &lower_names(overlay).as_bytes().iter().flat_map(|&b| if b == b',' { vec![b'\\', b] } else { vec![b] }).collect::<Vec<_>>(),
    );
    if writable {
        options.extend_from_slice(b",upperdir=");
        options.extend(option_value(overlay.upper.as_os_str()));
        options.extend_from_slice(b",workdir=");
        options.extend(option_value(overlay.work.as_os_str()));
    }
    if !overlay.context.is_empty() {
        // Quoted: its categories stand between commas. It has no quotes itself.
        options.extend_from_slice(format!(",context=\"{}\"", overlay.context).as_bytes());
    }
    let layers = overlay.lower.len();
    if options.len() > MAX_OPTIONS {
        return Err(RootError::TooManyLayers { layers, bytes: options.len() });
    }
    let failed = |source| RootError::OverlayMount { layers, dir: overlay.layers_dir.clone(), upper: overlay.upper.clone(), on: on.into(), source };
    let options = CString::new(options).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    rustix::process::chdir(&overlay.layers_dir).map_err(|error| failed(error.into()))?;
    mount::overlay_by_mount(on, &options).map_err(failed)
}

/// Makes the root this process's root, in a mount namespace of its own whose mounts reach no other; nothing of what was
/// there before stays.
pub fn enter(root: Prepared<'_>, pivot_dir: &Path) -> Result<(), RootError> {
    let failed = |source: io::Error| RootError::Pivot { path: pivot_dir.into(), source };
    let tree = match root {
        Prepared::Detached(tree) => {
            mount::attach_at(tree.as_fd(), pivot_dir).map_err(failed)?;
            tree
        }
        Prepared::InPlace(overlay) => {
            mount_in_place(overlay, pivot_dir)?;
            open_directory(pivot_dir)?
        }
    };
    mount::pivot_into(tree.as_fd()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped() {
        let overlay = |lower: &[&str]| Overlay { lower: lower.iter().map(|s| s.to_string()).collect(), ..Overlay::default() };
        assert_eq!(lower_names(&overlay(&["a", "b"])), "a:b");
        assert_eq!(lower_names(&overlay(&["a:1", "b\\"])), "a\\:1:b\\\\");
        assert_eq!(option_value(OsStr::new("/a,b")), b"/a\\,b");
    }
}
