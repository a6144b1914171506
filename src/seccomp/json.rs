//! Profiles in JSON: `linux.seccomp` of an OCI config.json, and the files of the same form that Kubernetes calls Localhost.
//!
//! Files in the form of Docker's and CRI-O's own default profiles are read too: `includes` and `excludes` per rule, an
//! `archMap`, a rule's `name`, and errors by name. Their conditions are evaluated here, for one [`Host`], since a [`Profile`]
//! has none. (containerd ignores them and takes every rule, the ones for privileged containers among them.)

use serde::Deserialize;

use super::{Action, Arch, Arg, Flags, Op, Profile, Rule, SeccompError};
use crate::plan::capability;

/// What the conditions of a profile are about.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// The bounding set of the container, bit N for capability N.
    pub capabilities: u64,
    /// The native architecture.
    pub arch: Arch,
    /// The running kernel's version and patch level: `(6, 1)`.
    pub kernel: (u32, u32),
}

/// Reads a profile.
///
/// # Errors
/// Text that is no such JSON, or a field with a value that is unknown or contradicts another; the error names the field.
pub fn from_json(bytes: &[u8], host: &Host) -> Result<Profile, SeccompError> {
    let json: JsonProfile = serde_json::from_slice(bytes).map_err(|source| SeccompError::Parse { source })?;
    let errno = errno("defaultErrnoRet", json.default_errno_ret, json.default_errno.as_deref())?;
    let default_action = action("defaultAction", &json.default_action, errno)?;
    let mut rules = Vec::new();
    for (index, call) in json.syscalls.unwrap_or_default().into_iter().enumerate() {
        let field = |name: &str| format!("syscalls[{index}].{name}");
        if call.excludes.as_ref().is_some_and(|filter| filter.excludes(host)) || call.includes.as_ref().is_some_and(|filter| !filter.includes(host)) {
            continue;
        }
        let mut names = call.names.unwrap_or_default();
        match call.name {
            Some(name) if !name.is_empty() => {
                if !names.is_empty() {
                    return Err(SeccompError::Both { one: field("name"), other: field("names") });
                }
                names.push(name);
            }
            _ => {}
        }
        if names.iter().any(String::is_empty) {
            return Err(SeccompError::Value { field: field("names"), value: String::new() });
        }
        let errno = self::errno(&field("errnoRet"), call.errno_ret, call.errno.as_deref())?;
        let action = action(&field("action"), &call.action, errno)?;
        let args = call.args.unwrap_or_default();
        let args = args.iter().enumerate().map(|(arg, json)| json.arg(&format!("{}[{arg}]", field("args"))));
        rules.push(Rule { names, action, args: args.collect::<Result<_, _>>()? });
    }
    let architectures = architectures(json.architectures.unwrap_or_default(), json.arch_map.unwrap_or_default(), host.arch)?;
    Ok(Profile { default_action, architectures, rules, flags: flags(json.flags)? })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonProfile {
    default_action: String,
    default_errno_ret: Option<u64>,
    default_errno: Option<String>,
    architectures: Option<Vec<String>>,
    arch_map: Option<Vec<JsonArch>>,
    flags: Option<Vec<String>>,
    syscalls: Option<Vec<JsonCall>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonArch {
    architecture: String,
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonCall {
    names: Option<Vec<String>>,
    name: Option<String>,
    action: String,
    errno_ret: Option<u64>,
    errno: Option<String>,
    args: Option<Vec<JsonArg>>,
    includes: Option<JsonFilter>,
    excludes: Option<JsonFilter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonArg {
    index: u64,
    op: String,
    value: u64,
    #[serde(default)]
    value_two: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonFilter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

impl JsonFilter {
    /// Whether a rule that includes this applies: where everything it asks for is there.
    fn includes(&self, host: &Host) -> bool {
        let arches = self.arches.as_deref().unwrap_or_default();
        let caps = self.caps.as_deref().unwrap_or_default();
        (arches.is_empty() || arches.iter().any(|name| is_native(name, host)))
            && caps.iter().all(|name| is_granted(name, host))
            && self.min_kernel.as_deref().is_none_or(|version| is_reached(version, host))
    }

    /// Whether a rule that excludes this does not apply: where anything of it is there.
    fn excludes(&self, host: &Host) -> bool {
        self.arches.iter().flatten().any(|name| is_native(name, host))
            || self.caps.iter().flatten().any(|name| is_granted(name, host))
            || self.min_kernel.as_deref().is_some_and(|version| is_reached(version, host))
    }
}

/// Conditions name architectures as Go does.
fn is_native(name: &str, host: &Host) -> bool {
    let native = match host.arch {
        Arch::X86_64 => "amd64",
        Arch::X86 => "x86",
        Arch::X32 => "x32",
        Arch::Aarch64 => "arm64",
        Arch::Arm => "arm",
    };
    name == native
}

/// A capability without a bit here is one that no container can have.
fn is_granted(name: &str, host: &Host) -> bool {
    let bit = name.strip_prefix("CAP_").and_then(|name| capability::NAMES.iter().position(|&other| other == name));
    bit.is_some_and(|bit| host.capabilities & (1 << bit) != 0)
}

/// A version that can't be read is one that no kernel reaches.
fn is_reached(version: &str, host: &Host) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(version), Some(level)) => host.kernel >= (version, level),
        _ => false,
    }
}

/// The largest error number the kernel passes on (MAX_ERRNO).
const MAX_ERRNO: u64 = 4095;

fn errno(field: &str, number: Option<u64>, name: Option<&str>) -> Result<u16, SeccompError> {
    let invalid = |value: String| SeccompError::Value { field: field.to_owned(), value };
    match (number, name) {
        (Some(number), _) if number <= MAX_ERRNO => Ok(number as u16),
        (Some(number), _) => Err(invalid(number.to_string())),
        (None, Some(name)) if !name.is_empty() => match name {
            "EPERM" => Ok(1),
            "ENOENT" => Ok(2),
            "EIO" => Ok(5),
            "EAGAIN" => Ok(11),
            "ENOMEM" => Ok(12),
            "EACCES" => Ok(13),
            "EINVAL" => Ok(22),
            "ENOSYS" => Ok(38),
            "ENOTSUP" | "EOPNOTSUPP" => Ok(95),
            _ => Err(invalid(name.to_owned())),
        },
        // What runc takes: EPERM.
        _ => Ok(1),
    }
}

pub(super) fn action(field: &str, name: &str, errno: u16) -> Result<Action, SeccompError> {
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_ERRNO" => Action::Errno(errno),
        "SCMP_ACT_TRACE" => Action::Trace(errno),
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_NOTIFY" => Action::Notify,
        "SCMP_ACT_ALLOW" => Action::Allow,
        _ => return Err(SeccompError::Value { field: field.to_owned(), value: name.to_owned() }),
    })
}

