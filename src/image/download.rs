//! An image's documents and blobs from whichever of its sources has them, blobs in one pass that survives a cut connection.

use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::{Response, StatusCode, header};
use tokio::sync::mpsc;

use super::digest::Digest;
use super::http::{Http, Piece, backoff};
use super::manifest::{ACCEPT, Blob};
use super::registry::{Endpoint, RegistryError};
use crate::errchain::Chain;

/// Times a transfer may be cut in a row.
const MAX_CUTS: u32 = 5;
/// Bytes after which a cut is a new trouble and no longer the same.
const PROGRESS: u64 = 1 << 20;

/// A document as it came.
pub struct Fetched {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its Content-Type; empty: none.
    pub content_type: String,
    /// Its digest, computed.
    pub digest: Digest,
}

/// What is known of a document before it comes.
#[derive(Debug, Clone, Copy)]
pub enum Expected {
    /// Nothing: it was asked for by a tag.
    Anything,
    /// Its digest: it was asked for by that.
    Digest(Digest),
    /// Both, from a descriptor.
    Blob(Blob),
}

/// Where an image comes from, during one pull.
pub struct Origin {
    http: Http,
    endpoints: Vec<Endpoint>,
    /// The one that worked last; the others follow in their order.
    current: AtomicUsize,
}

impl Origin {
    /// `endpoints`: at least one, the best first.
    pub fn new(http: Http, endpoints: Vec<Endpoint>) -> Self {
        Self { http, endpoints, current: AtomicUsize::new(0) }
    }

    /// Endpoints in the order in which they are tried now.
    fn order(&self) -> Vec<usize> {
        let current = self.current.load(Ordering::Relaxed);
        std::iter::once(current).chain((0..self.endpoints.len()).filter(|&i| i != current)).collect()
    }

    /// A manifest by tag or digest; digest and size are checked where they are known.
    pub async fn manifest(&self, name: &str, expected: Expected, limit: u64) -> Result<Fetched, RegistryError> {
        let mut failed = Vec::new();
        for index in self.order() {
            let endpoint = &self.endpoints[index];
            match self.manifest_from(endpoint, name, expected, limit).await {
                Ok(fetched) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(fetched);
                }
                Err(error) => failed.push(error),
            }
        }
        Err(all_failed(failed))
    }

    async fn manifest_from(&self, endpoint: &Endpoint, name: &str, expected: Expected, limit: u64) -> Result<Fetched, RegistryError> {
        // registries.conf may have given the tag another name; a digest is the same everywhere.
        let name = endpoint.source.tag.as_deref().filter(|_| matches!(expected, Expected::Anything)).unwrap_or(name);
        let what = format!("manifest {name} of {}", endpoint.source.repository);
        let response = endpoint.get(&self.http, &format!("manifests/{name}"), &what, ACCEPT, 0).await?;
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or("").to_string();
        let bytes = self.http.body(response, limit, &endpoint.source.host, &what).await?;
        let digest = Digest::of(&bytes);
        check(endpoint, &what, expected, digest, bytes.len())?;
        Ok(Fetched { bytes, content_type, digest })
    }

    /// A small blob, whole. Its size was checked to be one that we hold in memory.
    pub async fn blob(&self, blob: Blob, what: &str) -> Result<Vec<u8>, RegistryError> {
        let mut failed = Vec::new();
        for index in self.order() {
            match self.blob_from(&self.endpoints[index], blob, what).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => failed.push(error),
            }
        }
        Err(all_failed(failed))
    }

    async fn blob_from(&self, endpoint: &Endpoint, blob: Blob, what: &str) -> Result<Vec<u8>, RegistryError> {
        let response = endpoint.get(&self.http, &format!("blobs/{}", blob.digest), what, "*/*", 0).await?;
        let bytes = self.http.body(response, blob.size, &endpoint.source.host, what).await?;
        check(endpoint, what, Expected::Blob(blob), Digest::of(&bytes), bytes.len())?;
        Ok(bytes)
    }

    /// Sends a blob's bytes, each once and in order, whatever happens to connections. Exactly `blob.size` of them; the digest
    /// is the receiver's to check.
    pub async fn stream(&self, blob: Blob, what: &str, to: &mpsc::Sender<Piece>) -> Result<(), RegistryError> {
        let mut at = 0;
        let mut failed = Vec::new();
        for index in self.order() {
            match self.stream_from(&self.endpoints[index], blob, what, to, &mut at).await {
                Ok(()) => return Ok(()),
                Err(error @ RegistryError::Abandoned { .. }) => return Err(error),
                Err(error) => failed.push(error),
            }
        }
        Err(all_failed(failed))
    }

    async fn stream_from(&self, endpoint: &Endpoint, blob: Blob, what: &str, to: &mpsc::Sender<Piece>, at: &mut u64) -> Result<(), RegistryError> {
        let host = &endpoint.source.host;
        let mut cuts = 0;
        let path = format!("blobs/{}", blob.digest);
        loop {
            let began = *at;
            let mut response = match endpoint.get(&self.http, &path, what, "*/*", *at).await {
                // It knows ranges, but not this one: from the beginning then.
                Err(RegistryError::Status { status: 416, .. }) if *at > 0 => endpoint.get(&self.http, &path, what, "*/*", 0).await?,
                // It was there a moment ago: it is started anew, or the network is away for a while.
                Err(RegistryError::Unreachable { .. }) if (1..=MAX_CUTS).contains(&cuts) => {
                    cuts += 1;
                    tokio::time::sleep(backoff(cuts)).await;
                    continue;
                }
                answer => answer?,
            };
            let mut skip = skipped(endpoint, &response, blob, what, *at)?;
            loop {
                let piece = match self.http.chunk(&mut response, host, what).await {
                    Ok(Some(piece)) => piece,
                    // Cut: by a clean end too early or by an error, it is the same to us.
                    Ok(None) | Err(RegistryError::Unreachable { .. }) => break,
                    Err(error) => return Err(error),
                };
                let bytes = piece.as_ref().len();
                let skip_now = skip.min(bytes as u64) as usize;
                skip -= skip_now as u64;
                if *at + (bytes - skip_now) as u64 > blob.size {
                    return Err(RegistryError::TooLarge { host: host.clone(), what: what.into(), limit: blob.size });
                }
                if bytes > skip_now {
                    *at += (bytes - skip_now) as u64;
                    to.send(piece.cut(skip_now, bytes)).await.map_err(|_| RegistryError::Abandoned { what: what.into() })?;
                }
            }
            if *at == blob.size {
                return Ok(());
            }
            cuts = if *at - began >= PROGRESS { 1 } else { cuts + 1 };
            if cuts > MAX_CUTS {
                return Err(RegistryError::Cut { host: host.clone(), what: what.into(), at: *at });
            }
            tokio::time::sleep(backoff(cuts)).await;
        }
    }
}

