//! SELinux contexts: what is asked for, checked, and the labels of a pod's processes and files that it becomes.
//!
//! The grammar is the kernel's own (`mls_context_to_sid`): numeric sensitivities and categories, no names that only a
//! translation daemon knows. Whether the loaded policy knows a type is for `service` to ask.

use serde::{Deserialize, Serialize};

/// Sensitivities and categories of a policy as every distribution builds it (`MLS_SENS`, `MCS_CATS`).
const SENSITIVITIES: u32 = 16;
/// See [`SENSITIVITIES`].
pub const CATEGORIES: u32 = 1024;
/// Bytes of one part of a context, and of a context.
const MAX_PART: usize = 128;

/// The CRI's SELinuxOption; an empty part is taken from the defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Options {
    /// `system_u`.
    pub user: String,
    /// `system_r`.
    pub role: String,
    /// `container_t`.
    pub kind: String,
    /// `s0:c1,c2`.
    pub level: String,
}

/// A part of a context that can't be one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("field {part}: {value:?} {reason}")]
pub struct OptionError {
    /// `user`, `role`, `type` or `level`.
    pub part: &'static str,
    /// What stands there.
    pub value: String,
    /// What it must be.
    pub reason: &'static str,
}

impl Options {
    /// Nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks every part that is set.
    pub fn check(&self) -> Result<(), OptionError> {
        for (part, value) in [("user", &self.user), ("role", &self.role), ("type", &self.kind)] {
            let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
            if value.len() > MAX_PART || !value.bytes().all(word) {
                return Err(OptionError { part, value: short(value), reason: "is not a word of at most 128 letters, digits, '_', '-' and '.'" });
            }
        }
        if !self.level.is_empty() && !is_range(&self.level) {
            return Err(OptionError { part: "level", value: short(&self.level), reason: "is no level such as s0, s0:c1,c2 or s0-s0:c0.c1023" });
        }
        Ok(())
    }
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

/// `LOW` or `LOW-HIGH`.
fn is_range(text: &str) -> bool {
    text.len() <= 4 * MAX_PART && text.splitn(2, '-').all(is_level)
}

/// `s0`, `s0:c1,c2`, `s0:c0.c1023`.
fn is_level(text: &str) -> bool {
    let (sensitivity, categories) = match text.split_once(':') {
        Some((sensitivity, categories)) => (sensitivity, Some(categories)),
        None => (text, None),
    };
    let category = |text: &str| number('c', text).filter(|n| *n < CATEGORIES);
    let fits = |part: &str| match part.split_once('.') {
        Some((first, last)) => category(first).zip(category(last)).is_some_and(|(first, last)| first < last),
        None => category(part).is_some(),
    };
    number('s', sensitivity).is_some_and(|n| n < SENSITIVITIES) && categories.is_none_or(|list| list.split(',').all(fits))
}

fn number(letter: char, text: &str) -> Option<u32> {
    let digits = text.strip_prefix(letter)?;
    let plain = (1..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if plain { digits.parse().ok() } else { None }
}

/// The contexts that a node gives containers by default: its policy's `lxc_contexts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Of processes: `system_u:system_r:container_t:s0`.
    pub process: String,
    /// Of files: `system_u:object_r:container_file_t:s0`.
    pub file: String,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { process: "system_u:system_r:container_t:s0".into(), file: "system_u:object_r:container_file_t:s0".into() }
    }
}

/// The type of a privileged container's processes: a super privileged container's.
const PRIVILEGED: &str = "spc_t";

/// The labels of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// Of its processes.
    pub process: String,
    /// Of what is mounted for it.
    pub mount: String,
}

/// The labels that `options` make of a node's defaults. `level` is the pod's own, taken where the options name none.
/// A privileged container's processes have the type of super privileged ones and no categories, its files the pod's.
pub fn labels(defaults: &Defaults, options: &Options, level: &str, privileged: bool) -> Labels {
    let over = |value: &String, default: &str| if value.is_empty() { default.to_string() } else { value.clone() };
    let [user, role, kind, low] = split(&defaults.process);
    let (kind, process_level) = if privileged { (PRIVILEGED, low) } else { (kind, level) };
    let process = [over(&options.user, user), over(&options.role, role), over(&options.kind, kind), over(&options.level, process_level)];
    let [file_user, file_role, file_kind, _] = split(&defaults.file);
    let mount = [over(&options.user, file_user), file_role.into(), file_kind.into(), over(&options.level, level)];
    Labels { process: process.join(":"), mount: mount.join(":") }
}