impl JsonArg {
    fn arg(&self, field: &str) -> Result<Arg, SeccompError> {
        let invalid = |name: &str, value: String| SeccompError::Value { field: format!("{field}.{name}"), value };
        let index = u8::try_from(self.index).ok().filter(|&index| index < 6).ok_or_else(|| invalid("index", self.index.to_string()))?;
        let op = match self.op.as_str() {
            "SCMP_CMP_NE" => Op::Ne,
            "SCMP_CMP_LT" => Op::Lt,
            "SCMP_CMP_LE" => Op::Le,
            "SCMP_CMP_EQ" => Op::Eq,
            "SCMP_CMP_GE" => Op::Ge,
            "SCMP_CMP_GT" => Op::Gt,
            "SCMP_CMP_MASKED_EQ" => Op::MaskedEq,
            other => return Err(invalid("op", other.to_owned())),
        };
        Ok(Arg { index, op, value: self.value, value_two: self.value_two })
    }
}

/// Architectures that the specification names and that no process of a host of ours can have.
const FOREIGN: [&str; 16] = [
    "MIPS",
    "MIPS64",
    "MIPS64N32",
    "MIPSEL",
    "MIPSEL64",
    "MIPSEL64N32",
    "PPC",
    "PPC64",
    "PPC64LE",
    "S390",
    "S390X",
    "PARISC",
    "PARISC64",
    "RISCV64",
    "LOONGARCH64",
    "M68K",
];

fn architectures(listed: Vec<String>, map: Vec<JsonArch>, native: Arch) -> Result<Vec<Arch>, SeccompError> {
    if !listed.is_empty() && !map.is_empty() {
        return Err(SeccompError::Both { one: "architectures".to_owned(), other: "archMap".to_owned() });
    }
    let mut arches = Vec::new();
    for (index, name) in listed.iter().enumerate() {
        arches.extend(arch(&format!("architectures[{index}]"), name)?);
    }
    for (index, entry) in map.iter().enumerate() {
        let field = format!("archMap[{index}]");
        if arch(&format!("{field}.architecture"), &entry.architecture)? != Some(native) {
            continue;
        }
        arches.push(native);
        for (sub, name) in entry.sub_architectures.iter().flatten().enumerate() {
            arches.extend(arch(&format!("{field}.subArchitectures[{sub}]"), name)?);
        }
    }
    Ok(arches)
}

fn arch(field: &str, name: &str) -> Result<Option<Arch>, SeccompError> {
    if let Some((_, arch)) = Arch::ALL.iter().find(|(other, _)| *other == name) {
        return Ok(Some(*arch));
    }
    match name.strip_prefix("SCMP_ARCH_") {
        Some(rest) if FOREIGN.contains(&rest) => Ok(None),
        _ => Err(SeccompError::Value { field: field.to_owned(), value: name.to_owned() }),
    }
}

fn flags(names: Option<Vec<String>>) -> Result<Flags, SeccompError> {
    let Some(names) = names else { return Ok(Flags::default()) };
    let mut flags = Flags { log: false, spec_allow: false };
    for (index, name) in names.into_iter().enumerate() {
        match name.as_str() {
            "SECCOMP_FILTER_FLAG_LOG" => flags.log = true,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => flags.spec_allow = true,
            // A filter is put on one thread before execve: there is nothing to synchronise.
            "SECCOMP_FILTER_FLAG_TSYNC" => {}
            // WAIT_KILLABLE_RECV among them: it is for listeners.
            _ => return Err(SeccompError::Value { field: format!("flags[{index}]"), value: name }),
        }
    }
    Ok(flags)
}
