//! The protocol between the daemon and a pod's monitor: typed messages over a SOCK_SEQPACKET socket.
//!
//! One message is one packet of at most [`MAX_MESSAGE`] bytes with at most [`MAX_FDS`] descriptors. `Hello` comes first
//! both ways; its answer carries the monitor's whole table, so that a daemon that was away knows at once what it missed.
//! Plans travel as sealed memfds beside a request. A request has a sequence number that its answer repeats; answers come
//! in any order, events at any time. A newer daemon that connects replaces the older connection.
//!
//! Neither side trusts the other's bytes: sizes, tags and the number of descriptors are checked, a truncated control
//! message (MSG_CTRUNC) ends the connection.

use std::io;
use std::os::fd::OwnedFd;

use crate::errchain::{Kind, Kinded, Remote};
use crate::plan::ResolvedUser;
use crate::wire::{self, WireError};
use crate::{wire_enum, wire_struct};

/// Version of the protocol. A monitor serves every version up to its own.
pub const VERSION: u32 = 1;
/// Bytes in one message.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Descriptors beside one message.
pub const MAX_FDS: usize = 8;
/// The socket's name in the pod's directory.
pub const SOCKET: &str = "monitor.sock";

wire_struct! {
    /// From the daemon.
    pub struct Request {
        /// Repeated by the reply.
        1 seq: u32,
        /// What to do.
        2 call: Call,
    }

    /// From the monitor.
    pub struct Message {
        /// The request this answers; 0: an event.
        1 seq: u32,
        /// The answer or the event.
        2 body: Body,
    }

    /// The first message of either side.
    pub struct Hello {
        /// The highest protocol version spoken.
        1 version: u32,
        /// The build's version, for people.
        2 release: String,
    }

    /// The monitor's table, in answer to [`Hello`].
    pub struct Snapshot {
        /// The monitor's own greeting.
        1 hello: Hello,
        /// The sandbox has been made.
        2 sandbox: Option<SandboxState>,
        /// Every container it knows.
        3 containers: Vec<ContainerState>,
        /// Execs under way.
        4 execs: Vec<String>,
        /// Bytes of log output that could not be written to any file, over all containers.
        5 log_bytes_dropped: u64,
        /// The sandbox was stopped: nothing runs, and nothing can be started.
        6 stopped: bool,
    }

    /// The sandbox.
    pub struct SandboxState {
        /// The pause process; 0: there is none.
        1 pause_pid: u32,
    }

    /// One container.
    pub struct ContainerState {
        /// Its id.
        1 id: String,
        /// Its init as the host sees it.
        2 pid: u32,
        /// Who init runs as.
        3 user: ResolvedUser,
        /// Nanoseconds since the epoch; 0: not started.
        4 started_at: u64,
        /// How it ended.
        5 exit: Option<ExitRecord>,
    }

    /// How a container ended. Also written to the container's exit file, see [`exit_record`].
    pub struct ExitRecord {
        /// The container's id.
        1 container: String,
        /// Nanoseconds since the epoch; 0: it never started.
        2 started_at: u64,
        /// Nanoseconds since the epoch.
        3 finished_at: u64,
        /// Exit code; 128 + n where signal n ended it.
        4 code: i32,
        /// The signal that ended it; 0: none.
        5 signal: u32,
        /// The kernel's OOM killer ended a process of the container.
        6 oom_killed: bool,
        /// Why it never ran: the chain of the error that start returned.
        7 start_error: Option<Remote>,
    }

    /// `CreateContainer`.
    pub struct CreateContainer {
        /// The container's id; the plan must name the same.
        1 id: String,
    }

    /// A container by its id.
    pub struct Container {
        /// The id.
        1 id: String,
    }

    /// `StopContainer`.
    pub struct StopContainer {
        /// The container.
        1 id: String,
        /// The first signal.
        2 signal: u32,
        /// Milliseconds from that signal to SIGKILL; 0: SIGKILL at once.
        3 grace_ms: u64,
    }

    /// `SignalContainer`.
    pub struct SignalContainer {
        /// The container.
        1 id: String,
        /// The signal for init.
        2 signal: u32,
    }

    /// `Exec`.
    pub struct Exec {
        /// The container.
        1 container: String,
        /// A name for this exec, unique in the pod.
        2 id: String,
        /// A descriptor for stdin comes along; else it is /dev/null.
        3 stdin: bool,
    }

    /// `Attach`.
    pub struct Attach {
        /// The container.
        1 container: String,
        /// The client says something.
        2 stdin: bool,
        /// The client takes stdout, or what a terminal shows.
        3 stdout: bool,
        /// The client takes stderr.
        4 stderr: bool,
    }

    /// A terminal's size.
    pub struct Resize {
        /// Characters in a row.
        1 columns: u16,
        /// Rows.
        2 rows: u16,
    }

    /// How a client's attachment ended.
    pub struct AttachEnd {
        /// Why, if not because the container has ended.
        1 error: Option<Remote>,
    }

    /// An exec by its name.
    pub struct ExecId {
        /// The name.
        1 id: String,
    }

    /// The end of an exec.
    pub struct ExecExited {
        /// Its name.
        1 id: String,
        /// Exit code; 128 + n where signal n ended it.
        2 code: i32,
        /// Its time was up, and all it had started is dead.
        3 timed_out: bool,
    }

    /// A container was made.
    pub struct Created {
        /// Init as the host sees it.
        1 pid: u32,
        /// Who init will run as.
        2 user: ResolvedUser,
    }

    /// A container was started.
    pub struct Started {
        /// Nanoseconds since the epoch.
        1 started_at: u64,
    }

    /// An exec'd process runs.
    pub struct ExecStarted {
        /// The process as the host sees it.
        1 pid: u32,
    }
}

