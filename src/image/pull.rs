//! A pull: from a reference to a published image.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::Config;
use super::auth::{Credentials, Keyring, Tokens};
use super::config::Blob as ConfigBlob;
use super::digest::Digest;
use super::download::{Expected, Fetched, Origin};
use super::error::{ImageError, PullError};
use super::http::{Http, Piece};
use super::manifest::{self, Blob, Document};
use super::reference::Reference;
use super::registries::Registries;
use super::registry::{Endpoint, RegistryError};
use super::store::{self, NewImage, Pins, Store};
use super::transport::Transport;
use super::unpack::{self, Pieces, UnpackError, Unpacked};
use super::{Image, Limits};

/// Lists that lead to lists.
const MAX_INDEXES: usize = 3;
/// Pieces of a layer that wait for its unpacking; each is what one read of the connection gave (up to some 100 KiB).
const WAITING_PIECES: usize = 16;

/// Layers being fetched, by diff id: whoever wants the same one waits for the first.
#[derive(Default)]
pub(super) struct InFlight(Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>);

impl InFlight {
    fn of(&self, diff_id: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        layers.retain(|_, layer| layer.strong_count() > 0);
        if let Some(layer) = layers.get(&diff_id).and_then(Weak::upgrade) {
            return layer;
        }
        let layer = Arc::default();
        layers.insert(diff_id, Arc::downgrade(&layer));
        layer
    }
}

/// What a pull is to bring, and on whose behalf.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) reference: Reference,
    /// The request's credentials.
    pub(super) auth: Option<Credentials>,
    /// The pod's namespace; empty: unknown.
    pub(super) namespace: String,
}

/// What all pulls share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) store: Arc<Store>,
    pub(super) in_flight: Arc<InFlight>,
    pub(super) tokens: Arc<Tokens>,
}

