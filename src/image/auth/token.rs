//! Bearer tokens that are still good, so that the next pull from a repository need not ask for one. In memory only.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Credentials;

/// Tokens kept.
const MAX_TOKENS: usize = 256;
/// How long a token is good whose service does not say (distribution's "Token Authentication Specification").
const DEFAULT_LIFE: u64 = 60;
/// Longest time for which a service's word is taken.
const MAX_LIFE: u64 = 24 * 60 * 60;
/// A token is given up so long before its end: a request takes a while.
const MARGIN: Duration = Duration::from_secs(10);

/// What a token is good for: who gave it, for what, to whom. Someone with other credentials never gets it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in super::super) struct Grant {
    pub(in super::super) realm: String,
    pub(in super::super) service: String,
    pub(in super::super) scope: String,
    pub(in super::super) credentials: Option<Credentials>,
}

/// The tokens of all pulls.
#[derive(Default)]
pub(in super::super) struct Tokens(Mutex<HashMap<Grant, (String, Instant)>>);

impl Tokens {
    /// A token that is good for a while yet.
    pub(in super::super) fn get(&self, grant: &Grant) -> Option<String> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(grant).filter(|(_, end)| Instant::now() < *end).map(|(token, _)| token.clone())
    }

    /// Keeps a token that was given for `seconds`.
    pub(in super::super) fn put(&self, grant: Grant, token: &str, seconds: Option<u64>) {
        let life = Duration::from_secs(seconds.filter(|s| *s > 0).unwrap_or(DEFAULT_LIFE).min(MAX_LIFE));
        let now = Instant::now();
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, (_, end)| now < *end);
        if tokens.len() >= MAX_TOKENS
            && let Some(first) = tokens.iter().min_by_key(|(_, (_, end))| *end).map(|(grant, _)| grant.clone())
        {
            tokens.remove(&first);
        }
        tokens.insert(grant, (token.to_string(), now + life.saturating_sub(MARGIN)));
    }

    /// Forgets a token that its registry does not take any more.
    pub(in super::super) fn forget(&self, token: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, (kept, _)| kept != token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_kept_for_their_time_and_their_owner() {
        let grant = |scope: &str, user: &str| Grant {
            realm: "https://a.io/token".into(),
            service: "a".into(),
            scope: scope.into(),
            credentials: (!user.is_empty()).then(|| Credentials { username: user.into(), ..Credentials::default() }),
        };
        let tokens = Tokens::default();
        tokens.put(grant("x", "u"), "t", Some(300));
        assert_eq!(tokens.get(&grant("x", "u")).as_deref(), Some("t"));
        for other in [grant("y", "u"), grant("x", "v"), grant("x", "")] {
            assert_eq!(tokens.get(&other), None);
        }
        tokens.forget("t");
        assert_eq!(tokens.get(&grant("x", "u")), None);
        // One that ends at once is never used; the number of them is bounded.
        tokens.put(grant("x", "u"), "t", Some(5));
        assert_eq!(tokens.get(&grant("x", "u")), None);
        for n in 0..2 * MAX_TOKENS {
            tokens.put(grant(&n.to_string(), "u"), "t", Some(300 + n as u64));
        }
        assert_eq!(tokens.0.lock().unwrap().len(), MAX_TOKENS);
        assert_eq!(tokens.get(&grant(&(2 * MAX_TOKENS - 1).to_string(), "u")).as_deref(), Some("t"));
    }
}