wire_enum! {
    /// What the daemon asks for. [`Call::NAMES`] lists them all, for the fault tests.
    pub enum Call {
        /// Never sent.
        0 None,
        /// Greets; answered by [`Body::Snapshot`]. Must be first.
        1 Hello(Hello),
        /// Makes the pod's namespaces. Descriptors: the [`crate::plan::SandboxPlan`]. Answered by [`Body::Sandbox`] with the
        /// network namespace, if it is the pod's own, beside it. Asked again, it answers the same.
        2 CreateSandbox,
        /// Makes a container. Descriptors: the [`crate::plan::ContainerPlan`], the exit file open for writing. Answered by
        /// [`Body::Created`].
        3 CreateContainer(CreateContainer),
        /// Lets a created container's init execute its program. Answered by [`Body::Started`].
        4 StartContainer(Container),
        /// Stops a container and answers [`Body::Done`] when its init is reaped. A second call can only shorten the grace
        /// period of the first. A container that has exited, or that the monitor doesn't know, is Done at once.
        5 StopContainer(StopContainer),
        /// Sends one signal to init.
        6 SignalContainer(SignalContainer),
        /// Kills what is left of a container, removes its control group and forgets it. Idempotent.
        7 RemoveContainer(Container),
        /// Runs a process in a container. Descriptors: the [`crate::plan::ExecPlan`], stdin if there is one, stdout, stderr, which
        /// a process with a terminal does not use. Answered by [`Body::ExecStarted`] with the terminal's master, if there is one,
        /// beside it; ends with the event [`Body::ExecExited`]. When the connection that asked is gone, it is killed.
        8 Exec(Exec),
        /// Kills an exec and everything it started.
        9 KillExec(ExecId),
        /// Opens the log file anew; answered when the new file exists.
        10 ReopenLog(Container),
        /// Kills all containers and the pause process and lets the namespaces go. Idempotent.
        11 StopSandbox,
        /// Ends the monitor; refused while a container lives.
        12 Exit,
        /// Executes a newer monitor in place. Descriptors: the program.
        13 Upgrade,
        /// Attaches a client to a running container. Descriptors: its control socket, of SOCK_SEQPACKET, on which it says
        /// [`FromClient`] and hears [`ToClient`]; then the read end of a pipe for stdin and the write ends for stdout and stderr,
        /// as far as it has them. Answered by [`Body::Done`] when the client gets what the container writes. It is detached by
        /// closing the control socket; one that is closed from the other side without a word: the pod's stdio process ended.
        14 Attach(Attach),
    }

    /// What an attached client says, on a socket of its own.
    pub enum FromClient {
        /// Never sent.
        0 None,
        /// The terminal has another size now.
        1 Resize(Resize),
    }

    /// What an attached client hears.
    pub enum ToClient {
        /// Never sent.
        0 None,
        /// The last word. The streams have their ends after what is still in them.
        1 Ended(AttachEnd),
    }

    /// What the monitor says.
    pub enum Body {
        /// Never sent.
        0 None,
        /// The request failed.
        1 Failed(Remote),
        /// The request is done, and there is nothing to tell.
        2 Done,
        /// Answers `Hello`.
        3 Snapshot(Snapshot),
        /// Answers `CreateSandbox`.
        4 Sandbox(SandboxState),
        /// Answers `CreateContainer`.
        5 Created(Created),
        /// Answers `StartContainer`.
        6 Started(Started),
        /// Answers `Exec`.
        7 ExecStarted(ExecStarted),
        /// Event: a container ended. Sent after its exit file was written.
        16 Exited(ExitRecord),
        /// Event: an exec ended.
        17 ExecExited(ExecExited),
    }
}

