//! One-use tokens: what a URL's last part stands for, for a minute.
//!
//! A token is the only authentication that a client of the streaming server has, so it is 128 random bits, redeemed once,
//! and by the path of its own kind only. The table is bounded: who asks for URLs and never uses them is refused.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// How long a token is good.
pub const LIFETIME: Duration = Duration::from_secs(60);
/// Tokens that may wait to be redeemed.
pub const MAX_WAITING: usize = 1000;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Too many wait to be redeemed.
    #[error("{MAX_WAITING} streaming requests wait for their clients")]
    Full,
    /// There is no randomness.
    #[error("cannot make a token")]
    Random(#[source] getrandom::Error),
}

/// The table. `A`: what a token stands for.
#[derive(Debug)]
pub struct Tokens<A> {
    waiting: Mutex<HashMap<String, (Instant, A)>>,
}

impl<A> Default for Tokens<A> {
    fn default() -> Self {
        Self { waiting: Mutex::default() }
    }
}

impl<A> Tokens<A> {
    /// Keeps `ask` and returns its token, of 22 characters that need no escape in a URL.
    pub fn issue(&self, ask: A, now: Instant) -> Result<String, TokenError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(TokenError::Random)?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_WAITING {
            waiting.retain(|_, (issued, _)| fresh(*issued, now));
        }
        if waiting.len() >= MAX_WAITING {
            return Err(TokenError::Full);
        }
        waiting.insert(token.clone(), (now, ask));
        Ok(token)
    }

    /// Whether the token would be redeemed: it is fresh and what it stands for is `fit`.
    pub fn stands(&self, token: &str, fit: impl Fn(&A) -> bool, now: Instant) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.get(token).is_some_and(|(issued, ask)| fresh(*issued, now) && fit(ask))
    }

    /// What the token stands for, once. One that doesn't fit stays.
    pub fn redeem(&self, token: &str, fit: impl Fn(&A) -> bool, now: Instant) -> Option<A> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (issued, ask) = waiting.get(token)?;
        if !fresh(*issued, now) || !fit(ask) {
            return None;
        }
        waiting.remove(token).map(|(_, ask)| ask)
    }
}

fn fresh(issued: Instant, now: Instant) -> bool {
    now.saturating_duration_since(issued) < LIFETIME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_for_a_minute_and_for_its_kind() {
        let tokens = Tokens::default();
        let start = Instant::now();
        let token = tokens.issue("exec", start).unwrap();
        assert_eq!(token.len(), 22);
        let check = |token: &str, kind: &'static str, after: u64, expected: Option<&'static str>| {
            let now = start + Duration::from_secs(after);
            assert_eq!(tokens.stands(token, |ask| *ask == kind, now), expected.is_some(), "{token} {kind} {after}");
            assert_eq!(tokens.redeem(token, |ask| *ask == kind, now), expected, "{token} {kind} {after}");
        };
        check(&token, "attach", 0, None);
        check(&token, "exec", 60, None);
        check("nonsense", "exec", 0, None);
        check(&token, "exec", 59, Some("exec"));
        check(&token, "exec", 59, None);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_what_is_stale() {
        let tokens = Tokens::default();
        let start = Instant::now();
        for _ in 0..MAX_WAITING {
            tokens.issue((), start).unwrap();
        }
        assert!(matches!(tokens.issue((), start + Duration::from_secs(59)), Err(TokenError::Full)));
        tokens.issue((), start + LIFETIME).unwrap();
        assert_eq!(tokens.waiting.lock().unwrap().len(), 1);
    }
}
