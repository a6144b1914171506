//! Tables of network configurations, good and bad.

use super::*;
use crate::errchain::Chain;

fn summary(network: &Network) -> String {
    let plugins: Vec<_> = network.plugins.iter().map(|plugin| plugin.kind.as_str()).collect();
    format!("{} {} {}", network.name, network.version, plugins.join("+"))
}

/// `Ok`: name, version and plugins. `Err`: what the error says.
#[track_caller]
fn check(text: &str, expected: Result<&str, &str>) {
    match (Network::parse(text), expected) {
        (Ok(network), Ok(expected)) => assert_eq!(summary(&network), expected, "{text}"),
        (Err(error), Err(expected)) => assert!(Chain(&error).to_string().contains(expected), "{text}: {}", Chain(&error)),
        (found, expected) => panic!("{text}: {found:?}, expected {expected:?}"),
    }
}

#[test]
fn lists() {
    check(r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#, Ok("a 1.0.0 bridge+portmap"));
    check(r#"{"name":"a","plugins":[{"type":"bridge"}]}"#, Ok("a 0.1.0 bridge"));
    check(r#"{"name":"a","cniVersion":"","plugins":[{"type":"bridge"}]}"#, Ok("a 0.1.0 bridge"));
    check(r#"{"plugins":[{"type":"bridge"}]}"#, Err("name \"\""));
    check(r#"{"name":"../a","plugins":[{"type":"bridge"}]}"#, Err("name \"../a\""));
    check(r#"{"name":7,"plugins":[{"type":"bridge"}]}"#, Err("form of a network"));
    check(r#"{"name":"a"}"#, Err("no plugins"));
    check(r#"{"name":"a","plugins":[]}"#, Err("no plugins"));
    check(r#"{"name":"a","plugins":{}}"#, Err("form of a network"));
    check(r#"{"name":"a","plugins":[{}]}"#, Err("type \"\""));
    for kind in ["../bridge", "/bin/sh", "a/b", "..", "."] {
        check(&format!(r#"{{"name":"a","plugins":[{{"type":"{kind}"}}]}}"#), Err("is no file name"));
    }
    check("", Err("form of a network"));
    check("{", Err("form of a network"));
    check(r#"["a","1.0.0",null,null,null,null,[{"type":"x"}]]"#, Err("not a JSON object"));
    check(r#"{"name":"a","plugins":[["bridge",{}]]}"#, Err("not a JSON object"));
    let many = vec![r#"{"type":"bridge"}"#; MAX_PLUGINS + 1].join(",");
    check(&format!(r#"{{"name":"a","plugins":[{many}]}}"#), Err("more than"));
    check(&format!(r#"{{"name":"{}","plugins":[{{"type":"bridge"}}]}}"#, "a".repeat(MAX_NAME + 1)), Err("at most"));
}

#[test]
fn the_highest_version_spoken_is_chosen() {
    let check = |keys: &str, expected: Result<&str, &str>| check(&format!(r#"{{"name":"a",{keys},"plugins":[{{"type":"x"}}]}}"#), expected);
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        check(&format!(r#""cniVersion":"{version}""#), Ok(&format!("a {version} x")));
    }
    check(r#""cniVersion":"1.0.0","cniVersions":["0.4.0","1.1.0","2.0.0"]"#, Ok("a 1.1.0 x"));
    check(r#""cniVersions":["0.4.0","0.3.1"]"#, Ok("a 0.4.0 x"));
    check(r#""cniVersion":"2.0.0","cniVersions":["0.4.0"]"#, Ok("a 0.4.0 x"));
    check(r#""cniVersion":"2.0.0""#, Err("cniVersion \"2.0.0\""));
    check(r#""cniVersion":"0.5.0","cniVersions":["x"]"#, Err("cniVersion \"0.5.0, x\""));
    check(r#""cniVersion":1"#, Err("form of a network"));
}

#[test]
fn switches_are_booleans_or_say_so() {
    let check = |value: &str, expected: Option<bool>| {
        let text = format!(r#"{{"name":"a","disableCheck":{value},"disableGC":{value},"plugins":[{{"type":"x"}}]}}"#);
        let found = Network::parse(&text).ok();
        assert_eq!(found.as_ref().map(|network| network.disable_check), expected, "{value}");
        assert_eq!(found.map(|network| network.disable_gc), expected, "{value}");
    };
    check("true", Some(true));
    check("false", Some(false));
    check("null", Some(false));
    check("\"True\"", Some(true));
    check("\"false\"", Some(false));
    check("\"yes\"", None);
    check("1", None);
}

#[test]
fn plugins_keep_their_keys_as_they_were_written() {
    let text = r#"{"name":"a","plugins":[{"type":"x","big":12345678901234567890123,"float":1.50,"z":{"b":1,"a":2},
        "capabilities":{"portMappings":true,"mac":false}}]}"#;
    let network = Network::parse(text).unwrap();
    let plugin = &network.plugins[0];
    assert_eq!(plugin.keys["big"].get(), "12345678901234567890123");
    assert_eq!(plugin.keys["float"].get(), "1.50");
    assert_eq!(plugin.keys["z"].get(), r#"{"b":1,"a":2}"#);
    assert_eq!(plugin.capabilities, ["portMappings"]);
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self(dir)
    }
}

const A: &str = r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;
const B: &str = r#"{"name":"b","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}"#;

#[test]
fn the_first_valid_file_wins() {
    let check = |files: &[(&str, &str)], name: Option<&str>, network: Option<&str>, bad: &[&str]| {
        let dir = Dir::new(files);
        let found = Directory::load(dir.0.path(), name);
        assert_eq!(found.network.as_ref().map(summary).as_deref(), network, "{files:?}");
        let names: Vec<_> = found.bad.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, bad, "{files:?}");
    };
    check(&[("10-a.conflist", A), ("20-b.conflist", B)], None, Some("a 1.0.0 bridge"), &[]);
    check(&[("30-a.conflist", A), ("20-b.conflist", B)], None, Some("b 1.0.0 ptp"), &[]);
    check(&[("10-a.conflist", A), ("20-b.conflist", B)], Some("b"), Some("b 1.0.0 ptp"), &[]);
    check(&[("10-a.conflist", A)], Some("c"), None, &[]);
    check(&[("10-x.conflist", "{"), ("20-b.conflist", B)], None, Some("b 1.0.0 ptp"), &["10-x.conflist"]);
    check(&[("10-x.conflist", "{"), ("20-y.conf", "")], None, None, &["10-x.conflist", "20-y.conf"]);
    check(&[("10-a.conflist.bak", A), ("README", "x"), (".swp", "x")], None, None, &[]);
    check(&[("10-a.conf", r#"{"name":"s","cniVersion":"0.2.0","type":"macvlan"}"#), ("20-a.conflist", A)], None, Some("s 0.2.0 macvlan"), &[]);
    check(&[("10-a.json", r#" {"name":"s","type":"macvlan"} "#)], None, Some("s 0.1.0 macvlan"), &[]);
    // A conflist under the wrong name is a plugin without a type.
    check(&[("10-a.conf", A)], None, None, &["10-a.conf"]);
    // A directory with a configuration's name is none.
    check(&[("10-d.conflist/x", "x"), ("20-b.conflist", B)], None, Some("b 1.0.0 ptp"), &[]);
}

#[test]
fn plugins_beside_a_list() {
    let check = |list: &str, expected: Option<&str>| {
        let ptp = r#"{"type":"ptp","mtu":1400}"#;
        let dir = Dir::new(&[("10.conflist", list), ("n/20.conf", r#"{"type":"tuning"}"#), ("n/10.conf", ptp), ("n/30.json", "{")]);
        let found = Directory::load(dir.0.path(), None).network;
        assert_eq!(found.as_ref().map(summary).as_deref(), expected, "{list}");
        if let Some(network) = found {
            // What is kept stands alone.
            assert_eq!(Some(summary(&Network::parse(&network.json).unwrap()).as_str()), expected);
        }
    };
    check(r#"{"name":"n","cniVersion":"1.1.0"}"#, Some("n 1.1.0 ptp+tuning"));
    check(r#"{"name":"n","cniVersion":"1.1.0","plugins":[{"type":"bridge"}]}"#, Some("n 1.1.0 bridge+ptp+tuning"));
    check(r#"{"name":"n","loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"}]}"#, Some("n 0.1.0 bridge"));
    check(r#"{"name":"n","loadOnlyInlinedPlugins":true}"#, None);
    check(r#"{"name":"m"}"#, None);
}

#[test]
fn files_that_are_none_are_refused_at_once() {
    let dir = Dir::new(&[("20-b.conflist", B), ("15-big.conflist", &" ".repeat(MAX_FILE as usize + 1))]);
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.0.path().join("10-fifo.conflist"), Mode::RUSR).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.0.path().join("12-link.conflist")).unwrap();
    let found = Directory::load(dir.0.path(), None);
    assert_eq!(found.network.as_ref().map(summary).as_deref(), Some("b 1.0.0 ptp"));
    let names: Vec<_> = found.bad.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["10-fifo.conflist", "12-link.conflist", "15-big.conflist"]);
}

#[test]
fn a_plugin_is_a_file_that_can_be_executed() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::new(&[("a/bridge", ""), ("b/bridge", ""), ("c/bridge/x", "")]);
    let dirs: Vec<_> = ["none", "c", "a", "b"].iter().map(|name| dir.0.path().join(name)).collect();
    assert_eq!(find("bridge", &dirs), None);
    std::fs::set_permissions(dirs[3].join("bridge"), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(find("bridge", &dirs), Some(dirs[3].join("bridge")));
}
