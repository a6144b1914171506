use std::ffi::CString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tar_core::builder::EntryBuilder;
use tar_core::{EntryType, SparseEntry};

use super::*;
use crate::errchain::Chain;
use crate::testing;

/// An archive in the making. Its methods are in the order of an entry's parts: type, path, what else it needs.
#[derive(Default, Clone)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: EntryType, path: &str, content: &[u8], more: impl FnOnce(&mut EntryBuilder)) -> Self {
        let mut builder = EntryBuilder::new_ustar();
        builder.path(path).entry_type(kind);
        builder.mode(0o644).unwrap().size(content.len() as u64).unwrap().mtime(1000).unwrap();
        more(&mut builder);
        self.0.extend_from_slice(&builder.finish_bytes());
        self.raw(content)
    }

    fn raw(mut self, content: &[u8]) -> Self {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, path, content.as_bytes(), |_| {})
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, b"", |b| _ = b.mode(0o755).unwrap())
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, b"", |b| _ = b.link_name(target))
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, b"", |b| _ = b.link_name(target))
    }

    fn pax(self, path: &str, content: &str, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, content.as_bytes(), |b| _ = b.add_pax(key, value))
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// A layer's directory with a neighbour that nothing may touch.
struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("layer")).unwrap();
        std::fs::create_dir(directory.path().join("outside")).unwrap();
        std::fs::write(directory.path().join("outside/canary"), "alive").unwrap();
        Self { directory }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("layer").join(path)
    }

    fn unpack(&self, bytes: &[u8], limits: &Limits) -> Result<Unpacked, UnpackError> {
        let root = std::fs::File::open(self.path("")).unwrap().into();
        // Odd pieces, so that every boundary falls somewhere.
        let mut pieces = bytes.chunks(777);
        unpack(root, &mut Pieces::new(|| pieces.next()), limits)
    }

    /// What is outside and what is in it, with everything an attacker could change.
    fn outside(&self) -> Vec<(PathBuf, u32, i64, u64)> {
        let mut seen = Vec::new();
        for path in ["outside", "outside/canary"] {
            let path = self.directory.path().join(path);
            let m = std::fs::symlink_metadata(&path).unwrap();
            seen.push((path, m.mode(), m.mtime_nsec(), m.nlink() << 32 | m.uid() as u64));
        }
        assert_eq!(std::fs::read_to_string(self.directory.path().join("outside/canary")).unwrap(), "alive");
        assert_eq!(std::fs::read_dir(self.directory.path().join("outside")).unwrap().count(), 1);
        seen
    }
}

fn unpacked(tar: Tar) -> (Bench, Unpacked) {
    let bench = Bench::new();
    let unpacked = bench.unpack(&tar.end(), &Limits::default()).unwrap_or_else(|e| panic!("{}", Chain(&e)));
    (bench, unpacked)
}

/// The archive is refused with a text that holds `part`, and nothing outside has changed.
fn refused(tar: Tar, part: &str) {
    let bench = Bench::new();
    let before = bench.outside();
    let error = bench.unpack(&tar.end(), &Limits::default()).expect_err(part);
    let shown = Chain(&error).to_string();
    assert!(shown.contains(part), "{shown:?} does not say {part:?}");
    assert_eq!(bench.outside(), before, "{part}");
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let n = rustix::fs::lgetxattr(path, name, &mut buffer[..]).ok()?;
    buffer.truncate(n);
    Some(buffer)
}

