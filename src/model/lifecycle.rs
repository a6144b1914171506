//! The state machine of containers and sandboxes: which operation is allowed in which phase.
//!
//! ```text
//! container:   CreateContainer          StartContainer         exit, StopContainer
//!            ───────────────▶ Created ─────────────────▶ Running ────────────────▶ Exited
//!                                └──── StopContainer, failed start ───────────────▶ ▲
//! sandbox:     RunPodSandbox            StopPodSandbox, death of the monitor
//!            ──────────────▶ Ready ─────────────────────────────────────▶ NotReady
//! ```
//! RemoveContainer and RemovePodSandbox are allowed in every phase: they stop first.

use crate::errchain::{Kind, Kinded};

/// Where a container is in its life; derived from facts, never stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Made, not started.
    Created,
    /// Its init runs.
    Running,
    /// Its init has ended, or could not be started.
    Exited,
}

/// What may be asked of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// StartContainer.
    Start,
    /// Exec, ExecSync, Attach.
    Exec,
    /// StopContainer.
    Stop,
    /// ReopenContainerLog.
    ReopenLog,
    /// UpdateContainerResources.
    Update,
    /// RemoveContainer.
    Remove,
}

/// What to do with an operation that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// It has something to do.
    Do,
    /// What it would do is done.
    AlreadyDone,
}

/// The phase does not allow the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{op:?} is not possible while the container is {phase:?}")]
pub struct Refused {
    /// What was asked for.
    pub op: Op,
    /// Where the container is.
    pub phase: Phase,
}

impl Kinded for Refused {
    fn kind(&self) -> Kind {
        Kind::FailedPrecondition
    }
}

/// May `op` run in `phase`? There is no `_` arm: a new operation is decided for every phase.
pub fn admit(phase: Phase, op: Op) -> Result<Admit, Refused> {
    match (op, phase) {
        (Op::Start, Phase::Created)
        | (Op::Exec | Op::ReopenLog, Phase::Running)
        | (Op::Stop | Op::Update, Phase::Created | Phase::Running)
        | (Op::Remove, Phase::Created | Phase::Running | Phase::Exited) => Ok(Admit::Do),
        (Op::Stop, Phase::Exited) => Ok(Admit::AlreadyDone),
        (Op::Start, Phase::Running | Phase::Exited) | (Op::Exec | Op::ReopenLog, Phase::Created | Phase::Exited) | (Op::Update, Phase::Exited) => {
            Err(Refused { op, phase })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_decided() {
        use Admit::{AlreadyDone, Do};
        let check = |op, want: [Option<Admit>; 3]| {
            let got = [Phase::Created, Phase::Running, Phase::Exited].map(|phase| admit(phase, op).ok());
            assert_eq!(got, want, "{op:?}");
        };
        check(Op::Start, [Some(Do), None, None]);
        check(Op::Exec, [None, Some(Do), None]);
        check(Op::ReopenLog, [None, Some(Do), None]);
        check(Op::Update, [Some(Do), Some(Do), None]);
        check(Op::Stop, [Some(Do), Some(Do), Some(AlreadyDone)]);
        check(Op::Remove, [Some(Do); 3]);
    }
}
