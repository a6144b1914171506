//! Clients that attach to containers: handed on to the stdio process, which has their streams from then on.

use std::os::fd::OwnedFd;

use crate::errchain::Remote;
use crate::monitor::children::{Phase, unknown};
use crate::monitor::clients::Caller;
use crate::monitor::pod::Pod;
use crate::monitor::stdio::orders::Join;
use crate::monitor_api::{self as api, Body, Call, ProtocolError};

impl Pod {
    /// Begins to attach a client to a container.
    pub fn attach(&mut self, caller: Caller, call: &Call, of: &api::Attach, fds: Vec<OwnedFd>) -> Result<(), Remote> {
        let want = 1 + [of.stdin, of.stdout, of.stderr].into_iter().filter(|has| *has).count();
        if fds.len() != want {
            return Err(Remote::new(&ProtocolError::Descriptors { call: call.name(), got: fds.len(), want }));
        }
        let at = self.find(&of.container).ok_or_else(|| unknown(&of.container))?;
        let container = &mut self.containers[at];
        if !matches!(container.phase, Phase::Running(_)) || container.removing {
            return Err(container.refusal());
        }
        container.attachers.push(caller);
        self.link.join(Join { key: container.log, stdin: of.stdin, stdout: of.stdout, stderr: of.stderr }, fds);
        Ok(())
    }

    /// The stdio process has a client, or has not.
    pub fn client_joined(&mut self, log: u32, result: Result<(), Remote>) {
        let Some(container) = self.containers.iter_mut().find(|container| container.log == log) else { return };
        if !container.attachers.is_empty() {
            let caller = container.attachers.remove(0);
            self.clients.answer(caller, result.map_or_else(Body::Failed, |()| Body::Done), Vec::new());
        }
    }
}
