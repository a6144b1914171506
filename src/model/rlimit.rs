//! Resource limits as the configuration writes them: `nofile=1024:524288`.

use crate::plan::Rlimit;

/// Names in the order of the RLIMIT_* numbers (getrlimit(2)).
const NAMES: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// Parses `NAME=SOFT[:HARD]`; numbers, `unlimited` or -1. The soft limit may not be above the hard one.
pub fn parse(text: &str) -> Option<Rlimit> {
    let (name, values) = text.split_once('=')?;
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("rlimit_").unwrap_or(&name);
    let resource = NAMES.iter().position(|known| *known == name)? as u32;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let number = |text: &str| match text {
        "unlimited" | "-1" => Some(u64::MAX),
        _ => text.parse().ok(),
    };
    let (soft, hard) = (number(soft)?, number(hard)?);
    (soft <= hard).then_some(Rlimit { resource, soft, hard })
}

/// The name of a resource as OCI configurations have it: `RLIMIT_NOFILE`.
pub fn name(resource: u32) -> String {
    NAMES.get(resource as usize).map_or_else(|| resource.to_string(), |name| format!("RLIMIT_{}", name.to_ascii_uppercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parsed_or_refused() {
        let check = |text: &str, want: Option<(u32, u64, u64)>| assert_eq!(parse(text).map(|r| (r.resource, r.soft, r.hard)), want, "{text}");
        check("nofile=1024:524288", Some((7, 1024, 524_288)));
        check("RLIMIT_CORE=0", Some((4, 0, 0)));
        check("memlock=unlimited", Some((8, u64::MAX, u64::MAX)));
        for bad in ["nofile", "nofile=", "nofile=2:1", "nofile=x", "files=1", "nofile=1:2:3"] {
            check(bad, None);
        }
    }
}