fn is_whiteout(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

#[test]
fn files_keep_what_the_archive_says() {
    if !testing::root("files_keep_what_the_archive_says") {
        return;
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let tar = Tar::default()
        .entry(EntryType::Directory, "./", b"", |b| _ = b.mode(0o751).unwrap().mtime(77).unwrap())
        .entry(EntryType::Directory, "d/", b"", |b| _ = b.mode(0o3711).unwrap().uid(7).unwrap().gid(8).unwrap().mtime(1234).unwrap())
        .entry(EntryType::Regular, "d/suid", b"#!", |b| _ = b.mode(0o6755).unwrap().uid(0).unwrap().gid(42).unwrap())
        .entry(EntryType::Regular, "d/owned", b"x", |b| _ = b.uid(70000).unwrap().add_pax("mtime", "1700000000.123456789"))
        .entry(EntryType::Regular, "d/capable", b"x", |b| _ = b.add_pax("SCHILY.xattr.security.capability", capability))
        .entry(EntryType::Regular, "d/user", b"x", |b| {
            b.add_pax("SCHILY.xattr.user.a", b"v\0w").add_pax("SCHILY.xattr.security.selinux", "skipped").add_pax("mtime", "-1.25");
        })
        .entry(EntryType::Symlink, "d/link", b"", |b| _ = b.link_name("/../any where").uid(9).unwrap())
        .entry(EntryType::Char, "d/null", b"", |b| _ = b.mode(0o666).unwrap().device(1, 3).unwrap())
        .entry(EntryType::Block, "d/block", b"", |b| _ = b.device(7, 300).unwrap())
        .entry(EntryType::Fifo, "d/fifo", b"", |_| {})
        .link("d/hard", "./d/suid")
        .file(&format!("{}/long", "n".repeat(200)), "long");
    let digest = Digest::of(&tar.clone().end());
    let (bench, unpacked) = unpacked(tar);
    let meta = |path: &str| std::fs::symlink_metadata(bench.path(path)).unwrap();

    assert_eq!((meta("").mode() & 0o7777, meta("").mtime()), (0o751, 77));
    assert_eq!((meta("d").mode() & 0o7777, meta("d").uid(), meta("d").gid(), meta("d").mtime()), (0o3711, 7, 8, 1234));
    assert_eq!((meta("d/suid").mode() & 0o7777, meta("d/suid").gid(), meta("d/suid").nlink()), (0o6755, 42, 2));
    assert_eq!((meta("d/owned").uid(), meta("d/owned").mtime(), meta("d/owned").mtime_nsec()), (70000, 1_700_000_000, 123_456_789));
    // Not the setgid directory's group.
    assert_eq!(meta("d/owned").gid(), 0);
    assert_eq!(xattr(&bench.path("d/capable"), "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(xattr(&bench.path("d/user"), "user.a").as_deref(), Some(&b"v\0w"[..]));
    assert_eq!(xattr(&bench.path("d/user"), "security.selinux"), None);
    assert_eq!((meta("d/user").mtime(), meta("d/user").mtime_nsec()), (-2, 750_000_000));
    assert_eq!(std::fs::read_link(bench.path("d/link")).unwrap(), Path::new("/../any where"));
    assert_eq!((meta("d/link").uid(), meta("d/link").mtime()), (9, 1000));
    assert_eq!((meta("d/null").rdev(), meta("d/null").mode() & 0o777), (rustix::fs::makedev(1, 3), 0o666));
    assert_eq!(meta("d/block").rdev(), rustix::fs::makedev(7, 300));
    assert!(meta("d/fifo").file_type().is_fifo());
    assert_eq!(meta("d/hard").ino(), meta("d/suid").ino());
    assert_eq!(std::fs::read_to_string(bench.path(&format!("{}/long", "n".repeat(200)))).unwrap(), "long");
    assert_eq!(unpacked.diff_id, digest);
    assert_eq!(unpacked.compressed, digest);
    assert_eq!(unpacked.implied, ["n".repeat(200)]);
    assert!(!unpacked.opaque);
    assert_eq!(unpacked.inodes, 12);
}

#[test]
fn nothing_leaves_the_layer() {
    if !testing::root("nothing_leaves_the_layer") {
        return;
    }
    let t = Tar::default;
    refused(t().file("../outside/canary", "dead"), "climbs out");
    refused(t().file("a/../../outside/canary", "dead"), "climbs out");
    refused(t().link("x", "../outside/canary"), "climbs out");
    refused(t().link("x", "/../outside/canary"), "climbs out");
    // By a link of the layer's own: it is followed inside the layer, as if this were the root.
    let escape = |tar: Tar| {
        let bench = Bench::new();
        let before = bench.outside();
        let result = bench.unpack(&tar.end(), &Limits::default());
        assert_eq!(bench.outside(), before, "{:?}", result.map_err(|e| Chain(&e).to_string()));
        bench
    };
    let outside = Bench::new().directory.path().join("outside").display().to_string();
    let bench = escape(t().symlink("up", "../outside").file("up/canary", "inside"));
    assert_eq!(std::fs::read_to_string(bench.path("outside/canary")).unwrap(), "inside");
    escape(t().symlink("up", &outside).file("up/canary", "dead"));
    escape(t().symlink("a", "..").symlink("a/b", "..").file("a/b/outside/canary", "dead"));
    escape(t().symlink("up", "../outside").dir("up"));
    escape(t().symlink("up", "../outside").dir("up/").file("up/x", ""));
    escape(t().symlink("up", "../outside/canary").file("up", "replaced"));
    escape(t().symlink("up", "../outside").link("x", "up/canary").file("x", "dead"));
    escape(t().symlink("up", "../outside/canary").link("x", "up").entry(EntryType::Regular, "x", b"dead", |_| {}));
    escape(t().symlink("up", "../outside").file("up/.wh.canary", "").file("up/.wh..wh..opq", ""));
    escape(t().symlink("up", "/proc/self/root/tmp").file("up/x", "dead"));
    escape(t().dir("d").symlink("d", "../outside").entry(EntryType::Directory, "d", b"", |b| _ = b.mode(0o777).unwrap()));
    let bench = escape(t().dir("d/e").symlink("d", "../outside").file("d/f", "in"));
    assert_eq!(std::fs::read_to_string(bench.path("outside/f")).unwrap(), "in");
    refused(t().symlink("loop", "loop").file("loop/x", ""), "Too many levels");
    refused(t().file("f", "").file("f/x", ""), "Not a directory");
}

#[test]
fn entries_that_no_layer_may_have_are_refused() {
    if !testing::root("entries_that_no_layer_may_have_are_refused") {
        return;
    }
    let t = Tar::default;
    let large = u64::from(u32::MAX);
    refused(t().entry(EntryType::Char, "fake", b"", |b| _ = b.device(0, 0).unwrap()), "overlayfs's whiteout");
    refused(t().pax("x", "", "SCHILY.xattr.trusted.overlay.opaque", "y"), "overlayfs's own");
    refused(t().pax("x", "", "SCHILY.xattr.trusted.overlay.redirect", "/etc"), "overlayfs's own");
    refused(t().entry(EntryType::Regular, "x", b"", |b| _ = b.uid(large).unwrap()), "no user id");
    refused(t().entry(EntryType::Regular, "x", b"", |b| _ = b.gid(large + 1).unwrap()), "no group id");
    refused(t().pax("x", "", "uid", "4294967296"), "no user id");
    refused(t().pax("x", "", "uid", "-1"), "malformed");
    refused(t().pax("x", "", "size", "99999999999999999999"), "malformed");
    refused(t().pax("x", "", "path", "a\0b"), "zero byte");
    refused(t().pax("x", "", "path", "a/".repeat(300)), "too deep");
    refused(t().pax("x", "", "path", "a/".repeat(3000)), "exceeds limit");
    refused(t().pax("x", "", "comment", "c".repeat(2 << 20)), "metadata exceeds limit");
    refused(t().pax("x", "", "size", (1u64 << 50).to_string()), "more than");
    refused(t().file(".wh.", ""), "whiteout of nothing");
    refused(t().file("d/.wh...", ""), "whiteout of nothing");
    refused(t().file("./", "x").entry(EntryType::Symlink, ".", b"", |b| _ = b.link_name("/etc")), "root is a directory");
    refused(t().link("x", "missing"), "find the target");
    refused(t().dir("d").link("x", "d"), "cannot link");
    refused(t().file(".wh.gone", "").link("x", "gone"), "find the target");
    refused(t().entry(EntryType::Symlink, "x", b"", |_| {}), "links to nothing");
    refused(t().entry(EntryType::Other(b'Z'), "x", b"", |_| {}), "type is unknown");
    refused(t().file(&"n".repeat(300), ""), "File name too long");
}

#[test]
fn sparse_files_are_bounded_by_their_map() {
    if !testing::root("sparse_files_are_bounded_by_their_map") {
        return;
    }
    let sparse = |map: &[(u64, u64)], size: u64, content: &[u8]| {
        let map: Vec<_> = map.iter().map(|&(offset, length)| SparseEntry { offset, length }).collect();
        let mut builder = EntryBuilder::new_gnu();
        builder.path("s").entry_type(EntryType::GnuSparse).mode(0o644).unwrap().size(content.len() as u64).unwrap();
        builder.sparse(&map, size);
        Tar(builder.finish_bytes()).raw(content)
    };
    let (bench, _) = unpacked(sparse(&[(4096, 3), (1 << 20, 2)], 2 << 20, b"abcde"));
    let content = std::fs::read(bench.path("s")).unwrap();
    assert_eq!((content.len(), &content[4096..4099], &content[1 << 20..(1 << 20) + 2]), (2 << 20, &b"abc"[..], &b"de"[..]));
    assert!(std::fs::metadata(bench.path("s")).unwrap().blocks() * 512 < 64 << 10);
    refused(sparse(&[(0, 6)], 10, b"abcde"), "does not fit");
    refused(sparse(&[(8, 5)], 10, b"abcde"), "out of order");
    refused(sparse(&[(5, 2), (0, 3)], 10, b"abcde"), "out of order");
    refused(sparse(&[(0, 5)], 1 << 60, b"abcde"), "larger than a layer");
    let many = "0,0,".repeat(20_000);
    refused(Tar::default().pax("s", "", "GNU.sparse.map", many), "too many sparse entries");
    let claim = Tar::default().entry(EntryType::Regular, "s", b"4000000000\n", |b| {
        b.add_pax("GNU.sparse.major", "1").add_pax("GNU.sparse.minor", "0").add_pax("GNU.sparse.realsize", "5");
    });
    refused(claim, "too many sparse entries");
}

#[test]
fn whiteouts_become_overlayfs_s() {
    if !testing::root("whiteouts_become_overlayfs_s") {
        return;
    }
    let opaque = |bench: &Bench, path: &str| xattr(&bench.path(path), "trusted.overlay.opaque").as_deref() == Some(b"y");
    let tar = Tar::default()
        .file("d/.wh.gone", "")
        .file("d/.wh..wh..opq", "")
        .file("d/kept", "k")
        .file(".wh.file", "")
        .file("file", "again")
        .file(".wh.dir", "")
        .dir("dir")
        .dir("late")
        .file(".wh.late", "")
        .file("first", "stays")
        .file(".wh.first", "")
        .file(".wh.parent", "")
        .file("parent/child", "c")
        .file(".wh..wh.plnk/1.2", "aufs")
        .file(".wh..wh.aufs", "aufs");
    let (bench, unpacked) = unpacked(tar);
    assert!(is_whiteout(&bench.path("d/gone")) && opaque(&bench, "d"));
    assert_eq!(std::fs::read_to_string(bench.path("d/kept")).unwrap(), "k");
    assert_eq!(std::fs::read_to_string(bench.path("file")).unwrap(), "again");
    assert_eq!(std::fs::read_to_string(bench.path("first")).unwrap(), "stays");
    assert!(opaque(&bench, "dir") && opaque(&bench, "late") && opaque(&bench, "parent"));
    assert!(bench.path("parent/child").exists());
    let names: Vec<_> = std::fs::read_dir(bench.path("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with(".wh.")), "{names:?}");
    assert!(!unpacked.opaque);
    assert!(self::unpacked(Tar::default().file(".wh..wh..opq", "")).1.opaque);
}

#[test]
fn the_last_of_two_entries_wins() {
    if !testing::root("the_last_of_two_entries_wins") {
        return;
    }
    let tar = Tar::default()
        .file("a", "one")
        .file("a", "two")
        .dir("b")
        .file("b/x/y/z", "deep")
        .file("b", "file")
        .symlink("c", "a")
        .file("c", "own")
        .file("d", "file")
        .dir("d")
        .file("d/in", "x")
        .entry(EntryType::Directory, "e", b"", |b| _ = b.mode(0o700).unwrap())
        .entry(EntryType::Directory, "e", b"", |b| _ = b.mode(0o750).unwrap().mtime(5).unwrap())
        .file("h1", "content")
        .entry(EntryType::Link, "h2", b"", |b| _ = b.link_name("h1").mode(0).unwrap().uid(5).unwrap())
        .link("h2", "h1")
        .link("h1", "h1")
        .dir("gone")
        .symlink("gone", "e");
    let (bench, _) = unpacked(tar);
    let read = |path: &str| std::fs::read_to_string(bench.path(path)).unwrap();
    assert_eq!((read("a"), read("b"), read("c"), read("d/in")), ("two".into(), "file".into(), "own".into(), "x".into()));
    let meta = |path: &str| std::fs::symlink_metadata(bench.path(path)).unwrap();
    assert_eq!((meta("e").mode() & 0o7777, meta("e").mtime()), (0o750, 5));
    // A link's entry says nothing about the inode.
    assert_eq!((meta("h1").nlink(), meta("h1").mode() & 0o777, meta("h1").uid()), (2, 0o644, 0));
    assert!(meta("gone").is_symlink());
}

#[test]
fn every_compression_gives_the_same_layer() {
    if !testing::root("every_compression_gives_the_same_layer") {
        return;
    }
    use std::io::Write;
    let mut plain = Tar::default().file("big", &"0123456789".repeat(100_000)).file("small", "s").end();
    // Padding after the end counts.
    plain.resize(plain.len() + 9000, 0);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::stream::encode_all(bytes, 1).unwrap();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd(&plain)].concat();
    let check = |bytes: &[u8]| {
        let bench = Bench::new();
        let unpacked = bench.unpack(bytes, &Limits::default()).unwrap_or_else(|e| panic!("{}", Chain(&e)));
        assert_eq!(unpacked.diff_id, Digest::of(&plain));
        assert_eq!((unpacked.compressed, unpacked.compressed_bytes), (Digest::of(bytes), bytes.len() as u64));
        assert_eq!(std::fs::metadata(bench.path("big")).unwrap().len(), 1_000_000);
    };
    check(&plain);
    check(&gzip(&plain));
    check(&[gzip(&plain[..700]), gzip(&plain[700..])].concat());
    check(&zstd(&plain));
    check(&[zstd(&plain[..5000]), zstd(&plain[5000..])].concat());
    check(&skippable);

    let fails = |bytes: &[u8], part: &str| {
        let error = Bench::new().unpack(bytes, &Limits::default()).expect_err(part);
        assert!(Chain(&error).to_string().contains(part), "{}", Chain(&error));
    };
    fails(&gzip(&plain)[..500], "cannot decompress");
    fails(&zstd(&plain)[..30], "");
    fails(&plain[..plain.len() / 2], "middle of its archive");
    fails(b"BZh91AY", "bzip2");
    fails(b"\xfd7zXZ\0", "xz");
    fails(b"not a tar archive at all, however long it may be".repeat(20).as_slice(), "no valid tar");
    // Without the empty blocks, or with one of them, an archive still ends where its last entry does.
    let short = Tar::default().file("f", "x").0;
    assert!(Bench::new().unpack(&short, &Limits::default()).is_ok());
    assert!(Bench::new().unpack(&[&short[..], &[0; 512]].concat(), &Limits::default()).is_ok());
    assert!(Bench::new().unpack(&[], &Limits::default()).is_ok());
}

#[test]
fn limits_hold() {
    if !testing::root("limits_hold") {
        return;
    }
    let limits = Limits { layer_bytes: 100_000, layer_entries: 3, ..Limits::default() };
    let check = |bytes: &[u8], part: &str| {
        let error = Bench::new().unpack(bytes, &limits).expect_err(part);
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        assert!(error.to_string().contains(part), "{error}");
    };
    check(&Tar::default().file("a", "").file("b", "").file("c", "").file("d", "").end(), "more than 3 entries");
    check(&Tar::default().file("a", &"x".repeat(100_001)).end(), "more than 100000 bytes");
    let bomb = zstd::stream::encode_all(&vec![0u8; 10_000_000][..], 19).unwrap();
    check(&bomb, "more than 100000 bytes");
}

#[test]
fn implied_directories_are_the_lower_layers() {
    if !testing::root("implied_directories_are_the_lower_layers") {
        return;
    }
    let (lowest, _) = unpacked(Tar::default().entry(EntryType::Directory, "tmp", b"", |b| _ = b.mode(0o1777).unwrap().uid(3).unwrap()).dir("hidden"));
    let (middle, _) = unpacked(Tar::default().entry(EntryType::Directory, "./", b"", |b| _ = b.mode(0o700).unwrap()).file("hidden", "file"));
    let (top, made) = unpacked(Tar::default().file("tmp/new/x", "").file("hidden/y", ""));
    assert_eq!(made.implied, ["", "tmp", "tmp/new", "hidden"]);
    use std::os::fd::AsFd;
    let open = |bench: &Bench| OwnedFd::from(std::fs::File::open(bench.path("")).unwrap());
    settle_implied(open(&top).as_fd(), &made.implied, &[open(&middle), open(&lowest)]).unwrap();
    let mode = |path: &str| std::fs::metadata(top.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("tmp"), mode("tmp/new"), mode("hidden")), (0o700, 0o1777, 0o755, 0o755));
    assert_eq!(std::fs::metadata(top.path("tmp")).unwrap().uid(), 3);
}

#[test]
fn deep_trees_are_deleted() {
    if !testing::root("deep_trees_are_deleted") {
        return;
    }
    let mut tar = Tar::default();
    // Links into the depths make a tree deeper than any path: each entry's path stays short.
    for i in 0..10 {
        let into = if i == 0 { String::new() } else { format!("l{}/", i - 1) };
        for depth in 1..=200 {
            tar = tar.dir(&format!("{into}{}", "d/".repeat(depth))).file(&format!("{into}{}f", "d/".repeat(depth)), "x");
        }
        tar = tar.symlink(&format!("l{i}"), &format!("{into}{}", "d/".repeat(200)));
    }
    let (bench, _) = unpacked(tar);
    use std::os::fd::AsFd;
    let parent = std::fs::File::open(bench.directory.path()).unwrap();
    remove::remove_at(parent.as_fd(), "layer".as_ref()).unwrap();
    remove::remove_at(parent.as_fd(), "layer".as_ref()).unwrap();
    assert!(!bench.path("").exists());
    bench.outside();
}

/// Somebody with the same rights swaps directories of the layer for links out of it while it is unpacked.
#[test]
fn a_racing_writer_leads_nowhere() {
    if !testing::root("a_racing_writer_leads_nowhere") {
        return;
    }
    let bench = Bench::new();
    let before = bench.outside();
    let mut tar = Tar::default();
    for i in 0..300 {
        let d = i % 5;
        tar = tar
            .dir(&format!("swap{d}"))
            .file(&format!("swap{d}/canary"), "dead")
            .entry(EntryType::Regular, &format!("swap{d}/sub{i}/f"), b"dead", |b| _ = b.mode(0o4777).unwrap().uid(99).unwrap())
            .symlink(&format!("swap{d}/s"), "x")
            .entry(EntryType::Fifo, &format!("swap{d}/fifo"), b"", |b| _ = b.mode(0o777).unwrap().uid(99).unwrap())
            .link(&format!("swap{d}/h"), &format!("swap{d}/canary"))
            .file(&format!("swap{d}/.wh.w{i}"), "")
            .file(&format!("swap{d}/.wh..wh..opq"), "");
    }
    let bytes = tar.end();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let outside = CString::new(bench.directory.path().join("outside").display().to_string()).unwrap();
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let path = bench.path(&format!("swap{}", n % 5));
                let aside = bench.path(&format!("aside{n}"));
                n += 1;
                if std::fs::rename(&path, &aside).is_ok() {
                    let _ = rustix::fs::symlink(outside.as_c_str(), &path);
                    std::thread::yield_now();
                    let _ = std::fs::remove_file(&path);
                    let _ = std::fs::rename(&aside, &path);
                }
                // Sometimes at once, sometimes after a good part of the archive.
                for _ in 0..(n % 61) * 100 {
                    std::hint::spin_loop();
                }
            }
        });
        // It may fail at any entry; it may not lead out.
        let mut finished = 0;
        for _ in 0..100 {
            finished += u32::from(bench.unpack(&bytes, &Limits::default()).is_ok());
            use std::os::fd::AsFd;
            for entry in std::fs::read_dir(bench.path("")).unwrap().flatten() {
                let layer = std::fs::File::open(bench.path("")).unwrap();
                let _ = remove::remove_at(layer.as_fd(), &entry.file_name());
            }
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("{finished} of 100 unpacked to the end");
    });
    assert_eq!(bench.outside(), before);
}
