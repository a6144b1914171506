//! Image references as people write them, and the one form in which we keep them.
//!
//! The grammar is the distribution project's (`reference.go`), the defaults are Docker's: `busybox` is
//! `docker.io/library/busybox:latest`. Parsed by hand: this runs on every ImageStatus.

use std::fmt;
use std::net::Ipv6Addr;

use super::digest::{BadDigest, Digest};
use super::error::ImageError;

/// Bytes of a reference; more is refused unread.
const MAX_REFERENCE: usize = 1024;
/// Bytes of a host with its port.
const MAX_DOMAIN: usize = 255 + 6;
/// Bytes of a repository's name, as the distribution specification has it.
const MAX_PATH: usize = 255;
/// Bytes of a tag.
const MAX_TAG: usize = 128;

/// A normalised reference. With a digest the tag is only what somebody wrote beside it; without one there is always a tag.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is no reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadReference {
    /// Nothing is left to name a repository.
    #[error("it names no repository")]
    Empty,
    /// A part is longer than it may be.
    #[error("its {part} is longer than {limit} bytes")]
    TooLong {
        /// Which part.
        part: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The registry's host is none.
    #[error("registry host {0:?} is not a host name or address with an optional port")]
    Domain(String),
    /// A component of the repository is not allowed.
    #[error("repository component {0:?} is not lower case letters and digits, separated by one of . _ __ or dashes")]
    Component(String),
    /// The tag is not allowed.
    #[error("tag {0:?} is not letters, digits, _ . - (not first: . -)")]
    Tag(String),
    /// The digest is not allowed.
    #[error("its digest cannot be used")]
    Digest {
        /// Why.
        source: BadDigest,
    },
    /// 64 hexadecimal digits name an image by its id, not a repository.
    #[error("64 hexadecimal digits are an image id, which names no repository")]
    Id,
}

impl Reference {
    /// Parses and normalises.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        Self::parse_parts(text).map_err(|source| ImageError::Reference { reference: text.chars().take(300).collect(), source })
    }

    fn parse_parts(text: &str) -> Result<Self, BadReference> {
        if text.len() > MAX_REFERENCE {
            return Err(BadReference::TooLong { part: "text", limit: MAX_REFERENCE });
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(|source| BadReference::Digest { source })?)),
            None => (text, None),
        };
        // A colon after the last slash starts the tag; before it, a port.
        let tag_at = rest.rfind(':').filter(|&colon| !rest[colon..].contains('/'));
        let (name, tag) = match tag_at {
            Some(colon) => (&rest[..colon], Some(&rest[colon + 1..])),
            None => (rest, None),
        };
        let is_id = |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_id(name) || (name == "sha256" && tag.is_some_and(is_id)) {
            return Err(BadReference::Id);
        }
        let (domain, path) = match name.split_once('/') {
            Some((first, path)) if is_domain(first) => (if first == "index.docker.io" { "docker.io" } else { first }, path),
            _ => ("docker.io", name),
        };
        let path = if domain == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path.to_string() };
        check_domain(domain)?;
        check_path(&path)?;
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_string()),
            (None, None) => Some("latest".to_string()),
            (None, Some(_)) => None,
        };
        Ok(Self { domain: domain.to_string(), path, tag, digest })
    }

    /// The registry as written, for example `docker.io` or `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository in the registry, for example `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest; it wins over the tag.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// `domain/path@digest`.
    pub fn with_digest(&self, digest: Digest) -> String {
        format!("{}/{}@{digest}", self.domain, self.path)
    }
}

/// `domain/path:tag`, or `domain/path@digest` where there is a digest: what the store keeps. A tag beside a digest is not
/// shown, since it was never looked up.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

/// Whether a reference names no registry. Asked of what [`Reference::parse`] takes.
pub(super) fn is_short(text: &str) -> bool {
    let name = text.split('@').next().unwrap_or("");
    name.split_once('/').is_none_or(|(first, _)| !is_domain(first))
}

