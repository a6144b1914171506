//! One entry of an archive, reduced to what we take from it and checked: a path that stays inside, owners that are numbers.

use std::ffi::CString;

use rustix::fs::{Gid, Timespec, Timestamps, Uid};
use tar_core::parse::ParsedEntry;
use tar_core::{EntryType, SparseEntry};

use super::super::Limits;
use super::UnpackError;

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file with so many bytes of content.
    File { size: u64 },
    /// A file with holes.
    Sparse { map: Vec<(u64, u64)>, size: u64 },
    /// A directory.
    Directory,
    /// A symbolic link, its target as it stands.
    Symlink(Vec<u8>),
    /// A hard link to a clean path of the layer.
    Link(Vec<u8>),
    /// A character or block device.
    Device { block: bool, major: u32, minor: u32 },
    /// A named pipe.
    Fifo,
    /// `.wh.NAME`: NAME of the lower layers is gone.
    Whiteout,
    /// `.wh..wh..opq`: what the lower layers have in this directory is gone.
    Opaque,
    /// AUFS's own book-keeping.
    Skip,
}

/// What an inode carries besides its content.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) owner: Uid,
    pub(super) group: Gid,
    pub(super) mode: u32,
    pub(super) mtime: Timespec,
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
}

impl Meta {
    /// The times as the kernel takes them; atime is mtime, since layers carry no other.
    pub(super) fn times(&self) -> Timestamps {
        Timestamps { last_access: self.mtime, last_modification: self.mtime }
    }
}

/// An entry, checked.
#[derive(Debug)]
pub(super) struct Entry {
    /// The clean path: no empty component, no `.`, no `..`; empty: the root. For a whiteout the path that is gone, for `Opaque` the directory.
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
}

/// Bytes of content that follow the entry's header: a link or a directory has none, whatever its size says (Go's archive/tar,
/// `isHeaderOnly`, by which every image was made).
pub(super) fn content_bytes(entry: &ParsedEntry<'_>) -> u64 {
    match entry.entry_type {
        EntryType::Link | EntryType::Symlink | EntryType::Char | EntryType::Block | EntryType::Directory | EntryType::Fifo => 0,
        _ => entry.size,
    }
}

/// For errors.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned()
}

/// Reads an entry. `sparse`: its map and its real size.
pub(super) fn read(entry: &ParsedEntry<'_>, sparse: Option<(&[SparseEntry], u64)>, limits: &Limits) -> Result<Entry, UnpackError> {
    let refuse = |why| UnpackError::Refused { path: shown(&entry.path), why };
    let mtime = pax(entry.pax).map_err(refuse)?.unwrap_or(Timespec { tv_sec: entry.mtime as i64, tv_nsec: 0 });
    let id = |id: u64| u32::try_from(id).ok().filter(|&id| id != u32::MAX);
    let owner = Uid::from_raw(id(entry.uid).ok_or_else(|| refuse("its owner is no user id"))?);
    let group = Gid::from_raw(id(entry.gid).ok_or_else(|| refuse("its group is no group id"))?);
    let mut path = clean(&entry.path, limits).map_err(refuse)?;
    let mut meta = Meta { owner, group, mode: entry.mode & 0o7777, mtime, xattrs: Vec::new() };

    let (parent, name) = split(&path);
    if name.starts_with(b".wh.") {
        let kind = match &name[4..] {
            b".wh..opq" => {
                path.truncate(parent.len());
                Kind::Opaque
            }
            rest if rest.starts_with(b".wh.") => Kind::Skip,
            b"" | b"." | b".." => return Err(refuse("it is a whiteout of nothing")),
            gone => {
                path = if parent.is_empty() { gone.to_vec() } else { [parent, b"/", gone].concat() };
                Kind::Whiteout
            }
        };
        return Ok(Entry { path, kind, meta });
    }
    if path.split(|&b| b == b'/').any(|component| component.starts_with(b".wh..wh.")) {
        return Ok(Entry { path, kind: Kind::Skip, meta });
    }

    let target = || entry.link_target.as_deref().filter(|t| !t.is_empty()).ok_or_else(|| refuse("it links to nothing"));
    let kind = match entry.entry_type {
        _ if sparse.is_some() => sparse_file(entry, sparse, limits).map_err(refuse)?,
        // Before POSIX a directory was a file whose name ends so.
        EntryType::Regular if entry.header.as_bytes()[156] == 0 && entry.path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File { size: entry.size },
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => {
            let target = target()?;
            if target.len() > limits.path_bytes || target.contains(&0) {
                return Err(refuse("its target is no path"));
            }
            Kind::Symlink(target.to_vec())
        }
        EntryType::Link => Kind::Link(clean(target()?, limits).map_err(refuse)?),
        EntryType::Char | EntryType::Block => {
            let (major, minor) = (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0));
            let block = entry.entry_type == EntryType::Block;
            if !block && major == 0 && minor == 0 {
                return Err(refuse("character device 0:0 is overlayfs's whiteout"));
            }
            if major >= 1 << 12 || minor >= 1 << 20 {
                return Err(refuse("its device number does not exist"));
            }
            Kind::Device { block, major, minor }
        }
        EntryType::Fifo => Kind::Fifo,
        _ => return Err(refuse("its type is unknown")),
    };
    if path.is_empty() && kind != Kind::Directory {
        return Err(refuse("the root is a directory"));
    }
    meta.xattrs = xattrs(entry).map_err(refuse)?;
    Ok(Entry { path, kind, meta })
}

