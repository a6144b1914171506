//! Who a process runs as: names looked up in the container's own /etc/passwd and /etc/group.
//!
//! Both files are the image's, so they are hostile: only a regular file of bounded size is read (CVE-2025-4437), numbers are
//! 32 bits or refused (CVE-2024-40635), a home directory with control characters is refused (CVE-2022-4318), and the primary
//! group is always among the supplemental ones (CVE-2022-2995). Called in init and in exec's helper, in the container's root.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};

use super::devices;
use super::paths::{PathError, Root};
use crate::errchain::{Kind, Kinded};
use crate::plan::{GroupsPolicy, ResolvedUser, User};

/// Bytes that are read of /etc/passwd and /etc/group.
const MAX_FILE: u64 = 1 << 20;
/// As many groups as setgroups(2) takes.
const MAX_GROUPS: usize = 65536;

/// A user that cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// A name that the container's files don't have.
    #[error("no {what} {name:?} in the container's {file}")]
    Unknown {
        /// `user` or `group`.
        what: &'static str,
        /// The name.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// A number that is no user or group id.
    #[error("{what} {number} is out of range: 0 to 4294967294")]
    Range {
        /// `user` or `group`.
        what: &'static str,
        /// The number as it was given.
        number: String,
    },
    /// A file that is not a regular one.
    #[error("{0} in the container is not a regular file")]
    NotRegular(&'static str),
    /// A file that is too large.
    #[error("{0} in the container is larger than {MAX_FILE} bytes")]
    TooLarge(&'static str),
    /// A file that could not be read.
    #[error("cannot read {file} in the container")]
    Read {
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file that could not be opened.
    #[error("cannot look up users")]
    Open(#[source] PathError),
    /// A home directory that could forge lines of other files.
    #[error("home directory {0:?} of the container's /etc/passwd has control characters")]
    Home(String),
    /// More groups than a process can have.
    #[error("{0} supplemental groups are more than {MAX_GROUPS}")]
    TooMany(usize),
}

impl Kinded for UserError {
    fn kind(&self) -> Kind {
        match self {
            UserError::Read { .. } => Kind::Internal,
            UserError::Open(error) => error.kind(),
            _ => Kind::InvalidArgument,
        }
    }
}

/// Resolves a user within a container's root.
pub fn resolve(user: &User, root: Root<'_>) -> Result<ResolvedUser, UserError> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    resolve_in(user, &passwd, &group)
}

/// The file's content; a file that isn't there is empty.
fn read(root: Root<'_>, file: &'static str) -> Result<Vec<u8>, UserError> {
    let path = Path::new(file);
    // Looked at before it is opened, since opening a FIFO or a device could block or do something.
    let Some(found) = root.find(path).map_err(UserError::Open)? else { return Ok(Vec::new()) };
    let read_error = |source: io::Error| UserError::Read { file, source };
    let seen = rustix::fs::fstat(&found).map_err(|error| read_error(error.into()))?;
    // A file that the plan masks is empty to an exec'd process.
    if devices::is_null(found.as_fd()).map_err(read_error)? {
        return Ok(Vec::new());
    }
    if FileType::from_raw_mode(seen.st_mode) != FileType::RegularFile {
        return Err(UserError::NotRegular(file));
    }
    let opened = root.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).map_err(UserError::Open)?;
    let stat = rustix::fs::fstat(&opened).map_err(|error| read_error(error.into()))?;
    if (stat.st_dev, stat.st_ino) != (seen.st_dev, seen.st_ino) {
        return Err(UserError::NotRegular(file));
    }
    let mut bytes = Vec::new();
    std::fs::File::from(opened).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(read_error)?;
    if bytes.len() as u64 > MAX_FILE { Err(UserError::TooLarge(file)) } else { Ok(bytes) }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// Lines of passwd(5) that are well formed; others are passed over, as getpwent(3) does.
fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let home = fields.nth(1).unwrap_or("");
        Some(Account { name, uid: number(uid)?, gid: number(gid)?, home })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Lines of group(5) that are well formed.
fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Group { name, gid: number(gid)?, members: fields.next().unwrap_or("") })
    })
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes.split(|&b| b == b'\n').filter_map(|line| std::str::from_utf8(line).ok()).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A user or group id: digits only, and not the one that means "leave as it is" to the kernel.
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if digits { text.parse().ok().filter(|&n| n != u32::MAX) } else { None }
}

/// What a text names: a number, or nothing but a name.
fn id(what: &'static str, text: &str) -> Result<Option<u32>, UserError> {
    match number(text) {
        Some(n) => Ok(Some(n)),
        // `-1`, `+5` and 4294967296 are meant as numbers, and no file can make users of them.
        None if text.trim_start_matches(['-', '+']).bytes().all(|b| b.is_ascii_digit()) => Err(UserError::Range { what, number: text.into() }),
        None => Ok(None),
    }
}

fn valid(what: &'static str, n: u32) -> Result<u32, UserError> {
    if n == u32::MAX { Err(UserError::Range { what, number: n.to_string() }) } else { Ok(n) }
}

