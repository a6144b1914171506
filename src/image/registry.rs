//! The client side of the distribution API (opencontainers/distribution-spec, "Pull"): requests with their credentials,
//! redirects and retries.
//!
//! An [`Endpoint`] is one registry as one pull sees it. Credentials are shown to its own origin and to the token service it
//! names, never to where a redirect leads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::auth::{self, AuthError, Credentials, Grant, Keyring, Tokens};
use super::http::{Http, backoff, retry_after, set};
use super::registries::Source;
use super::transport::TransportError;
use crate::errchain::{Kind, Kinded};

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 10;
/// Times one request is sent when the registry is busy or breaks the connection.
const MAX_ATTEMPTS: u32 = 5;
/// Bytes of an error's or a token's body.
const MAX_BODY: u64 = 1 << 20;

/// Why a registry did not give what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or it broke before an answer.
    #[error("cannot reach registry {host}{hint}")]
    Unreachable {
        /// Which.
        host: String,
        /// What may help; empty: nothing known.
        hint: &'static str,
        /// Why.
        source: reqwest::Error,
    },
    /// Nothing came for too long.
    #[error("no progress for {seconds} s in {stage} from {host}")]
    Stalled {
        /// What was waited for.
        stage: String,
        /// From whom.
        host: String,
        /// How long.
        seconds: u64,
    },
    /// It answered with an error.
    #[error("registry {host} answers {status} for {what}{message}")]
    Status {
        /// Which.
        host: String,
        /// For what.
        what: String,
        /// The HTTP status.
        status: u16,
        /// `: ` and what it says about it; or empty.
        message: String,
    },
    /// It wants credentials, others than there are.
    #[error("registry {host} refuses access to {what}: {why}")]
    Unauthorized {
        /// Which.
        host: String,
        /// For what.
        what: String,
        /// What is wrong with ours.
        why: &'static str,
    },
    /// It sends us where we don't go.
    #[error("registry {host} redirects {what} wrongly: {why}")]
    Redirect {
        /// Which.
        host: String,
        /// For what.
        what: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A token can't be had.
    #[error("cannot get a token for registry {host} from {realm:?}: {why}")]
    Token {
        /// For which.
        host: String,
        /// From whom.
        realm: String,
        /// What is wrong.
        why: &'static str,
    },
    /// It wants credentials, and looking for them failed.
    #[error("registry {host} asks for credentials for {what}, which cannot be had")]
    Credentials {
        /// Which.
        host: String,
        /// For what.
        what: String,
        /// Why.
        source: AuthError,
    },
    /// No client for it.
    #[error("cannot set up a connection to registry {host}")]
    Client {
        /// Which.
        host: String,
        /// Why.
        source: TransportError,
    },
    /// What came is larger, smaller or other than the manifest says.
    #[error("registry {host} sends {what} with {actual}, not {expected}")]
    Mismatch {
        /// Which.
        host: String,
        /// What was asked.
        what: String,
        /// What came.
        actual: String,
        /// What should have.
        expected: String,
    },
    /// More than we take.
    #[error("registry {host} sends more than {limit} bytes for {what}")]
    TooLarge {
        /// Which.
        host: String,
        /// For what.
        what: String,
        /// The bound.
        limit: u64,
    },
    /// A transfer was cut too often.
    #[error("registry {host} cuts {what} at byte {at} again and again")]
    Cut {
        /// Which.
        host: String,
        /// What.
        what: String,
        /// Where.
        at: u64,
    },
    /// Who was to take the bytes is gone: its own error says why.
    #[error("nobody takes the bytes of {what}")]
    Abandoned {
        /// Of what.
        what: String,
    },
    /// Mirrors failed, then the registry itself.
    #[error("no source of the image works; before the last: {before}")]
    AllFailed {
        /// The errors of those tried first.
        before: String,
        /// That of the last.
        source: Box<RegistryError>,
    },
}

