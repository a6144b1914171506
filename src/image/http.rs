//! HTTP as registries need it: a deadline on every wait, bodies with a bound, and how long to wait before the next try.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{self, HeaderMap};
use reqwest::{Response, Url};
use serde::Deserialize;
use tokio::time::timeout;

use super::registry::RegistryError;
use super::transport::Transport;

/// Longest wait that a Retry-After may ask of us.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Sends requests with a deadline on every wait.
pub struct Http {
    transport: Transport,
    progress: Duration,
}

impl Http {
    /// `progress`: longest wait for the next byte.
    pub fn new(transport: Transport, progress: Duration) -> Self {
        Self { transport, progress }
    }

    /// Sends one request; redirects are the caller's. `insecure`: certificates are not checked.
    pub(super) async fn send(
        &self,
        method: reqwest::Method,
        url: &Url,
        headers: HeaderMap,
        body: Option<String>,
        insecure: bool,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or("").to_string(),
        };
        let client = self
            .transport
            .client(&host, url.scheme() == "https", !insecure)
            .map_err(|source| RegistryError::Client { host: host.clone(), source })?;
        let mut request = client.request(method, url.clone()).headers(headers);
        if let Some(body) = body {
            request = request.body(body);
        }
        match timeout(self.progress, request.send()).await {
            Err(_) => Err(self.stalled(&host, &format!("request for {what}"))),
            Ok(Ok(response)) => Ok(response),
            // The URL may hold a signature that opens the object to anybody.
            Ok(Err(source)) => Err(RegistryError::Unreachable { hint: hint(&source, insecure), host, source: source.without_url() }),
        }
    }

    pub(super) fn stalled(&self, host: &str, stage: &str) -> RegistryError {
        RegistryError::Stalled { stage: stage.to_string(), host: host.to_string(), seconds: self.progress.as_secs() }
    }

    /// The next piece of an answer's body; a deadline of its own.
    pub(super) async fn chunk(&self, response: &mut Response, host: &str, what: &str) -> Result<Option<Piece>, RegistryError> {
        match timeout(self.progress, response.chunk()).await {
            Err(_) => Err(self.stalled(host, what)),
            Ok(Ok(chunk)) => Ok(chunk.map(|bytes| Piece(Box::new(bytes)))),
            Ok(Err(source)) => Err(RegistryError::Unreachable { host: host.to_string(), hint: "", source: source.without_url() }),
        }
    }

    /// A whole body of at most `limit` bytes.
    pub(super) async fn body(&self, mut response: Response, limit: u64, host: &str, what: &str) -> Result<Vec<u8>, RegistryError> {
        let mut body = Vec::new();
        while let Some(piece) = self.chunk(&mut response, host, what).await? {
            body.extend_from_slice(piece.as_ref());
            if body.len() as u64 > limit {
                return Err(RegistryError::TooLarge { host: host.to_string(), what: what.to_string(), limit });
            }
        }
        Ok(body)
    }

    /// What a registry says about its error, as far as it can be shown to somebody.
    pub(super) async fn error_message(&self, response: Response) -> String {
        let Ok(body) = self.body(response, 64 << 10, "", "").await else { return String::new() };
        let Ok(body) = serde_json::from_slice::<ErrorBody>(&body) else { return String::new() };
        let shown = body.errors.iter().take(3).map(|error| format!(": {} {}", error.code, error.message));
        shown.collect::<String>().chars().filter(|c| !c.is_control()).take(300).collect()
    }
}

/// Some bytes of a body.
pub struct Piece(Box<dyn AsRef<[u8]> + Send>);

impl Piece {
    /// The bytes from `start` to `end`.
    pub(super) fn cut(self, start: usize, end: usize) -> Piece {
        struct Part(Piece, usize, usize);
        impl AsRef<[u8]> for Part {
            fn as_ref(&self) -> &[u8] {
                &self.0.as_ref()[self.1..self.2]
            }
        }
        if start == 0 && end == self.as_ref().len() { self } else { Piece(Box::new(Part(self, start, end))) }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// What an operator may want to know about a failed connection.
fn hint(error: &reqwest::Error, insecure: bool) -> &'static str {
    if !error.is_connect() || insecure {
        return "";
    }
    let chain = crate::errchain::Chain(error).to_string();
    if chain.contains("InvalidContentType") || chain.contains("corrupt message") || chain.contains("handshake eof") {
        " (it does not speak TLS: if that is meant, set insecure = true for it in registries.conf)"
    } else if chain.contains("certificate") {
        " (its certificate is not trusted: put its CA into certs.d, or set insecure = true for it in registries.conf)"
    } else {
        ""
    }
}

pub(super) fn backoff(attempt: u32) -> Duration {
    Duration::from_millis(200 << attempt.min(5))
}

/// How long a Retry-After asks us to wait, as far as we do (RFC 9110, section 10.2.3): seconds or a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        // A date that is over: now.
        Err(_) => date(text)?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// A date as HTTP writes it, for example `Sun, 06 Nov 1994 08:49:37 GMT`. The two forms that nobody may send any more are not read.
fn date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_weekday, day, month, year, time, "GMT"] = words[..] else { return None };
    let number = |text: &str, digits: usize| if text.len() == digits { text.parse::<u64>().ok() } else { None };
    let clock: Vec<u64> = time.split(':').map(|part| number(part, 2)).collect::<Option<_>>()?;
    let (day, year) = (number(day, 2)?, number(year, 4)?);
    let month = MONTHS.iter().position(|m| *m == month)? as u64 + 1;
    let &[hour, minute, second] = &clock[..] else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, the year beginning in March so that the leap day is its last.
    let (years, months) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * years + years / 4 - years / 100 + years / 400 + (153 * months + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

/// Sets a header whose value can be one; an Authorization is never shown in a log.
pub(super) fn set(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(mut value) = header::HeaderValue::from_str(value) {
        value.set_sensitive(name == header::AUTHORIZATION);
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_and_bounded() {
        let check = |text: &str, expected: Option<u64>| {
            let mut headers = HeaderMap::new();
            set(&mut headers, header::RETRY_AFTER, text);
            assert_eq!(retry_after(&headers), expected.map(Duration::from_secs), "{text}");
        };
        check("0", Some(0));
        check(" 7 ", Some(7));
        check("86400", Some(30));
        check("-1", None);
        check("soon", None);
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(0));
        check("Fri, 31 Dec 9999 23:59:59 GMT", Some(30));
        check("Fri, 31 Dec 9999 23:59:59 CET", None);
        check("Fri, 31 Foo 9999 23:59:59 GMT", None);
        check("Fri, 31 Dec 99999 23:59:59 GMT", None);
        check("Sunday, 06-Nov-94 08:49:37 GMT", None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn dates_are_of_this_calendar() {
        let check = |text: &str, seconds: u64| assert_eq!(date(text), Some(UNIX_EPOCH + Duration::from_secs(seconds)), "{text}");
        check("Thu, 01 Jan 1970 00:00:00 GMT", 0);
        check("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777);
        check("Tue, 29 Feb 2000 12:00:00 GMT", 951_825_600);
        check("Mon, 01 Mar 2100 00:00:00 GMT", 4_107_542_400);
    }
}
