//! Platforms: what this machine runs, and which entry of a manifest list fits it best.

/// An operating system and a processor, in the image specification's words (those of Go).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, `v3`, …; empty: none.
    pub variant: String,
}

impl Platform {
    /// This machine.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", x86_level()),
            "aarch64" => ("arm64", "v8"),
            "x86" => ("386", ""),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            other => (other, ""),
        };
        Self::new("linux", architecture, variant)
    }

    /// From its parts.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        Self { os: os.into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// How well something built for `offered` runs here: smaller is better, `None`: it does not run. An image without a variant
    /// stands for the architecture's first one (`v1`; for arm `v7`, for arm64 `v8`).
    pub fn distance(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os {
            return None;
        }
        let level = |p: &Platform, unnamed: u32| match p.variant.as_str() {
            "" => Some(unnamed),
            v => v.strip_prefix('v').and_then(|n| n.split('.').next()).and_then(|n| n.parse().ok()),
        };
        let within = |unnamed: u32| level(self, unnamed)?.checked_sub(level(offered, unnamed)?);
        match (self.architecture.as_str(), offered.architecture.as_str()) {
            ("amd64", "amd64") => within(1),
            ("arm64", "arm64") => within(8),
            ("arm", "arm") => within(7),
            // 32-bit programs run on both, if nothing better is offered.
            ("amd64", "386") => Some(100),
            ("arm64", "arm") => Some(100 + 8u32.checked_sub(level(offered, 7)?)?),
            (ours, theirs) => (ours == theirs && (offered.variant.is_empty() || self.variant == offered.variant)).then_some(0),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

/// The processor's level of the x86-64 psABI (section 3.1.1).
#[cfg(target_arch = "x86_64")]
fn x86_level() -> &'static str {
    let v2 = is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("popcnt");
    let v3 = v2
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe");
    let v4 = v3
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (v2, v3, v4) {
        (_, _, true) => "v4",
        (_, true, _) => "v3",
        (true, ..) => "v2",
        _ => "v1",
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> &'static str {
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Platform {
        let mut parts = text.split('/');
        let mut next = || parts.next().unwrap_or("");
        Platform::new(next(), next(), next())
    }

    #[test]
    fn the_nearest_platform_is_chosen() {
        let check = |host: &str, offered: &[&str], expected: Option<&str>| {
            let host = parse(host);
            let best = offered.iter().filter_map(|o| host.distance(&parse(o)).map(|d| (d, *o))).min_by_key(|(d, _)| *d).map(|(_, o)| o);
            assert_eq!(best, expected, "{host} of {offered:?}");
        };
        check("linux/amd64/v3", &["linux/arm64/v8", "linux/amd64", "linux/386"], Some("linux/amd64"));
        check("linux/amd64/v3", &["linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/amd64/v4"], Some("linux/amd64/v3"));
        check("linux/amd64/v2", &["linux/amd64/v3", "linux/amd64/v4", "linux/386"], Some("linux/386"));
        check("linux/amd64/v2", &["linux/amd64/v3", "windows/amd64"], None);
        check("linux/amd64/v1", &["linux/amd64/v1", "linux/amd64"], Some("linux/amd64/v1"));
        check("linux/arm64/v8", &["linux/arm/v7", "linux/arm64", "linux/arm/v6"], Some("linux/arm64"));
        check("linux/arm64/v8", &["linux/arm64/v9", "linux/arm/v6", "linux/arm/v7"], Some("linux/arm/v7"));
        check("linux/arm64/v8", &["linux/arm64/v8", "linux/amd64"], Some("linux/arm64/v8"));
        check("linux/arm/v7", &["linux/arm/v6", "linux/arm/v7", "linux/arm64"], Some("linux/arm/v7"));
        check("linux/s390x", &["linux/amd64", "linux/s390x"], Some("linux/s390x"));
        check("linux/riscv64", &["linux/amd64"], None);
        check("linux/amd64/v3", &["linux/amd64/nonsense", "unknown/unknown"], None);
    }
}
