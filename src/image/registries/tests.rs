//! What files of registries.conf mean, as tables.

use std::path::Path;

use super::super::error::ImageError;
use super::*;
use crate::errchain::Chain;

const CONF: &str = r#"
unqualified-search-registries = ["example.com"]
additional-layer-store-auth-helper = "x"
[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "mirror.local:5000/hub"
insecure = true
[[registry.mirror]]
location = "digests.local"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "tags.local"
pull-from-mirror = "tag-only"

[[registry]]
prefix = "docker.io/blocked"
blocked = true

[[registry]]
location = "plain.local:5000"
insecure = true

[[registry]]
prefix = "old.example.com/team"
location = "new.example.com/staff"
mirror-by-digest-only = true
[[registry.mirror]]
location = "m.example.com/x"

[[registry]]
prefix = "*.wild.example.com"
insecure = true

[[registry]]
prefix = "*.moved.example.com"
location = "to.example.com/moved"

[[registry]]
prefix = "tags.example.com/app:v1"
location = "tags.example.com/app:v1.2"

[[registry]]
prefix = "tags.example.com/app"
location = "elsewhere.example.com/other"
"#;

fn registries(texts: &[&str]) -> Result<Registries, RegistriesError> {
    let mut all = Registries::default();
    for (n, text) in texts.iter().enumerate() {
        all.add(text, Path::new(&format!("{n}.conf")))?;
    }
    Ok(all)
}

fn digest() -> String {
    format!("@sha256:{}", "0".repeat(64))
}

#[test]
fn images_are_sent_to_their_sources() {
    let all = registries(&[CONF]).unwrap();
    let check = |image: &str, expected: &[&str]| {
        let sources = all.sources(&Reference::parse(image).unwrap()).unwrap();
        let shown: Vec<_> = sources
            .iter()
            .map(|s| {
                let tag = s.tag.as_ref().map_or(String::new(), |tag| format!(":{tag}"));
                let (insecure, mirror) = (if s.insecure { " insecure" } else { "" }, if s.mirror { " mirror" } else { "" });
                format!("{}/{}{tag}{insecure}{mirror}", s.host, s.repository)
            })
            .collect();
        assert_eq!(shown, expected, "{image}");
    };
    check(
        "busybox",
        &["mirror.local:5000/hub/library/busybox insecure mirror", "tags.local/library/busybox mirror", "registry-1.docker.io/library/busybox"],
    );
    check(
        &format!("user/app{}", digest()),
        &["mirror.local:5000/hub/user/app insecure mirror", "digests.local/user/app mirror", "registry-1.docker.io/user/app"],
    );
    // With both, the digest decides.
    check(
        &format!("user/app:v1{}", digest()),
        &["mirror.local:5000/hub/user/app insecure mirror", "digests.local/user/app mirror", "registry-1.docker.io/user/app"],
    );
    check("plain.local:5000/a", &["plain.local:5000/a insecure"]);
    check("plain.local/a", &["plain.local/a"]);
    check("plain.local:50000/a", &["plain.local:50000/a"]);
    check("old.example.com/team/app", &["new.example.com/staff/app"]);
    check(&format!("old.example.com/team/app{}", digest()), &["m.example.com/x/app mirror", "new.example.com/staff/app"]);
    check("old.example.com/teams/app", &["old.example.com/teams/app"]);
    check("a.wild.example.com/x", &["a.wild.example.com/x insecure"]);
    check("a.b.wild.example.com:5000/x", &["a.b.wild.example.com:5000/x insecure"]);
    check("wild.example.com/x", &["wild.example.com/x"]);
    check("evilwild.example.com/x", &["evilwild.example.com/x"]);
    check("a.moved.example.com/x/y:t", &["to.example.com/moved/x/y"]);
    check("tags.example.com/app:v1", &["tags.example.com/app:v1.2"]);
    check("tags.example.com/app:v10", &["elsewhere.example.com/other"]);
    check(&format!("tags.example.com/app{}", digest()), &["elsewhere.example.com/other"]);
    check(
        "docker.io/blocker/x",
        &["mirror.local:5000/hub/blocker/x insecure mirror", "tags.local/blocker/x mirror", "registry-1.docker.io/blocker/x"],
    );
    let blocked = all.sources(&Reference::parse("blocked/x").unwrap()).unwrap_err();
    assert_eq!((blocked.kind(), blocked.to_string()), (Kind::PermissionDenied, "registry docker.io/blocked is blocked by 0.conf".into()));
    assert!(all.unknown.is_empty(), "{:?}", all.unknown);
    assert_eq!(all.sources(&Reference::parse("busybox").unwrap()).unwrap()[2].name, "docker.io/library/busybox");
    // A place that no image can be at is an error of the file's.
    let odd = registries(&["[[registry]]\nprefix = \"a.io/b\"\nlocation = \"c.io\"\n"]).unwrap();
    assert_eq!(odd.sources(&Reference::parse("a.io/b").unwrap()).unwrap_err().kind(), Kind::FailedPrecondition);
}

#[test]
fn what_makes_no_sense_is_named() {
    let check = |text: &str, part: &str| {
        let shown = Chain(&registries(&[text]).unwrap_err()).to_string();
        assert!(shown.contains(part) && shown.contains("0.conf"), "{text}: {shown}");
    };
    check("[[registry]]\n", "neither prefix nor location");
    check("[[registry]]\nlocation = 5\n", "line 2");
    check("[[registry]]\nlocation = \"http://a\"\n", "without http://");
    check("[registries.insecure]\nregistries = [\"a\"]\n", "version 1");
    check("[[registry]]\nprefix = \"a.*.b\"\n", "wildcard");
    check("[[registry]]\nprefix = \"a\"\nlocation = \"*.b\"\n", "no wildcard");
    let mirror = |table: &str, mirror: &str| format!("[[registry]]\nprefix = \"a\"\n{table}\n[[registry.mirror]]\n{mirror}\n");
    check(&mirror("mirror-by-digest-only = true", "location = \"b\"\npull-from-mirror = \"all\""), "exclude");
    check(&mirror("", "location = \"b\"\npull-from-mirror = \"never\""), "digest-only or tag-only");
    check(&mirror("pull-from-mirror = \"all\"", "location = \"b\""), "belongs into its mirrors");
    check(&mirror("", ""), "a mirror's location");
    check("[[registry]]\nprefix = \"a\"\nblocked = true\n[[registry]]\nprefix = \"a\"\n", "twice");
    check("unqualified-search-registries = [\"https://a.io\"]\n", "\"https://a.io\" must be a registry's host");
    check("unqualified-search-registries = [\"busybox\"]\n", "\"busybox\"");
    check("short-name-mode = \"ask\"\n", "short-name-mode: \"ask\" must be");
    check("credential-helpers = [\"../x\"]\n", "credential-helpers: \"../x\"");
    check("[aliases]\n\"a.io/b\" = \"c.io/d\"\n", "aliases: \"a.io/b\" must be a name without registry");
    check("[aliases]\n\"a:b\" = \"c.io/d\"\n", "\"a:b\"");
    check("[aliases]\na = \"c.io/d:t\"\n", "\"c.io/d:t\" must be a registry and a repository");
    check("[aliases]\na = \"b\"\n", "\"b\" must be");
}

#[test]
fn unknown_keys_are_noticed_and_repetitions_allowed() {
    let same = "[[registry]]\nprefix = \"a.io\"\nbloked = true\n[[registry.mirror]]\nlocation = \"b.io\"\nsecure = 1\n";
    let all = registries(&[&format!("strange = 1\n{same}{same}")]).unwrap();
    assert_eq!(all.registries.len(), 1);
    all.unknown.iter().for_each(|key| assert!(key.starts_with("0.conf: ")));
    let mut keys: Vec<_> = all.unknown.iter().map(|key| &key["0.conf: ".len()..]).collect();
    keys.dedup();
    assert!(keys.contains(&"strange") && keys.contains(&"registry.bloked") && keys.contains(&"registry.mirror.secure"), "{keys:?}");
}

#[test]
fn short_names_are_resolved() {
    let check = |confs: &[&str], name: &str, expected: Result<&[&str], &str>| {
        let all = registries(confs).unwrap();
        let shown = match all.resolve(name) {
            Ok(found) => Ok(found.iter().map(ToString::to_string).collect::<Vec<_>>()),
            Err(error @ ImageError::ShortName { .. }) => {
                assert_eq!(error.kind(), Kind::InvalidArgument);
                Err(Chain(&error).to_string())
            }
            Err(error) => panic!("{error}"),
        };
        match (shown, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{confs:?} {name}"),
            (Err(error), Err(part)) => assert!(error.contains(part), "{confs:?} {name}: {error}"),
            (other, _) => panic!("{confs:?} {name}: {other:?}"),
        }
    };
    let two = "unqualified-search-registries = [\"quay.io\", \"docker.io\"]\n";
    let alias = "[aliases]\nbusybox = \"reg.io/tools/busybox\"\n\"team/app\" = \"reg.io/app\"\n";
    check(&[], "busybox", Ok(&["docker.io/library/busybox:latest"]));
    check(&["[[registry]]\nlocation = \"a.io\"\n"], "busybox", Ok(&["docker.io/library/busybox:latest"]));
    check(&["unqualified-search-registries = []\n"], "busybox", Err("unqualified-search-registries of registries.conf is empty"));
    check(&["unqualified-search-registries = [\"quay.io\"]\n"], "user/app:v1", Ok(&["quay.io/user/app:v1"]));
    check(&[two], "busybox:1", Ok(&["quay.io/busybox:1", "docker.io/library/busybox:1"]));
    check(&[&format!("short-name-mode = \"disabled\"\n{two}")], "a", Ok(&["quay.io/a:latest", "docker.io/library/a:latest"]));
    check(&[&format!("short-name-mode = \"enforcing\"\n{two}")], "a", Err("may be of quay.io, docker.io"));
    check(&[two, "short-name-mode = \"enforcing\"\nunqualified-search-registries = [\"quay.io\"]\n"], "a", Ok(&["quay.io/a:latest"]));
    check(&["short-name-mode = \"enforcing\"\n", &format!("{two}{alias}")], "busybox:1", Ok(&["reg.io/tools/busybox:1"]));
    check(&[two, alias], &format!("busybox{}", digest()), Ok(&[&format!("reg.io/tools/busybox{}", digest())]));
    check(&[alias], "team/app", Ok(&["reg.io/app:latest"]));
    check(&[alias], "team/app2", Ok(&["docker.io/team/app2:latest"]));
    // A later file takes an alias back, or gives it another meaning.
    check(&[alias, "[aliases]\nbusybox = \"\"\n"], "busybox", Ok(&["docker.io/library/busybox:latest"]));
    check(&[alias, "[aliases]\nbusybox = \"b.io/c\"\n"], "busybox", Ok(&["b.io/c:latest"]));
    // What names its registry is no short name.
    check(&[&format!("short-name-mode = \"enforcing\"\n{two}{alias}")], "docker.io/busybox", Ok(&["docker.io/library/busybox:latest"]));
}

#[test]
fn credential_helpers_are_in_order() {
    assert_eq!(registries(&[]).unwrap().credential_helpers(), [AUTH_FILES]);
    let all = registries(&["credential-helpers = [\"ecr-login\"]\n", "credential-helpers = [\"containers-auth.json\", \"pass\"]\n"]).unwrap();
    assert_eq!(all.credential_helpers(), [AUTH_FILES, "pass"]);
}

#[test]
fn files_are_followed_and_broken_ones_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (file, drop_ins) = (directory.path().join("registries.conf"), directory.path().join("registries.conf.d"));
    let live = Live::new(file.clone(), drop_ins.clone());
    let image = Reference::parse("reg.local/a").unwrap();
    let insecure = || live.current().unwrap().sources(&image).map(|sources| sources[0].insecure);
    let write = |path: &Path, text: &str| std::fs::write(path, text).unwrap();
    assert!(!insecure().unwrap());
    write(&file, "[[registry]]\nlocation = \"reg.local\"\nblocked = true\n");
    assert!(insecure().is_err());
    std::fs::create_dir(&drop_ins).unwrap();
    let drop_in = drop_ins.join("10-a.conf");
    write(&drop_in, "[[registry]]\nlocation = \"reg.local\"\ninsecure = true\n");
    write(&drop_ins.join("ignored.toml"), "nonsense");
    assert!(insecure().unwrap());
    assert_eq!(live.problem(), None);
    write(&drop_in, "[[registry]]\nlocation = \"reg.local\"\ninsecure = maybe\n");
    assert!(insecure().unwrap());
    let problem = live.problem().unwrap();
    assert!(problem.contains("10-a.conf") && problem.contains("line 3"), "{problem}");
    std::fs::remove_file(&drop_in).unwrap();
    assert!(insecure().is_err());
    assert_eq!(live.problem(), None);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert!(insecure().is_err(), "what was read stays");
    assert!(live.problem().unwrap().contains("no regular file"));
    // Where nothing could ever be read nothing is pulled.
    let fresh = Live::new(file, drop_ins);
    assert_eq!(fresh.current().unwrap_err().kind(), Kind::FailedPrecondition);
}