/// How many bytes of an answer we have already, asked for from byte `at` on: none when the registry gave a part (and the right
/// one), all of them when it starts again.
fn skipped(endpoint: &Endpoint, response: &Response, blob: Blob, what: &str, at: u64) -> Result<u64, RegistryError> {
    let mismatch =
        |actual: String, expected: String| RegistryError::Mismatch { host: endpoint.source.host.clone(), what: what.into(), actual, expected };
    if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response.headers().get(header::CONTENT_RANGE).and_then(|r| r.to_str().ok()).unwrap_or("");
        let start = range.strip_prefix("bytes ").and_then(|r| r.split('-').next()).and_then(|s| s.parse::<u64>().ok());
        return if start == Some(at) && at > 0 { Ok(0) } else { Err(mismatch(format!("range {range:?}"), format!("one from byte {at}"))) };
    }
    match response.content_length() {
        Some(length) if length != blob.size => Err(mismatch(format!("{length} bytes"), blob.size.to_string())),
        _ => Ok(at),
    }
}

fn check(endpoint: &Endpoint, what: &str, expected: Expected, digest: Digest, size: usize) -> Result<(), RegistryError> {
    let mismatch =
        |actual: String, expected: String| Err(RegistryError::Mismatch { host: endpoint.source.host.clone(), what: what.into(), actual, expected });
    match expected {
        Expected::Digest(known) | Expected::Blob(Blob { digest: known, .. }) if known != digest => {
            mismatch(format!("digest {digest}"), known.to_string())
        }
        Expected::Blob(blob) if blob.size != size as u64 => mismatch(format!("{size} bytes"), blob.size.to_string()),
        _ => Ok(()),
    }
}

/// One error from those of all sources: the last is the registry's own.
fn all_failed(mut failed: Vec<RegistryError>) -> RegistryError {
    let last = failed.pop().unwrap_or(RegistryError::Abandoned { what: "an image without sources".into() });
    if failed.is_empty() {
        return last;
    }
    let before: Vec<String> = failed.iter().map(|error| Chain(error).to_string()).collect();
    RegistryError::AllFailed { before: before.join("; "), source: Box::new(last) }
}