impl Kinded for RegistryError {
    fn kind(&self) -> Kind {
        match self {
            RegistryError::Unreachable { .. } | RegistryError::Cut { .. } => Kind::Unavailable,
            RegistryError::Stalled { .. } => Kind::DeadlineExceeded,
            RegistryError::Status { status: 401, .. } | RegistryError::Unauthorized { .. } => Kind::Unauthenticated,
            RegistryError::Status { status: 403, .. } => Kind::PermissionDenied,
            RegistryError::Status { status: 404, .. } => Kind::NotFound,
            RegistryError::Status { status, .. } if *status == 429 || *status >= 500 => Kind::Unavailable,
            RegistryError::Token { .. } => Kind::Unavailable,
            RegistryError::TooLarge { .. } => Kind::ResourceExhausted,
            RegistryError::Abandoned { .. } => Kind::Aborted,
            RegistryError::AllFailed { source, .. } => source.kind(),
            RegistryError::Credentials { source, .. } => source.kind(),
            RegistryError::Client { .. } | RegistryError::Redirect { .. } | RegistryError::Mismatch { .. } | RegistryError::Status { .. } => {
                Kind::FailedPrecondition
            }
        }
    }
}

/// A registry with a repository of it, for the length of a pull.
pub struct Endpoint {
    pub(super) source: Source,
    keyring: Arc<Keyring>,
    /// What the keyring has for it, looked up when it is asked for.
    credentials: OnceCell<Option<Credentials>>,
    tokens: Arc<Tokens>,
    /// HTTPS did not work and need not.
    plain: AtomicBool,
    access: Mutex<Access>,
}