/// User, role, type and level of a context; the level may have colons of its own.
fn split(context: &str) -> [&str; 4] {
    let mut parts = context.splitn(4, ':');
    let mut next = || parts.next().unwrap_or_default();
    let [user, role, kind] = [next(), next(), next()];
    let level = next();
    [user, role, kind, if level.is_empty() { "s0" } else { level }]
}

/// The level of the pair of categories with this number, below [`PAIRS`]: `s0:c1,c2`, the lower one first.
pub fn pair(number: u32) -> String {
    // Pairs in order: (0,1); (0,2), (1,2); (0,3), …: those below `high` number high*(high-1)/2.
    let mut high = (((8.0 * f64::from(number) + 1.0).sqrt() + 1.0) / 2.0) as u32;
    while high * (high - 1) / 2 > number {
        high -= 1;
    }
    while (high + 1) * high / 2 <= number {
        high += 1;
    }
    format!("s0:c{},c{high}", number - high * (high - 1) / 2)
}

/// How many pairs of categories there are.
pub const PAIRS: u32 = CATEGORIES * (CATEGORIES - 1) / 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_contexts_that_the_kernel_could_know_pass() {
        let check = |options: Options, bad: Option<&str>| assert_eq!(options.check().err().map(|error| error.part), bad, "{options:?}");
        let level = |level: &str| Options { level: level.into(), ..Options::default() };
        check(Options::default(), None);
        check(Options { user: "system_u".into(), role: "system_r".into(), kind: "svirt_lxc_net_t".into(), level: "s0:c4,c5".into() }, None);
        for good in ["s0", "s15", "s0:c0.c1023", "s0-s0:c0.c1023", "s0:c1,c2,c7.c9", "s0:c1-s1:c1,c2"] {
            check(level(good), None);
        }
        for bad in
            ["s0,c4,c5", "s16", "s0:", "s0:c1024", "s0:c5.c4", "s0:c1,", "SystemLow", "s0:c1,c2\n", "s0 ", "s", "s00", "s0-", "s0-s0-s0", "s0:c-1"]
        {
            check(level(bad), Some("level"));
        }
        for bad in ["a:b", "a b", "a\0", "a,context=x", &"x".repeat(129)] {
            check(Options { user: bad.into(), ..Options::default() }, Some("user"));
            check(Options { role: bad.into(), ..Options::default() }, Some("role"));
            check(Options { kind: bad.into(), ..Options::default() }, Some("type"));
        }
    }

    #[test]
    fn options_go_over_the_nodes_defaults() {
        let check = |options: Options, privileged, process: &str, mount: &str| {
            let found = labels(&Defaults::default(), &options, "s0:c1,c2", privileged);
            assert_eq!((found.process.as_str(), found.mount.as_str()), (process, mount));
        };
        check(Options::default(), false, "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2");
        check(Options::default(), true, "system_u:system_r:spc_t:s0", "system_u:object_r:container_file_t:s0:c1,c2");
        let own = Options { user: "u_u".into(), role: "r_r".into(), kind: "k_t".into(), level: "s0:c4,c5".into() };
        check(own.clone(), false, "u_u:r_r:k_t:s0:c4,c5", "u_u:object_r:container_file_t:s0:c4,c5");
        check(own, true, "u_u:r_r:k_t:s0:c4,c5", "u_u:object_r:container_file_t:s0:c4,c5");
        check(
            Options { level: "s0".into(), ..Options::default() },
            false,
            "system_u:system_r:container_t:s0",
            "system_u:object_r:container_file_t:s0",
        );
    }

    #[test]
    fn every_number_is_another_pair() {
        let all: std::collections::BTreeSet<String> = (0..PAIRS).map(pair).collect();
        assert_eq!(all.len(), PAIRS as usize);
        assert_eq!((pair(0).as_str(), pair(1).as_str(), pair(PAIRS - 1).as_str()), ("s0:c0,c1", "s0:c0,c2", "s0:c1022,c1023"));
        assert!((0..PAIRS).step_by(997).all(|number| is_range(&pair(number))));
    }
}