/// Where an image comes from, with the credentials that go there.
fn origin(config: &Config, order: &Order, registries: &Registries, tokens: &Arc<Tokens>) -> Result<Origin, PullError> {
    let sources = registries.sources(&order.reference).map_err(|source| PullError::Registries { source })?;
    let namespace_dir = config.namespace_auth_dir.as_ref().filter(|_| !order.namespace.is_empty());
    let keyring = Arc::new(Keyring {
        given: order.auth.clone(),
        domain: order.reference.domain().to_string(),
        namespace_file: namespace_dir.map(|dir| dir.join(format!("{}.json", order.namespace))),
        files: config.auth_files.clone(),
        helpers: registries.credential_helpers(),
        helper_timeout: config.credential_helper_timeout,
    });
    let transport = Transport::new(&config.certs_dirs, config.progress_timeout);
    let endpoints = sources.into_iter().map(|source| Endpoint::new(source, Arc::clone(&keyring), Arc::clone(tokens)));
    Ok(Origin::new(Http::new(transport, config.progress_timeout), endpoints.collect()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.map_err(|source| PullError::Thread { source })
}

/// Pulls an image.
pub(super) async fn run(shared: Shared, registries: Arc<Registries>, order: Order) -> Result<Arc<Image>, PullError> {
    let Shared { store, in_flight, tokens } = shared;
    let config = &store.config;
    let origin = Arc::new(origin(config, &order, &registries, &tokens)?);
    let reference = order.reference;
    let (top, manifest, config_blob, layers) = resolve(&origin, &reference, config).await?;
    let text = match store.config_text(config_blob.digest) {
        Some(text) => text,
        None => utf8(origin.blob(config_blob, "image configuration").await.map_err(|source| PullError::Registry { source })?)?,
    };
    let parsed = ConfigBlob::parse(text.as_bytes()).map_err(|source| PullError::Config { source })?;
    let diff_ids = parsed.diff_ids().to_vec();
    if diff_ids.len() != layers.len() {
        return Err(PullError::LayerCount { manifest: layers.len(), config: diff_ids.len() });
    }
    let fetched = fetch_layers(&store, &in_flight, &origin, &layers, &diff_ids).await?;
    let new = NewImage {
        reference,
        id: config_blob.digest,
        config: text,
        manifest: utf8(manifest.bytes)?,
        manifest_digest: manifest.digest,
        top_digest: top,
    };
    blocking(move || {
        for (diff_id, (_, implied)) in &fetched {
            let Some(at) = diff_ids.iter().position(|d| d == diff_id).filter(|_| !implied.is_empty()) else { continue };
            let below: Vec<Digest> = diff_ids[..at].iter().rev().copied().collect();
            store.settle(*diff_id, implied, &below).map_err(|source| PullError::Store { source: Box::new(source) })?;
        }
        store.publish(new, parsed).map_err(|source| PullError::Store { source: Box::new(source) })
    })
    .await?
}

fn utf8(bytes: Vec<u8>) -> Result<String, PullError> {
    String::from_utf8(bytes).map_err(|source| PullError::Text { source })
}

type Resolved = (Digest, Fetched, Blob, Vec<Blob>);

/// Follows a reference through lists to the manifest for our platform.
async fn resolve(origin: &Origin, reference: &Reference, config: &Config) -> Result<Resolved, PullError> {
    let limit = config.limits.manifest_bytes;
    let name = reference.digest().map_or_else(|| reference.tag().unwrap_or("latest").to_string(), |digest| digest.to_string());
    let known = reference.digest().map_or(Expected::Anything, Expected::Digest);
    let mut fetched = origin.manifest(&name, known, limit).await.map_err(|source| PullError::Registry { source })?;
    let top = fetched.digest;
    for _ in 0..MAX_INDEXES {
        let parsed = manifest::parse(&fetched.bytes, &fetched.content_type, &config.platform, &config.limits);
        match parsed.map_err(|source| PullError::Manifest { source })? {
            Document::Manifest { config, layers } => return Ok((top, fetched, config, layers)),
            Document::Index(blob) => {
                let next = origin.manifest(&blob.digest.to_string(), Expected::Blob(blob), limit).await;
                fetched = next.map_err(|source| PullError::Registry { source })?;
            }
        }
    }
    Err(PullError::Nested { limit: MAX_INDEXES })
}

/// Sees to it that every layer is on disk. The result pins them; with those unpacked now come the directories they imply.
async fn fetch_layers(
    store: &Arc<Store>,
    in_flight: &Arc<InFlight>,
    origin: &Arc<Origin>,
    layers: &[Blob],
    diff_ids: &[Digest],
) -> Result<HashMap<Digest, (Pins, Vec<String>)>, PullError> {
    let mut wanted: Vec<(Digest, Option<Blob>)> = Vec::new();
    for (layer, diff_id) in layers.iter().zip(diff_ids) {
        if !wanted.iter().any(|(other, _)| other == diff_id) {
            wanted.push((*diff_id, Some(*layer)));
        }
    }
    if wanted.is_empty() {
        wanted.push((store::empty_layer(), None));
    }
    // The largest first: it decides how long all of it takes.
    wanted.sort_by_key(|(_, blob)| std::cmp::Reverse(blob.map_or(0, |blob| blob.size)));
    let slots = Arc::new(Semaphore::new(store.config.max_parallel_layers.max(1)));
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut fetched = HashMap::new();
    for (diff_id, blob) in wanted {
        if let Some(pins) = store.pin(diff_id) {
            fetched.insert(diff_id, (pins, Vec::new()));
            continue;
        }
        let (store, in_flight, origin, slots) = (Arc::clone(store), Arc::clone(in_flight), Arc::clone(origin), Arc::clone(&slots));
        let mut stopped = stopped.clone();
        tasks.spawn(async move {
            let layer = in_flight.of(diff_id);
            // A closed semaphore is impossible: nobody closes it.
            let turn = async { (slots.acquire().await, layer.lock().await) };
            let _turn = tokio::select! { biased; () = heard(&mut stopped) => return Err(PullError::Vanished), turn = turn => turn };
            let done = match store.pin(diff_id) {
                Some(pins) => Ok((pins, Vec::new())),
                None => fetch_layer(&store, &origin, diff_id, blob, &mut stopped).await,
            };
            done.map(|done| (diff_id, done))
        });
    }
    // The first error stops the others, and they are waited for: then nothing of this pull is still at work on the disk.
    let mut failed = None;
    while let Some(done) = tasks.join_next().await {
        match done.map_err(|source| PullError::Thread { source }).and_then(|done| done) {
            Ok((diff_id, done)) => _ = fetched.insert(diff_id, done),
            Err(error) => {
                failed.get_or_insert(error);
                stop.send_replace(true);
            }
        }
    }
    failed.map_or(Ok(fetched), Err)
}

/// Returns when the pull is to stop.
async fn heard(stopped: &mut watch::Receiver<bool>) {
    // An error: the pull itself is gone, and with it this task.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Fetches and unpacks one layer in one pass. Without a blob: the layer of nothing.
async fn fetch_layer(
    store: &Arc<Store>,
    origin: &Origin,
    diff_id: Digest,
    blob: Option<Blob>,
    stopped: &mut watch::Receiver<bool>,
) -> Result<(Pins, Vec<String>), PullError> {
    let (to, mut from) = mpsc::channel::<Piece>(WAITING_PIECES);
    let worker = {
        let store = Arc::clone(store);
        tokio::task::spawn_blocking(move || match blob {
            Some(blob) => unpack_layer(&store, diff_id, Some(blob), &mut Pieces::new(|| from.blocking_recv())),
            None => {
                let mut nothing = Some([0u8; 1024]);
                unpack_layer(&store, diff_id, None, &mut Pieces::new(|| nothing.take()))
            }
        })
    };
    let streamed = match blob {
        Some(blob) => {
            let what = format!("layer {}", blob.digest);
            tokio::select! {
                biased;
                () = heard(stopped) => Err(RegistryError::Abandoned { what }),
                streamed = origin.stream(blob, &what, &to) => streamed,
            }
        }
        None => Ok(()),
    };
    drop(to);
    let unpacked = worker.await.map_err(|source| PullError::Thread { source })?;
    match (streamed, unpacked) {
        (Ok(()) | Err(RegistryError::Abandoned { .. }), unpacked) => unpacked,
        (Err(source), _) => Err(PullError::Registry { source }),
    }
}

/// The blocking half. It cleans up after itself, since nobody may be left to do so.
fn unpack_layer<B, F>(store: &Arc<Store>, diff_id: Digest, blob: Option<Blob>, pieces: &mut Pieces<B, F>) -> Result<(Pins, Vec<String>), PullError>
where
    B: AsRef<[u8]>,
    F: FnMut() -> Option<B>,
{
    let fail = |source| PullError::Store { source: Box::new(source) };
    let layer = blob.map_or(diff_id, |blob| blob.digest);
    let (name, directory) = store.begin_layer().map_err(fail)?;
    let unpacked = unpack_checked(directory, diff_id, blob, pieces, &store.config.limits)
        .map_err(|source| PullError::Layer { layer, source })
        .and_then(|unpacked| Ok((store.finish_layer(name.clone(), &unpacked).map_err(fail)?, unpacked.implied)));
    if unpacked.is_err() {
        store.abandon_layer(&name);
    }
    unpacked
}

/// Unpacks and checks that it is what the manifest and the configuration promise.
fn unpack_checked<B, F>(
    directory: std::os::fd::OwnedFd,
    diff_id: Digest,
    blob: Option<Blob>,
    pieces: &mut Pieces<B, F>,
    limits: &Limits,
) -> Result<Unpacked, UnpackError>
where
    B: AsRef<[u8]>,
    F: FnMut() -> Option<B>,
{
    let mismatch = |what, expected: String, actual: String| UnpackError::Mismatch { what, expected, actual };
    let came = |digest: Digest, bytes: u64| match blob {
        Some(blob) if bytes != blob.size => Err(mismatch("size", blob.size.to_string(), bytes.to_string())),
        Some(blob) if digest != blob.digest => Err(mismatch("digest", blob.digest.to_string(), digest.to_string())),
        _ => Ok(()),
    };
    match unpack::unpack(directory, pieces, limits) {
        Ok(unpacked) => {
            came(unpacked.compressed, unpacked.compressed_bytes)?;
            if unpacked.diff_id != diff_id {
                return Err(mismatch("diff id", diff_id.to_string(), unpacked.diff_id.to_string()));
            }
            Ok(unpacked)
        }
        // Garbage is better explained by its digest, if that is wrong: then the registry or the network is to blame.
        Err(error @ (UnpackError::Decompress { .. } | UnpackError::Archive { .. } | UnpackError::Cut)) => {
            let (digest, bytes) = pieces.drain();
            came(digest, bytes)?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Whether a pull failed because the disk is full: then what it left is of no use to the next try.
pub(super) fn is_full(error: &PullError) -> bool {
    matches!(error, PullError::Layer { source: UnpackError::File { source, .. }, .. } if is_enospc(source))
        || matches!(error, PullError::Store { source } if matches!(&**source, ImageError::Store { source, .. } if is_enospc(source)))
}

fn is_enospc(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
