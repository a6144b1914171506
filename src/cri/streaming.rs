//! The streaming server's sessions, opened by the service: what joins two modules that know nothing of each other.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::errchain::Remote;
use crate::service::Service;
use crate::service::session;
use crate::stream::{AttachAsk, BoxFuture, Control, ExecAsk, Sessions, Streams};

/// The service, as who opens sessions.
pub struct Opener(pub Arc<Service>);

impl Sessions for Opener {
    fn exec(&self, ask: ExecAsk) -> BoxFuture<'_, Result<Streams, Remote>> {
        Box::pin(async move { Ok(boxed(self.0.exec_session(&ask).await?)) })
    }

    fn attach(&self, ask: AttachAsk) -> BoxFuture<'_, Result<Streams, Remote>> {
        Box::pin(async move { Ok(boxed(self.0.attach_session(&ask).await?)) })
    }

    fn dial<'a>(&'a self, sandbox: &'a str, port: u16) -> BoxFuture<'a, Result<TcpStream, Remote>> {
        Box::pin(async move { Ok(self.0.dial(sandbox, port).await?) })
    }
}

impl Control for session::Control {
    fn resize(&mut self, width: u16, height: u16) {
        session::Control::resize(self, width, height);
    }

    fn ended(&mut self) -> BoxFuture<'_, Result<i32, Remote>> {
        Box::pin(async move { Ok(session::Control::ended(self).await?) })
    }
}

fn boxed(streams: session::Streams) -> Streams {
    let output = |output: session::Output| Box::new(output) as Box<dyn AsyncRead + Send + Unpin>;
    Streams {
        stdin: streams.stdin.map(|input| Box::new(input) as Box<dyn AsyncWrite + Send + Unpin>),
        stdout: streams.stdout.map(output),
        stderr: streams.stderr.map(output),
        control: Box::new(streams.control),
    }
}