impl Call {
    /// The name of every call that is ever sent, in the protocol's order.
    pub const NAMES: [&str; 14] = [
        "Hello",
        "CreateSandbox",
        "CreateContainer",
        "StartContainer",
        "StopContainer",
        "SignalContainer",
        "RemoveContainer",
        "Exec",
        "KillExec",
        "ReopenLog",
        "StopSandbox",
        "Exit",
        "Upgrade",
        "Attach",
    ];

    /// This call's name.
    pub fn name(&self) -> &'static str {
        let index = match self {
            Call::None => return "None",
            Call::Hello(_) => 0,
            Call::CreateSandbox => 1,
            Call::CreateContainer(_) => 2,
            Call::StartContainer(_) => 3,
            Call::StopContainer(_) => 4,
            Call::SignalContainer(_) => 5,
            Call::RemoveContainer(_) => 6,
            Call::Exec(_) => 7,
            Call::KillExec(_) => 8,
            Call::ReopenLog(_) => 9,
            Call::StopSandbox => 10,
            Call::Exit => 11,
            Call::Upgrade => 12,
            Call::Attach(_) => 13,
        };
        Self::NAMES[index]
    }
}

/// A message that can't be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The bytes are no message.
    #[error("cannot read a message of the monitor protocol")]
    Decode(#[source] WireError),
    /// A message is too large.
    #[error("message of {size} bytes is larger than {MAX_MESSAGE}")]
    TooLarge {
        /// Its size.
        size: usize,
    },
    /// The socket failed.
    #[error("cannot use the monitor's socket")]
    Socket(#[source] io::Error),
    /// A request came with the wrong number of descriptors.
    #[error("{call} comes with {got} descriptors, not {want}")]
    Descriptors {
        /// The call.
        call: &'static str,
        /// How many came.
        got: usize,
        /// How many it takes.
        want: usize,
    },
}

impl Kinded for ProtocolError {
    fn kind(&self) -> Kind {
        match self {
            ProtocolError::Decode(_) | ProtocolError::TooLarge { .. } | ProtocolError::Descriptors { .. } => Kind::InvalidArgument,
            ProtocolError::Socket(_) => Kind::Unavailable,
        }
    }
}

/// Encodes a message, checking its size.
pub fn encode<T: wire::Wire>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    let bytes = wire::encode(message);
    if bytes.len() > MAX_MESSAGE { Err(ProtocolError::TooLarge { size: bytes.len() }) } else { Ok(bytes) }
}

/// Decodes a message.
pub fn decode<T: wire::Wire>(bytes: &[u8]) -> Result<T, ProtocolError> {
    wire::decode(bytes).map_err(ProtocolError::Decode)
}

/// The number of a request that asks for what this version doesn't know, so that it can be refused: a newer daemon's pods outlive
/// its release. `None`: these bytes are no request of any version.
pub fn unknown_call(bytes: &[u8], error: &ProtocolError) -> Option<u32> {
    let newer = matches!(error, ProtocolError::Decode(WireError::UnknownVariant { .. } | WireError::UnknownField { .. }));
    let mut fields = wire::Reader::new(bytes).block().ok().filter(|_| newer)?;
    while !fields.is_empty() {
        let tag = <u32 as wire::Wire>::get(&mut fields).ok()?;
        let mut value = fields.block().ok()?;
        if tag == 1 {
            return wire::Wire::get(&mut value).ok();
        }
    }
    None
}

/// Exactly `N` descriptors, or an error that names the call.
pub fn descriptors<const N: usize>(call: &Call, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], ProtocolError> {
    let got = fds.len();
    fds.try_into().map_err(|_| ProtocolError::Descriptors { call: call.name(), got, want: N })
}

/// The exit file: preallocated when a container is created, filled by one checksummed write when it ends.
///
/// Layout: 8 bytes of magic, a little-endian u32 length, the encoded [`ExitRecord`], and a little-endian u64 FNV-1a hash
/// of everything before it. A file of zeros: the container has not ended.
pub mod exit_record {
    use super::{ExitRecord, wire};