fn resolve_in(user: &User, passwd: &[u8], group: &[u8]) -> Result<ResolvedUser, UserError> {
    let wanted = match user.uid {
        Some(uid) => Some(valid("user", uid)?),
        None if user.name.is_empty() => Some(0),
        None => id("user", &user.name)?,
    };
    let account = match wanted {
        Some(uid) => accounts(passwd).find(|account| account.uid == uid),
        None => Some(accounts(passwd).find(|account| account.name == user.name).ok_or_else(|| UserError::Unknown {
            what: "user",
            name: user.name.clone(),
            file: "/etc/passwd",
        })?),
    };
    let uid = wanted.or(account.as_ref().map(|account| account.uid)).unwrap_or(0);

    let gid = match user.gid {
        Some(gid) => valid("group", gid)?,
        None if user.group.is_empty() => account.as_ref().map_or(0, |account| account.gid),
        None => match id("group", &user.group)? {
            Some(gid) => gid,
            None => groups(group).find(|entry| entry.name == user.group).map(|entry| entry.gid).ok_or_else(|| UserError::Unknown {
                what: "group",
                name: user.group.clone(),
                file: "/etc/group",
            })?,
        },
    };

    let mut all = vec![gid];
    let mut seen = BTreeSet::from([gid]);
    let mut add = |gid: u32| {
        if seen.insert(gid) {
            all.push(gid);
        }
    };
    if let (GroupsPolicy::Merge, Some(account)) = (&user.policy, &account) {
        groups(group).filter(|entry| entry.members.split(',').any(|member| member == account.name)).for_each(|entry| add(entry.gid));
    }
    for &gid in &user.supplemental {
        add(valid("group", gid)?);
    }
    if all.len() > MAX_GROUPS {
        return Err(UserError::TooMany(all.len()));
    }

    let home = account.as_ref().map_or("", |account| account.home);
    if home.chars().any(char::is_control) {
        return Err(UserError::Home(home.into()));
    }
    let home = if home.starts_with('/') { PathBuf::from(home) } else { PathBuf::from("/") };
    debug_assert!(!home.as_os_str().as_bytes().contains(&0));
    Ok(ResolvedUser { uid, gid, groups: all, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbad line\nweb:x:33:34:www:/var/www:/bin/sh\n\
                          evil:x:4294967296:0::/:\nminus:x:-1:0::/:\nmax:x:4294967295:0::/:\nbell:x:7:7::/a\x07b:\nodd:x:8:8::rel:\nshort:x:9:9\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nadm:x:4:web,other\ndocker:x:99:other\ndial:x:20:web\nbig:x:4294967295:web\n";

    fn check(user: User, want: Result<(u32, u32, &[u32], &str), &str>) {
        let got = resolve_in(&user, PASSWD.as_bytes(), GROUP.as_bytes());
        match (got, want) {
            (Ok(got), Ok((uid, gid, groups, home))) => {
                assert_eq!((got.uid, got.gid, got.groups.as_slice(), got.home.to_str().unwrap()), (uid, gid, groups, home), "{user:?}");
            }
            (Err(error), Err(want)) => {
                assert!(error.to_string().contains(want), "{user:?}: {error}");
                assert_eq!(error.kind(), Kind::InvalidArgument, "{user:?}");
            }
            (got, want) => panic!("{user:?}: {got:?}, not {want:?}"),
        }
    }

    fn named(name: &str) -> User {
        User { name: name.into(), ..User::default() }
    }

    #[test]
    fn users_by_name_and_number() {
        check(User::default(), Ok((0, 0, &[0], "/root")));
        check(named("web"), Ok((33, 34, &[34, 4, 20], "/var/www")));
        check(named("33"), Ok((33, 34, &[34, 4, 20], "/var/www")));
        check(User { uid: Some(33), ..named("root") }, Ok((33, 34, &[34, 4, 20], "/var/www")));
        check(User { uid: Some(5000), ..User::default() }, Ok((5000, 0, &[0], "/")));
        check(User { uid: Some(5000), gid: Some(6000), supplemental: vec![1, 2, 1], ..User::default() }, Ok((5000, 6000, &[6000, 1, 2], "/")));
        check(named("odd"), Ok((8, 8, &[8], "/")));
        check(named("short"), Ok((9, 9, &[9], "/")));
    }

    #[test]
    fn groups_follow_the_policy() {
        let strict = User { policy: GroupsPolicy::Strict, supplemental: vec![7], ..named("web") };
        check(strict, Ok((33, 34, &[34, 7], "/var/www")));
        check(User { group: "adm".into(), ..named("web") }, Ok((33, 4, &[4, 20], "/var/www")));
        check(User { group: "77".into(), ..named("5000") }, Ok((5000, 77, &[77], "/")));
    }

    #[test]
    fn what_is_no_user_is_refused_by_name() {
        check(named("nobody"), Err("no user \"nobody\""));
        check(User { group: "nogroup".into(), ..User::default() }, Err("no group \"nogroup\""));
        for number in ["4294967295", "4294967296", "-1", "+0", "99999999999999999999"] {
            check(named(number), Err("out of range"));
            check(User { group: number.into(), ..User::default() }, Err("out of range"));
        }
        check(User { uid: Some(u32::MAX), ..User::default() }, Err("out of range"));
        check(User { supplemental: vec![u32::MAX], ..User::default() }, Err("out of range"));
        for name in ["evil", "minus", "max", "bad line"] {
            check(named(name), Err("no user"));
        }
        check(named("bell"), Err("control characters"));
    }
}
