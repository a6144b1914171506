//! Credentials: from a request, from auth files, from credential helpers; to whom they may be shown; what registries ask for.

mod file;
mod helper;
mod keyring;
mod token;

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

pub(super) use file::is_helper_name;
pub use keyring::AuthError;
pub(super) use keyring::Keyring;
pub(super) use token::{Grant, Tokens};

/// What the CRI's AuthConfig holds. Never printed.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// base64 of `user:password`, instead of the two.
    pub auth: String,
    /// The registry they are for: host, host:port or URL. Empty: the registry of the image.
    pub server_address: String,
    /// An OAuth2 refresh token.
    pub identity_token: String,
    /// A bearer token, used as it is.
    pub registry_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

/// Docker Hub's names for itself.
const HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

impl Credentials {
    /// Whether these may be shown to a host. They are for the address they name; without one, for the image's own registry
    /// (`domain`), also where registries.conf says that this is elsewhere, but for no mirror.
    pub(super) fn are_for(&self, host: &str, domain: &str, mirror: bool) -> bool {
        let address = self.server_address.trim();
        if address.is_empty() {
            return !mirror;
        }
        let address = address.split_once("://").map_or(address, |(_, rest)| rest);
        let named = address.split('/').next().unwrap_or("");
        let is = |host: &str| named.eq_ignore_ascii_case(host) || (HUB.contains(&named) && HUB.contains(&host));
        is(host) || (!mirror && is(domain))
    }

    /// Whether `auth` is what it should be, if it is there and needed.
    pub fn auth_is_readable(&self) -> bool {
        self.auth.is_empty() || self.user_and_password().is_some()
    }

    /// User and password, if they are there.
    pub(super) fn user_and_password(&self) -> Option<(String, String)> {
        if !self.username.is_empty() {
            return Some((self.username.clone(), self.password.clone()));
        }
        let decoded = STANDARD.decode(self.auth.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (user, password) = text.split_once(':')?;
        // Docker's own files pad the password with zero bytes.
        (!user.is_empty()).then(|| (user.to_string(), password.trim_end_matches('\0').to_string()))
    }
}

/// The value of an Authorization header.
pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// One challenge of a WWW-Authenticate header (RFC 9110, section 11.6.1).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// Lower case: `basic`, `bearer`.
    pub(super) scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// A parameter by its lower case name.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Parses a WWW-Authenticate header, which may hold several challenges. What can't be read ends the list.
pub(super) fn challenges(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word = token(rest);
        if word.is_empty() {
            return found;
        }
        let after = rest[word.len()..].trim_start_matches([' ', '\t']);
        let value = after.strip_prefix('=').map(|v| v.trim_start_matches([' ', '\t']));
        match (value, found.last_mut()) {
            (Some(value), Some(challenge)) => {
                let Some((value, tail)) = parameter(value) else { return found };
                challenge.parameters.push((word.to_ascii_lowercase(), value));
                rest = tail;
            }
            (Some(_), None) => return found,
            (None, _) => {
                found.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
                rest = after;
            }
        }
    }
}

fn token(text: &str) -> &str {
    let end = text.bytes().position(|b| !(b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))).unwrap_or(text.len());
    &text[..end]
}

/// A token or a quoted string, and what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        // Unquoted URLs are wrong and exist.
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return Some((text[..end].to_string(), &text[end..]));
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return Some((value, &quoted[at + 1..])),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let check = |header: &str, expected: &[(&str, &[(&str, &str)])]| {
            let expected: Vec<_> = expected
                .iter()
                .map(|(scheme, parameters)| Challenge {
                    scheme: scheme.to_string(),
                    parameters: parameters.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
                })
                .collect();
            assert_eq!(challenges(header), expected, "{header}");
        };
        check("", &[]);
        check(r#"Basic realm="x""#, &[("basic", &[("realm", "x")])]);
        check(
            r#"Bearer realm="https://auth.io/token",service="reg.io",scope="repository:a/b:pull,push""#,
            &[("bearer", &[("realm", "https://auth.io/token"), ("service", "reg.io"), ("scope", "repository:a/b:pull,push")])],
        );
        check(r#"BEARER Realm = "a\"b" , error=invalid_token"#, &[("bearer", &[("realm", "a\"b"), ("error", "invalid_token")])]);
        check(
            r#"Negotiate, Basic realm="a, b=c", Bearer realm=x"#,
            &[("negotiate", &[]), ("basic", &[("realm", "a, b=c")]), ("bearer", &[("realm", "x")])],
        );
        check(r#"Bearer realm=https://a.io/t,service=s"#, &[("bearer", &[("realm", "https://a.io/t"), ("service", "s")])]);
        check(r#"Bearer realm="unclosed"#, &[("bearer", &[])]);
        check(r#"realm="nothing""#, &[]);
        check("\u{e4}", &[]);
    }

    #[test]
    fn credentials_go_where_they_belong() {
        let check = |address: &str, host: &str, mirror: bool, expected: bool| {
            let credentials = Credentials { server_address: address.into(), ..Credentials::default() };
            let domain = if host == "new.io" { "renamed.io" } else { "other.io" };
            assert_eq!(credentials.are_for(host, domain, mirror), expected, "{address} {host} {mirror}");
        };
        check("renamed.io", "new.io", false, true);
        check("renamed.io", "new.io", true, false);
        check("", "reg.io", false, true);
        check("", "mirror.io", true, false);
        check("mirror.io", "mirror.io", true, true);
        check("https://reg.io/v1/", "reg.io", false, true);
        check("reg.io", "reg.io:5000", false, false);
        check("reg.io:5000", "reg.io", false, false);
        check("reg.io", "evil.io", false, false);
        check("reg.io", "reg.io.evil.io", false, false);
        check("https://index.docker.io/v1/", "registry-1.docker.io", false, true);
    }

    #[test]
    fn users_come_from_either_form_and_secrets_are_not_shown() {
        let both = Credentials { username: "u".into(), password: "p".into(), ..Credentials::default() };
        let encoded = Credentials { auth: STANDARD.encode("u:p:q\0"), ..Credentials::default() };
        assert_eq!(both.user_and_password(), Some(("u".into(), "p".into())));
        assert_eq!(encoded.user_and_password(), Some(("u".into(), "p:q".into())));
        assert_eq!(Credentials { auth: "!".into(), ..Credentials::default() }.user_and_password(), None);
        for (auth, readable) in [("", true), ("dTpw", true), ("!", false), ("dXA=", false)] {
            assert_eq!(Credentials { auth: auth.into(), ..Credentials::default() }.auth_is_readable(), readable, "{auth}");
        }
        let shown = format!("{:?}", Credentials { password: "secret".into(), registry_token: "secret".into(), ..both });
        assert!(!shown.contains("secret"), "{shown}");
    }
}
