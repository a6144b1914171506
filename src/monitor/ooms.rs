//! Whether memory ran out in a container, also where its control group is gone before that could be read: systemd removes a
//! scope as soon as nothing lives in it, which may be before its init is reaped.
//!
//! Before it sends the signal, the kernel counts an OOM kill in the victim's group and in every group above it. What the pod's
//! group has counted and no other container accounts for was in the one that is gone.

use crate::cgroup::{Cgroup, CgroupError};
use crate::errchain::{Chain, Kind, Kinded};
use crate::monitor::pod::Pod;
use crate::monitor::say;

impl Pod {
    /// A container was made: what its pod's group had counted before the first one is nobody's.
    pub fn begin_counting_ooms(&mut self, at: usize) {
        if self.ooms_before.is_none() && self.hierarchy.is_v2() {
            self.ooms_before = self.group(at).ok().and_then(|group| group.parent(&self.hierarchy)?.oom_kills().ok());
        }
    }

    /// Whether the kernel's OOM killer has ended a process of a container whose init has just been reaped. Reads a few small
    /// files of the kernel's, which wait for nobody: the one thing that the monitor itself does with control groups.
    pub fn ran_out_of_memory(&mut self, at: usize) -> bool {
        let counted = match self.group(at).and_then(|group| group.oom_kills()) {
            Err(CgroupError::NoController { .. }) => Ok(0),
            Err(error) if error.kind() == Kind::NotFound => Ok(self.unaccounted_ooms(at)),
            counted => counted,
        };
        let container = &mut self.containers[at];
        match counted {
            Ok(kills) => {
                container.ooms = kills;
                kills > 0
            }
            Err(error) => {
                say(format_args!("container {}: cannot tell whether memory ran out: {}", container.id, Chain(&error)));
                false
            }
        }
    }

    /// A container is no longer in the table: its pod's group goes on counting what was killed in it.
    pub fn forget_ooms(&mut self, kills: u64) {
        self.ooms_before = self.ooms_before.map(|before| before + kills);
    }

    fn group(&self, at: usize) -> Result<Cgroup, CgroupError> {
        Cgroup::new(&self.hierarchy, &self.containers[at].cgroup)
    }

    fn unaccounted_ooms(&self, gone: usize) -> u64 {
        let pod = self.group(gone).ok().and_then(|group| group.parent(&self.hierarchy)?.oom_kills().ok());
        let (Some(before), Some(pod)) = (self.ooms_before, pod) else { return 0 };
        let others = (0..self.containers.len()).filter(|at| *at != gone).map(|at| {
            let now = self.group(at).and_then(|group| group.oom_kills()).unwrap_or(0);
            now.max(self.containers[at].ooms)
        });
        pod.saturating_sub(before + others.sum::<u64>())
    }
}
