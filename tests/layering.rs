//! The tree's fences: who may import whom, where unsafe code lives, how long a file may get, what the monitor links.
//!
//! The map is in `src/lib.rs`. A module that needs an import its row lacks is usually in the wrong place; change the
//! row only together with the map.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What each top-level module may import of the others.
const IMPORTS: &[(&str, &[&str])] = &[
    // Shared by all binaries.
    ("wire", &[]),
    ("errchain", &["wire"]),
    ("ids", &[]),
    ("plan", &["wire"]),
    ("monitor_api", &["plan", "wire", "errchain"]),
    ("sys", &["errchain"]),
    ("cgroup", &["sys", "plan", "errchain"]),
    ("seccomp", &["sys", "plan", "errchain"]),
    ("oci", &["plan", "sys", "cgroup", "errchain", "wire", "ids", "seccomp"]),
    ("monitor", &["oci", "plan", "monitor_api", "cgroup", "sys", "wire", "errchain", "ids"]),
    // The daemon's.
    ("telemetry", &["config", "errchain"]),
    ("model", &["ids", "plan", "wire", "errchain"]),
    ("config", &["model", "plan", "errchain"]),
    ("image", &["model", "config", "sys", "errchain", "ids"]),
    ("net", &["model", "config", "sys", "errchain", "ids"]),
    ("store", &["model", "config", "sys", "errchain", "ids"]),
    (
        "service",
        &[
            "model",
            "config",
            "telemetry",
            "store",
            "net",
            "image",
            "seccomp",
            "oci",
            "cgroup",
            "sys",
            "plan",
            "monitor_api",
            "wire",
            "errchain",
            "ids",
        ],
    ),
    ("stream", &["service", "model", "errchain"]),
    ("api", &[]),
    ("cri", &["service", "stream", "store", "net", "image", "model", "cgroup", "api", "errchain", "ids"]),
    (
        "daemon",
        &[
            "cri",
            "api",
            "client",
            "stream",
            "service",
            "store",
            "net",
            "image",
            "model",
            "config",
            "telemetry",
            "seccomp",
            "cgroup",
            "sys",
            "plan",
            "monitor_api",
            "wire",
            "errchain",
            "ids",
        ],
    ),
    // The administration, a client of the daemon's own socket.
    ("client", &["api", "config", "errchain"]),
    ("admin", &["client", "api", "config", "errchain"]),
    // The programs, which import the library by its name.
    ("main.rs", &["daemon", "admin", "config", "telemetry", "errchain", "model", "api"]),
    ("bin/copepod-monitor.rs", &["monitor"]),
    ("bin/copepod-oci.rs", &["oci"]),
];

/// Imports that are narrower than their row: of the second module the first may name these parts only. `cri` translates
/// what the modules below `service` describe, and calls nothing of theirs.
const ONLY: &[(&str, &str, &[&str])] = &[
    ("service", "oci", &["from_spec"]),
    ("cri", "image", &["Credentials", "FsInfo", "Image", "ImageError"]),
    ("cri", "store", &["record"]),
    ("cri", "cgroup", &["Pressure", "PressureShare"]),
    ("cri", "net", &["stats"]),
];

/// Crates that the monitor, of which there is one per pod, is not to link.
const NOT_IN_THE_MONITOR: &[&str] =
    &["clap", "h2", "hyper", "prost", "reqwest", "rustls", "serde", "serde_json", "tokio", "toml", "tonic", "tracing"];

const LONGEST_FILE: usize = 600;

