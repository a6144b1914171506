//! AppArmor profiles and SELinux contexts of processes, set through the host's procfs.
//!
//! What is written must reach the kernel and nothing else: a label that ends up in a file that only looks like one of /proc is a
//! process without confinement (CVE-2019-16884, CVE-2025-52881). So the files are opened below a descriptor of the host's /proc
//! that was taken before anything of a container was there, no mount below it is crossed, and what is opened is a file of
//! procfs. Called in init, in an exec'd process and in the pause process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::host::PROC_SUPER_MAGIC;
use crate::errchain::{Kind, Kinded};
use crate::plan::Process;

/// A label that a process can't get.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// The kernel has no such module, or not this file of it.
    #[error("cannot set {what} {label:?}: cannot open /proc/{file}")]
    Open {
        /// `AppArmor profile`, `SELinux context`.
        what: &'static str,
        /// The label.
        label: String,
        /// The file below /proc.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses the label.
    #[error("cannot set {what} {label:?}")]
    Set {
        /// `AppArmor profile`, `SELinux context`.
        what: &'static str,
        /// The label.
        label: String,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for LabelError {
    fn kind(&self) -> Kind {
        match self {
            // The node lacks the module, or the profile: neither is wrong in itself.
            LabelError::Open { source, .. } | LabelError::Set { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::FailedPrecondition,
            LabelError::Set { source, .. } if source.kind() == io::ErrorKind::InvalidInput => Kind::InvalidArgument,
            _ => Kind::Internal,
        }
    }
}

const APPARMOR: &str = "AppArmor profile";
const SELINUX: &str = "SELinux context";

/// Has the next execve of this process change to the plan's labels. `proc` is the host's /proc.
pub fn on_exec(plan: &Process, proc: BorrowedFd<'_>) -> Result<(), LabelError> {
    if !plan.apparmor.is_empty() {
        set(APPARMOR, &plan.apparmor, format!("exec {}", plan.apparmor), "self/attr/apparmor/exec", proc)?;
    }
    if !plan.selinux.is_empty() {
        // Keys that the process makes, as its session keyring is.
        set(SELINUX, &plan.selinux, plan.selinux.clone(), "self/attr/keycreate", proc)?;
        set(SELINUX, &plan.selinux, plan.selinux.clone(), "self/attr/exec", proc)?;
    }
    Ok(())
}

/// Changes this process's AppArmor profile now.
pub fn change_profile(profile: &str, proc: BorrowedFd<'_>) -> Result<(), LabelError> {
    if profile.is_empty() {
        return Ok(());
    }
    set(APPARMOR, profile, format!("changeprofile {profile}"), "self/attr/apparmor/current", proc)
}

fn set(what: &'static str, label: &str, text: String, file: &'static str, proc: BorrowedFd<'_>) -> Result<(), LabelError> {
    let opened = open(file, proc).map_err(|source| LabelError::Open { what, label: label.into(), file, source })?;
    let written = rustix::io::write(&opened, text.as_bytes()).map_err(io::Error::from).and_then(|n| {
        // The kernel takes a label whole.
        if n == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    });
    written.map_err(|source| LabelError::Set { what, label: label.into(), source })
}

fn open(file: &str, proc: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // `self` is a plain link to the process's own number.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(proc, file, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty(), resolve)?;
    if rustix::fs::fstatfs(opened.as_fd())?.f_type as u64 != PROC_SUPER_MAGIC {
        return Err(Errno::XDEV.into());
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn directory(path: &Path) -> OwnedFd {
        rustix::fs::openat(rustix::fs::CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn nothing_but_a_procfs_is_written_to() {
        let proc = directory(Path::new("/proc"));
        assert!(open("self/oom_score_adj", proc.as_fd()).is_ok());
        // A directory that only looks like /proc, and a link out of the true one.
        let fake = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(fake.path().join("self/attr")).unwrap();
        std::fs::write(fake.path().join("self/attr/exec"), "").unwrap();
        let refused = open("self/attr/exec", directory(fake.path()).as_fd()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EXDEV));
        assert!(open("self/root/proc/self/oom_score_adj", proc.as_fd()).is_err());
        assert!(open("self/cwd/Cargo.toml", proc.as_fd()).is_err());
    }

    #[test]
    fn a_plan_without_labels_needs_no_file() {
        let nothing = tempfile::tempdir().unwrap();
        let proc = directory(nothing.path());
        on_exec(&Process::default(), proc.as_fd()).unwrap();
        change_profile("", proc.as_fd()).unwrap();
        // One that has a label, where the module is not: an error, never a process without it.
        for plan in [Process { apparmor: "p".into(), ..Process::default() }, Process { selinux: "u:r:t:s0".into(), ..Process::default() }] {
            let error = on_exec(&plan, proc.as_fd()).unwrap_err();
            assert_eq!(error.kind(), Kind::FailedPrecondition, "{error}");
        }
        assert!(change_profile("p", proc.as_fd()).is_err());
    }
}