/// Whether what stands before the first slash is a registry and not the first component of a repository on docker.io.
pub(super) fn is_domain(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// Checks `host`, `host:port`, `[v6]` or `[v6]:port`.
pub(super) fn check_domain(domain: &str) -> Result<(), BadReference> {
    let bad = || BadReference::Domain(domain.chars().take(100).collect());
    if domain.len() > MAX_DOMAIN {
        return Err(BadReference::TooLong { part: "registry host", limit: MAX_DOMAIN });
    }
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<Ipv6Addr>().map_err(|_| bad())?;
            (None, if after.is_empty() { None } else { Some(after.strip_prefix(':').ok_or_else(bad)?) })
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    if let Some(host) = host {
        let label = |l: &str| {
            (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !l.starts_with('-') && !l.ends_with('-')
        };
        if !host.split('.').all(label) {
            return Err(bad());
        }
    }
    match port {
        Some(port) if !(1..=5).contains(&port.len()) || !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err() => Err(bad()),
        _ => Ok(()),
    }
}

/// Checks every component of a repository.
pub(super) fn check_path(path: &str) -> Result<(), BadReference> {
    if path.is_empty() || path == "library/" {
        return Err(BadReference::Empty);
    }
    if path.len() > MAX_PATH {
        return Err(BadReference::TooLong { part: "repository", limit: MAX_PATH });
    }
    match path.split('/').find(|component| !is_component(component)) {
        Some(component) => Err(BadReference::Component(component.chars().take(100).collect())),
        None => Ok(()),
    }
}

fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes.split(|&b| alphanumeric(b)).filter(|run| !run.is_empty()).all(|run| matches!(run, b"." | b"_" | b"__") || run.iter().all(|&b| b == b'-'))
}

pub(super) fn check_tag(tag: &str) -> Result<(), BadReference> {
    if tag.len() > MAX_TAG {
        return Err(BadReference::TooLong { part: "tag", limit: MAX_TAG });
    }
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let fits = tag.bytes().next().is_some_and(word) && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if fits { Ok(()) } else { Err(BadReference::Tag(tag.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_are_normalised() {
        let check = |text: &str, expected: &str| assert_eq!(Reference::parse(text).unwrap().to_string(), expected, "{text}");
        check("busybox", "docker.io/library/busybox:latest");
        check("busybox:1.36", "docker.io/library/busybox:1.36");
        check("user/app", "docker.io/user/app:latest");
        check("docker.io/busybox", "docker.io/library/busybox:latest");
        check("index.docker.io/library/busybox:x", "docker.io/library/busybox:x");
        check("localhost/app", "localhost/app:latest");
        check("localhost:5000/app:v1", "localhost:5000/app:v1");
        check("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10");
        check("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest");
        check("[::1]:5000/a", "[::1]:5000/a:latest");
        check("[fe80::1]/a:t", "[fe80::1]/a:t");
        check("UPPER/app", "UPPER/app:latest");
        check("a/b__c/d--e/f.g:T_a.g-", "docker.io/a/b__c/d--e/f.g:T_a.g-");
        check(&format!("busybox@{D}"), &format!("docker.io/library/busybox@{D}"));
        check(&format!("reg.io:443/a:tag@{D}"), &format!("reg.io:443/a@{D}"));
        check(&format!("a:{}", "t".repeat(128)), &format!("docker.io/library/a:{}", "t".repeat(128)));
        let both = Reference::parse(&format!("reg.io/a:tag@{D}")).unwrap();
        assert_eq!((both.tag(), both.digest()), (Some("tag"), Some(Digest::of(b""))));
        assert_eq!(Reference::parse(&format!("reg.io/a@{D}")).unwrap().tag(), None);
    }

    #[test]
    fn short_names_name_no_registry() {
        let check = |text: &str, short: bool| assert_eq!(is_short(text), short, "{text}");
        check("busybox", true);
        check("busybox:1.36", true);
        check(&format!("user/app:v1@{D}"), true);
        check("docker.io", true);
        check("docker.io/busybox", false);
        check("localhost/app", false);
        check("localhost:5000/app", false);
        check("reg:5000/app", false);
        check("UPPER/app", false);
        check("a.b/c", false);
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = "a".repeat(256);
        let id = &D[7..];
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "a/B",
            "a:",
            ":a",
            "@",
            "a@",
            "a b",
            "a\n",
            "ä",
            "a:ä",
            "a:-x",
            "a:.x",
            "a@sha256:",
            "a@sha512:00",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a/.b",
            "a/..",
            "../a",
            "reg.io:/a",
            "reg.io:x/a",
            "reg.io:99999/a",
            "reg..io/a",
            "-reg.io/a",
            "reg-.io/a",
            "[::1/a",
            "[x]:5/a",
            "[::1]5000/a",
            "http://reg.io/a",
            "user@reg.io/a",
            "reg.io/a?b",
            "reg.io/a#b",
            "reg.io/%61",
            "docker.io/",
            "docker.io",
            "library/",
            id,
            D,
        ] {
            if bad == "docker.io" {
                // Odd but allowed by the grammar: a repository on Docker Hub.
                assert_eq!(Reference::parse(bad).unwrap().to_string(), "docker.io/library/docker.io:latest");
                continue;
            }
            assert!(Reference::parse(bad).is_err(), "{bad:?}: {:?}", Reference::parse(bad));
        }
        for bad in
            [&long, &format!("a:{}", "t".repeat(129)), &format!("{}.io/a", "x".repeat(64)), &"a/".repeat(600), &format!("a@{}", D.to_uppercase())]
        {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
    }
}