    /// Size that is allocated for the file.
    pub const SIZE: u64 = 4096;
    const MAGIC: &[u8; 8] = b"CPODEXIT";

    /// The bytes of a record. A start error too long for the file is cut to its first link.
    pub fn encode(record: &ExitRecord) -> Vec<u8> {
        let mut body = wire::encode(record);
        if body.len() + 20 > SIZE as usize {
            let mut short = record.clone();
            short.start_error =
                record.start_error.as_ref().map(|error| crate::errchain::Remote::text(crate::errchain::Kinded::kind(error), error.to_string()));
            body = wire::encode(&short);
        }
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&body);
        let sum = fnv(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads a file's bytes. `None`: it was not filled, or not whole.
    pub fn decode(bytes: &[u8]) -> Option<ExitRecord> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (body, rest) = rest.split_at_checked(length)?;
        let sum = u64::from_le_bytes(*rest.first_chunk::<8>()?);
        if sum != fnv(&bytes[..12 + length]) {
            return None;
        }
        wire::decode(body).ok()
    }

    fn fnv(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// What `copepod-monitor --probe DIR` says about the node, one feature a line: its name and [`probe::YES`], or why not.
pub mod probe {
    /// The argument before the directory, which is empty and on the filesystem that layers are on.
    pub const ARGUMENT: &str = "--probe";
    /// The answer when the node can do it.
    pub const YES: &str = "yes";
    /// Mounts that are read-only with everything below them.
    pub const RECURSIVE_READ_ONLY_MOUNTS: &str = "recursive-read-only-mounts";
    /// Pods with a user namespace of their own.
    pub const USER_NAMESPACES: &str = "user-namespaces";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_record_is_read_back_and_a_torn_one_is_not() {
        let record = ExitRecord { container: "c1".into(), code: 137, oom_killed: true, ..ExitRecord::default() };
        let bytes = exit_record::encode(&record);
        let mut file = bytes.clone();
        file.resize(exit_record::SIZE as usize, 0);
        assert_eq!(exit_record::decode(&file), Some(record));
        for cut in 0..bytes.len() {
            assert_eq!(exit_record::decode(&bytes[..cut]), None, "cut at {cut}");
            let mut torn = file.clone();
            torn[cut..].fill(0);
            assert!(exit_record::decode(&torn).is_none_or(|_| bytes[cut..].iter().all(|&b| b == 0)), "torn at {cut}");
        }
    }

    #[test]
    fn an_exit_record_always_fits_its_file() {
        let long = Remote::from_links(Kind::Internal, vec!["x".repeat(4000); 16]);
        let record = ExitRecord { container: "c".repeat(64), start_error: Some(long), ..ExitRecord::default() };
        let bytes = exit_record::encode(&record);
        assert!(bytes.len() <= exit_record::SIZE as usize);
        assert!(exit_record::decode(&bytes).is_some());
    }

    #[test]
    fn a_call_of_a_newer_daemon_can_be_refused() {
        let mut bytes = encode(&Request { seq: 77, call: Call::StopSandbox }).unwrap();
        let tag = bytes.iter().rposition(|&byte| byte == 11).unwrap();
        bytes[tag] = 120;
        let error = decode::<Request>(&bytes).unwrap_err();
        assert_eq!(unknown_call(&bytes, &error), Some(77));
        for nonsense in [&b"nonsense"[..], &[0xff; 40], &[], &[3, 1, 9, 9]] {
            let error = decode::<Request>(nonsense).unwrap_err();
            assert_eq!(unknown_call(nonsense, &error), None, "{nonsense:?}");
        }
    }

    #[test]
    fn every_call_has_its_name() {
        let stop = Call::StopContainer(StopContainer::default());
        assert_eq!(stop.name(), "StopContainer");
        assert_eq!(Call::Attach(Attach::default()).name(), *Call::NAMES.last().unwrap());
        // The names stand in the order of the tags: tag n is NAMES[n - 1].
        for tag in 1..=Call::NAMES.len() as u32 {
            let mut bytes = wire::encode(&tag);
            bytes.extend_from_slice(&[0; 8]);
            let call = <Call as wire::Wire>::get(&mut wire::Reader::new(&bytes)).unwrap();
            assert_eq!(call.name(), Call::NAMES[tag as usize - 1]);
        }
    }
}
