//! Credential helpers: `docker-credential-NAME get` is told a registry on its stdin and answers with credentials on its stdout
//! (docker/docker-credential-helpers). Programs of the operator's, found on the daemon's PATH, bounded in time and output.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::Credentials;

/// Bytes of an answer; more is none.
const MAX_ANSWER: u64 = 64 << 10;
/// Characters shown of what a helper says about its failure.
const SHOWN: usize = 300;
/// What helpers say when they know nothing, among other words.
const UNKNOWN: &[&str] = &["credentials not found", "no credentials server URL", "no credentials username"];
/// A user of this name: the secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// Why a helper gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It can't be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It can't be spoken with.
    #[error("cannot follow {program}")]
    Follow {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It did not end.
    #[error("{program} did not answer for {address} within {seconds} s")]
    Deadline {
        /// The program.
        program: String,
        /// What it was asked for.
        address: String,
        /// How long it had.
        seconds: u64,
    },
    /// It failed.
    #[error("{program} fails for {address} with {status}: {said}")]
    Failed {
        /// The program.
        program: String,
        /// What it was asked for.
        address: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// It says more than any credentials are.
    #[error("{program} answers for {address} with more than {limit} bytes")]
    TooMuch {
        /// The program.
        program: String,
        /// What it was asked for.
        address: String,
        /// The bound.
        limit: u64,
    },
    /// Its answer is none. What it was is not shown.
    #[error("{program} answers for {address} with something else than credentials")]
    Answer {
        /// The program.
        program: String,
        /// What it was asked for.
        address: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks the helper `name` for an address. `None`: it knows nothing.
pub(super) async fn get(name: &str, address: &str, limit: Duration) -> Result<Option<Credentials>, HelperError> {
    let program = format!("docker-credential-{name}");
    let mut command = crate::sys::process::command(&program);
    command.arg("get").current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| HelperError::Start { program: program.clone(), source })?;
    // What it started ends with it.
    let _group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let run = async {
        let write = async {
            // One that doesn't read is judged by what it says.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(address.as_bytes()).await;
            }
        };
        let (out, err, ()) = tokio::join!(read(stdout), read(stderr), write);
        Ok::<_, io::Error>((out?, err?, child.wait().await?))
    };
    let (out, err, status) = match tokio::time::timeout(limit, run).await {
        Err(_) => return Err(HelperError::Deadline { program, address: address.to_string(), seconds: limit.as_secs() }),
        Ok(done) => done.map_err(|source| HelperError::Follow { program: program.clone(), source })?,
    };
    if out.len().max(err.len()) as u64 > MAX_ANSWER {
        return Err(HelperError::TooMuch { program, address: address.to_string(), limit: MAX_ANSWER });
    }
    if !status.success() {
        let said = [out, err].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_string()).join(" ");
        if UNKNOWN.iter().any(|unknown| said.contains(unknown)) {
            return Ok(None);
        }
        let said = said.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect();
        return Err(HelperError::Failed { program, address: address.to_string(), status, said });
    }
    let answer = serde_json::from_slice::<Answer>(&out).ok().filter(|answer| !answer.username.is_empty() || answer.secret.is_empty());
    match answer {
        None => Err(HelperError::Answer { program, address: address.to_string() }),
        Some(answer) if answer.secret.is_empty() => Ok(None),
        Some(Answer { username, secret }) if username == TOKEN_USER => Ok(Some(Credentials { identity_token: secret, ..Credentials::default() })),
        Some(Answer { username, secret }) => Ok(Some(Credentials { username, password: secret, ..Credentials::default() })),
    }
}

/// What comes out of a pipe, up to one byte more than the bound; then its writer finds nobody who reads.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(MAX_ANSWER + 1).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// Kills a process group when dropped. The leader is waited for only by us, so that the number is not another's while its
/// members live.
struct Group(Option<rustix::process::Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}