/// The part of a clean path before its last component, and that component.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// A path relative to the layer's root without `.`, `..` and empty components. One that climbs out is refused, as Docker does
/// (containerd would pin it to the root: nobody's image needs either).
fn clean(path: &[u8], limits: &Limits) -> Result<Vec<u8>, &'static str> {
    if path.len() > limits.path_bytes {
        return Err("its path is too long");
    }
    if path.contains(&0) {
        return Err("its path has a zero byte");
    }
    let mut clean = Vec::with_capacity(path.len());
    let mut depth = 0;
    for component in path.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." if depth == 0 => return Err("its path climbs out of the layer"),
            b".." => {
                clean.truncate(split(&clean).0.len());
                depth -= 1;
            }
            component => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(component);
                depth += 1;
            }
        }
    }
    if depth > limits.path_depth { Err("its path is too deep") } else { Ok(clean) }
}

fn sparse_file(entry: &ParsedEntry<'_>, sparse: Option<(&[SparseEntry], u64)>, limits: &Limits) -> Result<Kind, &'static str> {
    let (map, size) = sparse.unwrap_or((&[], 0));
    if !matches!(entry.entry_type, EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse) {
        return Err("only a file has holes");
    }
    let mut at = 0;
    let mut data = 0u64;
    for piece in map {
        let end = piece.offset.checked_add(piece.length).filter(|&end| end <= size && piece.offset >= at);
        at = end.ok_or("its map of holes is out of order")?;
        data += piece.length;
    }
    if data != entry.size {
        return Err("its map of holes does not fit its content");
    }
    if size > limits.layer_bytes {
        return Err("it is larger than a layer may be");
    }
    Ok(Kind::Sparse { map: map.iter().map(|piece| (piece.offset, piece.length)).collect(), size })
}

/// Extended attributes that a layer may bring. What overlayfs itself reads from there would be a forgery; what a security
/// module of the build machine wrote is no business of this one.
fn xattrs(entry: &ParsedEntry<'_>) -> Result<Vec<(CString, Vec<u8>)>, &'static str> {
    let mut kept = Vec::new();
    for (key, value) in &entry.xattrs {
        if key.starts_with(b"trusted.overlay.") {
            return Err("it carries overlayfs's own attributes");
        }
        let ours = key.starts_with(b"user.") && !key.starts_with(b"user.overlay.");
        let known = matches!(key.as_ref(), b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default");
        if ours || known {
            let key = CString::new(key.to_vec()).map_err(|_| "an attribute's name has a zero byte")?;
            kept.push((key, value.to_vec()));
        }
    }
    Ok(kept)
}

/// Walks the extended header strictly (the parser lets a malformed tail pass) and gives its mtime. `<length> <key>=<value>\n`,
/// POSIX pax, "pax Extended Header".
fn pax(data: Option<&[u8]>) -> Result<Option<Timespec>, &'static str> {
    const BAD: &str = "its extended header is malformed";
    let mut rest = data.unwrap_or(&[]);
    let mut mtime = None;
    while !rest.is_empty() {
        let space = rest.iter().position(|&b| b == b' ').ok_or(BAD)?;
        let length: usize = number(&rest[..space]).and_then(|n| n.try_into().ok()).ok_or(BAD)?;
        let record = rest.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(BAD)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or(BAD)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"mtime" => mtime = Some(timestamp(value).ok_or(BAD)?),
            b"size" | b"uid" | b"gid" | b"GNU.sparse.size" | b"GNU.sparse.realsize" | b"GNU.sparse.major" | b"GNU.sparse.minor" => {
                number(value).ok_or(BAD)?;
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    Ok(mtime)
}

/// Decimal digits and nothing else.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with a sign and a fraction; digits beyond nanoseconds are cut.
fn timestamp(text: &[u8]) -> Option<Timespec> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|&b| b == b'.');
    let (whole, fraction) = dot.map_or((text, &[][..]), |dot| (&text[..dot], &text[dot + 1..]));
    let seconds = i64::try_from(number(whole)?).ok()?;
    let mut nanos = 0i64;
    for i in 0..9 {
        nanos = nanos * 10 + fraction.get(i).map_or(0, |b| i64::from(b.wrapping_sub(b'0')));
    }
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(match (negative, nanos) {
        (false, nanos) => Timespec { tv_sec: seconds, tv_nsec: nanos },
        (true, 0) => Timespec { tv_sec: -seconds, tv_nsec: 0 },
        (true, nanos) => Timespec { tv_sec: -seconds - 1, tv_nsec: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_kept_inside() {
        let check = |path: &str, expected: Option<&str>| {
            let cleaned = clean(path.as_bytes(), &Limits::default()).ok();
            assert_eq!(cleaned.as_deref().map(|p| std::str::from_utf8(p).unwrap()), expected, "{path:?}");
        };
        check("usr/bin/env", Some("usr/bin/env"));
        check("./usr//bin/./env/", Some("usr/bin/env"));
        check("/etc/passwd", Some("etc/passwd"));
        check("a/../b", Some("b"));
        check("a/b/../../c/d", Some("c/d"));
        check("a/..", Some(""));
        check("./", Some(""));
        check("/", Some(""));
        check("..", None);
        check("../etc", None);
        check("a/../../etc", None);
        check("/..", None);
        check("a\0b", None);
        check(&"a/".repeat(257), None);
        check(&"a".repeat(5000), None);
    }

    #[test]
    fn times_have_signs_and_fractions() {
        let check = |text: &str, expected: Option<(i64, i64)>| {
            assert_eq!(timestamp(text.as_bytes()).map(|t| (t.tv_sec, t.tv_nsec)), expected, "{text}");
        };
        check("0", Some((0, 0)));
        check("1700000000.123456789", Some((1_700_000_000, 123_456_789)));
        check("5.5", Some((5, 500_000_000)));
        check("5.1234567891", Some((5, 123_456_789)));
        check("-1", Some((-1, 0)));
        check("-1.25", Some((-2, 750_000_000)));
        for bad in ["", "-", ".5", "1.x", "1e9", "+1", "99999999999999999999"] {
            check(bad, None);
        }
    }

    #[test]
    fn extended_headers_are_walked_strictly() {
        let check = |data: &str, expected: Result<bool, ()>| {
            assert_eq!(pax(Some(data.as_bytes())).map(|t| t.is_some()).map_err(|_| ()), expected, "{data:?}");
        };
        check("", Ok(false));
        check("13 mtime=1.5\n", Ok(true));
        check("12 path=a/b\n10 size=1\n", Ok(false));
        for bad in [
            "garbage",
            "12 path=a/b\n10 size=1\nx",
            "12 path=a/b",
            "9 size=-1\n",
            "10 size=+1\n",
            "5 a\n",
            "99 path=a\n",
            "0 path=a\n",
            "3 \n\n",
            " a=b\n",
        ] {
            check(bad, Err(()));
        }
    }
}