/// What the last challenge led to; `round` counts them.
#[derive(Default, Clone)]
struct Access {
    header: Option<String>,
    /// The header has a token that an earlier pull was given.
    kept: bool,
    round: u64,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Endpoint {
    /// A source, the credentials that there may be for it, and the tokens of earlier pulls.
    pub fn new(source: Source, keyring: Arc<Keyring>, tokens: Arc<Tokens>) -> Self {
        Self { source, keyring, credentials: OnceCell::new(), tokens, plain: AtomicBool::new(false), access: Mutex::default() }
    }

    /// Gets `path` of the repository (`manifests/…`, `blobs/…`) from byte `from` on. The answer is a success.
    pub(super) async fn get(&self, http: &Http, path: &str, what: &str, accept: &str, from: u64) -> Result<Response, RegistryError> {
        let mut challenged = false;
        let mut attempts = 0;
        loop {
            let scheme = if self.plain.load(Ordering::Relaxed) { "http" } else { "https" };
            let url = self.url(&format!("{scheme}://{}/v2/{}/{path}", self.source.host, self.source.repository), what)?;
            let access = self.access.lock().await.clone();
            let mut headers = HeaderMap::new();
            set(&mut headers, header::ACCEPT, accept);
            if from > 0 {
                set(&mut headers, header::RANGE, &format!("bytes={from}-"));
            }
            let answer = self.follow(http, url, headers, access.header.as_deref(), what).await;
            attempts += 1;
            let (response, own) = match answer {
                // Nothing was sent but a handshake: no credentials have been shown to anybody.
                Err(RegistryError::Unreachable { source, .. }) if source.is_connect() && self.source.insecure && scheme == "https" => {
                    self.plain.store(true, Ordering::Relaxed);
                    attempts = 0;
                    continue;
                }
                Err(RegistryError::Unreachable { source, .. }) if !source.is_connect() && !source.is_builder() && attempts < MAX_ATTEMPTS => {
                    tokio::time::sleep(backoff(attempts)).await;
                    continue;
                }
                Err(error) => return Err(error),
                Ok(answer) => answer,
            };
            match response.status() {
                StatusCode::UNAUTHORIZED if own => {
                    let now = self.access.lock().await;
                    // Another layer's request may have renewed the token meanwhile.
                    if now.round == access.round {
                        if challenged && !now.kept {
                            return Err(self.unauthorized(what, "the credentials given are not accepted"));
                        }
                        self.authorize(http, now, &response, what).await?;
                        challenged = true;
                    }
                }
                status if is_busy(status) && attempts < MAX_ATTEMPTS => {
                    tokio::time::sleep(retry_after(response.headers()).unwrap_or_else(|| backoff(attempts))).await;
                }
                status if status.is_success() => return Ok(response),
                status => {
                    let message = http.error_message(response).await;
                    return Err(RegistryError::Status { host: self.source.host.clone(), what: what.into(), status: status.as_u16(), message });
                }
            }
        }
    }

    fn url(&self, text: &str, what: &str) -> Result<Url, RegistryError> {
        Url::parse(text).map_err(|_| RegistryError::Redirect { host: self.source.host.clone(), what: what.into(), why: "the address is no URL" })
    }

    fn unauthorized(&self, what: &str, why: &'static str) -> RegistryError {
        RegistryError::Unauthorized { host: self.source.host.clone(), what: what.into(), why }
    }

    /// Sends a request and follows redirects. Beside the answer: whether our own origin gave it.
    async fn follow(
        &self,
        http: &Http,
        first: Url,
        headers: HeaderMap,
        authorization: Option<&str>,
        what: &str,
    ) -> Result<(Response, bool), RegistryError> {
        let wrong = |why| RegistryError::Redirect { host: self.source.host.clone(), what: what.into(), why };
        let origin = first.origin();
        let mut url = first;
        for _ in 0..=MAX_REDIRECTS {
            let own = url.origin() == origin;
            let mut headers = headers.clone();
            if let Some(authorization) = authorization.filter(|_| own) {
                set(&mut headers, header::AUTHORIZATION, authorization);
            }
            let response = http.send(reqwest::Method::GET, &url, headers, None, self.source.insecure, what).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, own));
            }
            let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).ok_or_else(|| wrong("it names no place"))?;
            let next = url.join(location).map_err(|_| wrong("the place is no URL"))?;
            match next.scheme() {
                "https" => {}
                "http" if url.scheme() == "http" || self.source.insecure => {}
                "http" => return Err(wrong("from HTTPS to plain HTTP")),
                _ => return Err(wrong("the place is not on the web")),
            }
            url = next;
        }
        Err(wrong("more than 10 times"))
    }

    /// Answers a challenge: from now on requests carry what it asks for.
    async fn authorize(
        &self,
        http: &Http,
        mut access: tokio::sync::MutexGuard<'_, Access>,
        response: &Response,
        what: &str,
    ) -> Result<(), RegistryError> {
        let headers = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenges: Vec<_> = headers.iter().filter_map(|h| h.to_str().ok()).flat_map(auth::challenges).collect();
        let lookup = self.credentials.get_or_try_init(|| self.keyring.credentials(&self.source)).await;
        let fail = |source| RegistryError::Credentials { host: self.source.host.clone(), what: what.into(), source };
        let credentials = lookup.map_err(fail)?.as_ref();
        let user = credentials.and_then(Credentials::user_and_password);
        let refused = access.header.take();
        access.kept = false;
        let header = if let Some(bearer) = challenges.iter().find(|c| c.scheme == "bearer") {
            match credentials.map(|c| c.registry_token.as_str()).filter(|t| !t.is_empty()) {
                Some(token) => format!("Bearer {token}"),
                None => {
                    let (token, kept) = self.token(http, bearer, credentials, refused.as_deref(), what).await?;
                    access.kept = kept;
                    format!("Bearer {token}")
                }
            }
        } else if challenges.iter().any(|c| c.scheme == "basic") {
            let (user, password) = user.ok_or_else(|| self.unauthorized(what, "it asks for a user and a password, and none were given"))?;
            auth::basic(&user, &password)
        } else {
            return Err(self.unauthorized(what, "it asks for no credentials that we could give"));
        };
        access.header = Some(header);
        access.round += 1;
        Ok(())
    }

    /// A token: one that is still good, or a new one (distribution's "Token Authentication Specification"; with an identity token
    /// its OAuth2 form). `refused`: the header with the last one. Beside it: whether it is of an earlier pull.
    async fn token(
        &self,
        http: &Http,
        challenge: &auth::Challenge,
        credentials: Option<&Credentials>,
        refused: Option<&str>,
        what: &str,
    ) -> Result<(String, bool), RegistryError> {
        let realm = challenge.parameter("realm").unwrap_or("");
        let fail = |why| RegistryError::Token { host: self.source.host.clone(), realm: realm.chars().take(200).collect(), why };
        let mut url = Url::parse(realm).map_err(|_| fail("it is no URL"))?;
        let plain = self.plain.load(Ordering::Relaxed) || self.source.insecure;
        if url.scheme() != "https" && !(url.scheme() == "http" && plain) {
            return Err(fail("it is not served by HTTPS"));
        }
        let scope = challenge.parameter("scope").map_or_else(|| format!("repository:{}:pull", self.source.repository), str::to_string);
        let service = challenge.parameter("service").unwrap_or("").to_string();
        let grant = Grant { realm: realm.into(), service: service.clone(), scope: scope.clone(), credentials: credentials.cloned() };
        if let Some(refused) = refused.and_then(|header| header.strip_prefix("Bearer ")) {
            self.tokens.forget(refused);
        }
        if let Some(token) = self.tokens.get(&grant) {
            return Ok((token, true));
        }
        let mut fields = vec![("scope", scope)];
        if !service.is_empty() {
            fields.push(("service", service));
        }
        let mut headers = HeaderMap::new();
        let user = credentials.and_then(Credentials::user_and_password);
        let identity = credentials.map(|c| c.identity_token.clone()).filter(|t| !t.is_empty());
        let known = identity.is_some() || user.is_some();
        let (method, body) = if let Some(identity) = identity {
            fields.extend([("grant_type", "refresh_token".into()), ("client_id", "copepod".into()), ("refresh_token", identity)]);
            set(&mut headers, header::CONTENT_TYPE, "application/x-www-form-urlencoded");
            let mut form = url.clone();
            form.query_pairs_mut().clear().extend_pairs(&fields);
            (reqwest::Method::POST, Some(form.query().unwrap_or("").to_string()))
        } else {
            if let Some((user, password)) = user {
                set(&mut headers, header::AUTHORIZATION, &auth::basic(&user, &password));
                fields.push(("account", user));
            }
            url.query_pairs_mut().extend_pairs(&fields);
            (reqwest::Method::GET, None)
        };
        let mut attempts = 0;
        let response = loop {
            let response = http.send(method.clone(), &url, headers.clone(), body.clone(), self.source.insecure, "token").await?;
            attempts += 1;
            if attempts == MAX_ATTEMPTS || !is_busy(response.status()) {
                break response;
            }
            tokio::time::sleep(retry_after(response.headers()).unwrap_or_else(|| backoff(attempts))).await;
        };
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if known => {
                return Err(self.unauthorized(what, "the credentials given are not accepted"));
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.unauthorized(what, "it asks for credentials, and none were given")),
            _ => return Err(fail("it answers with an error")),
        }
        let body = http.body(response, MAX_BODY, &self.source.host, "token").await?;
        let answer: Token = serde_json::from_slice(&body).map_err(|_| fail("its answer is no token"))?;
        let token = answer.token.filter(|t| !t.is_empty()).or(answer.access_token).unwrap_or_default();
        // What can't stand in a header is no token.
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(fail("its answer is no token"));
        }
        self.tokens.put(grant, &token, answer.expires_in);
        Ok((token, false))
    }
}

/// Whether the same request may be answered otherwise a little later.
fn is_busy(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 429)
}