#[test]
fn imports_go_downward() {
    let mut wrong = Vec::new();
    for file in sources("src") {
        let Some(module) = module_of(&file) else { continue };
        let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{}: module `{module}` has no row in tests/layering.rs", file.display()));
            continue;
        };
        for (imported, part) in imports(&without_tests(&code(&read(&file))), &file) {
            if imported == module || !is_module(&imported) {
                continue;
            }
            if !allowed.contains(&imported.as_str()) {
                wrong.push(format!("{}: `{module}` must not import `{imported}`", file.display()));
            }
            for (_, _, only) in ONLY.iter().filter(|(from, to, _)| *from == module && *to == imported) {
                if !only.contains(&part.as_str()) {
                    wrong.push(format!("{}: of `{imported}`, `{module}` may import {only:?} only, not `{part}`", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_in_sys_only() {
    let wrong: Vec<_> = sources("src")
        .into_iter()
        .filter(|file| !file.starts_with("src/sys") && identifiers(&code(&read(file))).any(|word| word == "unsafe"))
        .collect();
    assert!(wrong.is_empty(), "unsafe code outside src/sys: {wrong:?}");
}

#[test]
fn files_stay_short() {
    let wrong: Vec<_> = ["src", "tests"]
        .iter()
        .flat_map(|directory| sources(directory))
        .map(|file| (read(&file).lines().count(), file))
        .filter(|(lines, _)| *lines > LONGEST_FILE)
        .collect();
    assert!(wrong.is_empty(), "longer than {LONGEST_FILE} lines: {wrong:?}");
}

#[test]
#[allow(clippy::disallowed_methods, reason = "cargo is no part of the product, whose one way to start programs this would not be")]
fn the_monitor_links_none_of_the_daemons_crates() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["tree", "--locked", "-e", "normal", "--no-default-features", "--prefix", "none", "--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    let crates: BTreeSet<_> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains("rustix"), "not the tree of this package: {tree}");
    let wrong: Vec<_> = NOT_IN_THE_MONITOR.iter().filter(|name| crates.contains(*name)).collect();
    assert!(wrong.is_empty(), "the monitor links {wrong:?}:\n{tree}");
}

#[test]
fn the_reader_of_imports_sees_every_form() {
    fn check(source: &str, expected: &[(&str, &str)]) {
        let found = imports(&without_tests(&code(source)), Path::new("src/net/cni.rs"));
        let expected: BTreeSet<_> = expected.iter().map(|(module, part)| (module.to_string(), part.to_string())).collect();
        assert_eq!(found, expected, "{source}");
    }
    check("use crate::sys::fd;", &[("sys", "fd")]);
    check("use crate::{ids::Id, sys::{fd, mount::{self, Flags}}};", &[("ids", "Id"), ("sys", "fd"), ("sys", "mount")]);
    check("use crate::{\n    errchain,\n    plan,\n};", &[("errchain", ""), ("plan", "")]);
    check("fn f() { crate::wire::decode(x) }", &[("wire", "decode")]);
    check("// use crate::sys;\n/* crate::oci */ let a = \"crate::net\"; let b = r#\"crate::image \" \"#;", &[]);
    check("use crate::sys; let c = '\"'; use crate::ids; let d: &'a str = '\\'';", &[("sys", ""), ("ids", "")]);
    check("use crate::ids;\n#[cfg(test)]\nmod tests { use crate::monitor; }", &[("ids", "")]);
}

/// The top-level module that a file of `src/` belongs to; a program is its own. `lib.rs` only declares, and a file of
/// unit tests may name anything.
fn module_of(file: &Path) -> Option<String> {
    if file.file_stem()?.to_str()?.ends_with("tests") {
        return None;
    }
    let inside = file.strip_prefix("src").ok()?;
    let first = inside.iter().next()?.to_str()?;
    match first {
        "lib.rs" => None,
        "main.rs" | "bin" => Some(inside.to_str()?.to_owned()),
        _ => Some(first.strip_suffix(".rs").unwrap_or(first).to_owned()),
    }
}

fn is_module(name: &str) -> bool {
    IMPORTS.iter().any(|(module, _)| *module == name)
}

/// Each (module, what follows it in the path) that the code names by `crate::`, by the library's name in a program, or by
/// `super::` where that is the root.
fn imports(code: &str, file: &Path) -> BTreeSet<(String, String)> {
    let inside = file.strip_prefix("src").unwrap_or(file);
    let root = match inside.iter().next().and_then(|first| first.to_str()) {
        Some("main.rs" | "bin") => "copepod",
        _ => "crate",
    };
    let below_the_root = inside.iter().count() == 1 || (inside.iter().count() == 2 && inside.ends_with("mod.rs"));
    let mut found = BTreeSet::new();
    for prefix in [root, "super"].into_iter().filter(|prefix| *prefix != "super" || below_the_root) {
        let path = format!("{prefix}::");
        for (at, _) in code.match_indices(&path) {
            if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                found.extend(heads(&code[at + path.len()..]));
            }
        }
    }
    found
}

/// The first two steps of the path, or of every path of the group, that the text begins with.
fn heads(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for path in members(text) {
        let module = first_identifier(path);
        if module.is_empty() {
            continue;
        }
        match path[module.len()..].strip_prefix("::") {
            Some(rest) => found.extend(members(rest).into_iter().map(|member| (module.to_owned(), first_identifier(member).to_owned()))),
            None => found.push((module.to_owned(), String::new())),
        }
    }
    found
}

/// The paths of the group that the text begins with; without a group the text itself.
fn members(text: &str) -> Vec<&str> {
    let Some(group) = text.strip_prefix('{') else { return vec![text] };
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.push(group[start..at].trim());
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found.retain(|path| !path.is_empty());
    found
}

fn first_identifier(text: &str) -> &str {
    &text[..text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len())]
}

fn identifiers(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// The text up to its unit tests, which stand at the end of a file and may name anything.
fn without_tests(code: &str) -> String {
    let end = code.find("#[cfg(test)]\nmod tests").unwrap_or(code.len());
    code[..end].to_owned()
}

/// A Rust source without its comments and without what its string and character literals say.
fn code(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skipped = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            '"' => quoted(rest, 1),
            'r' if !out.ends_with(|c: char| c.is_alphanumeric() || c == '_') => raw_string(rest).unwrap_or(0),
            // A character literal, as opposed to a lifetime, has its second quote right after.
            '\'' if rest[1..].starts_with('\\') => rest[3..].find('\'').map_or(rest.len(), |end| end + 4),
            '\'' if rest[1..].chars().nth(1) == Some('\'') => 2 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => 0,
        };
        if skipped == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            rest = &rest[skipped..];
        }
    }
    out
}

/// The length of the string literal that begins `start` bytes before its content.
fn quoted(text: &str, start: usize) -> usize {
    let mut escaped = false;
    for (at, c) in text[start..].char_indices() {
        match c {
            '"' if !escaped => return start + at + 1,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    text.len()
}

/// The length of the raw string literal that the text begins with.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text[1..].chars().take_while(|c| *c == '#').count();
    text[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let content = 2 + hashes;
    Some(text[content..].find(&close).map_or(text.len(), |end| content + end + close.len()))
}

fn read(file: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust file beneath a directory of the package, by its path in the package.
fn sources(directory: &str) -> Vec<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut open = vec![package.join(directory)];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(package).expect("a file of the package").to_owned());
            }
        }
    }
    found.sort();
    found
}
