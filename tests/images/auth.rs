//! Credentials: from auth files and credential helpers, and the tokens that they are changed for.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use copepod::errchain::{Chain, Kind, Kinded};

use super::root::root;
use super::sample::{Content, Sample};
use super::server::{Answer, Request, Server};
use super::{Node, child_of, config, credentials, elsewhere, fails, pulled};

fn basic(user: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{user}:secret"))
}

/// A registry that knows users by the repositories they may pull: the user `a` may pull `a/…`.
async fn guarded() -> (Server, Sample) {
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    let server = Server::start(move |request: &Request| {
        let owner = request.path.split('/').nth(2).unwrap_or("");
        let known = request.header("authorization") == format!("Basic {}", basic(owner));
        if known { content.answer(request) } else { Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\"") }
    })
    .await;
    (server, sample)
}

#[tokio::test(flavor = "multi_thread")]
async fn auth_files_are_asked_in_order() {
    if !root("auth_files_are_asked_in_order") {
        return;
    }
    let (server, _) = guarded().await;
    let (mirror, _) = guarded().await;
    let mut node = Node::new(&[&server.host]);
    let path = |name: &str| node.directory.path().join(name);
    let (first, second, namespaces) = (path("auth.json"), path("config.json"), path("namespaces"));
    std::fs::create_dir(&namespaces).unwrap();
    node.config.auth_files = vec![first.clone(), second.clone()];
    node.config.namespace_auth_dir = Some(namespaces.clone());
    let images = node.open();
    let name = |user: &str| format!("{}/{user}/app:x", server.host);
    let entry = |key: &str, user: &str| format!(r#""{key}": {{"auth": "{}"}}"#, basic(user));
    let write = |path: &Path, entries: &[String]| std::fs::write(path, format!(r#"{{"auths": {{{}}}}}"#, entries.join(","))).unwrap();

    fails(&images, &name("a"), None, Kind::Unauthenticated, "none were given").await;
    // Files are read when they are needed: what is in them now counts, the longest key first, then the first file.
    write(&second, &[entry(&server.host, "a"), entry(&format!("{}/b", server.host), "b")]);
    pulled(&images, &name("a")).await;
    pulled(&images, &name("b")).await;
    fails(&images, &name("c"), None, Kind::Unauthenticated, "not accepted").await;
    write(&first, &[entry(&format!("http://{}/v1/", server.host), "c")]);
    pulled(&images, &name("c")).await;
    fails(&images, &name("a"), None, Kind::Unauthenticated, "not accepted").await;
    // The request's own come before all files, and a namespace's before the node's.
    fails(&images, &name("c"), credentials("wrong"), Kind::Unauthenticated, "not accepted").await;
    write(&namespaces.join("blue.json"), &[entry(&server.host, "d")]);
    images.pull_for(&name("d"), None, "blue").await.unwrap();
    assert_eq!(images.pull_for(&name("d"), None, "green").await.unwrap_err().kind(), Kind::Unauthenticated);
    images.pull_for(&name("c"), None, "green").await.unwrap();
    // A mirror is shown what the files say about itself, and nothing else.
    node.conf(&format!(
        "[[registry]]\nlocation = \"{}\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"{}/m\"\ninsecure = true\n",
        server.host, mirror.host
    ));
    pulled(&images, &name("c")).await;
    assert!(mirror.requests().iter().all(|request| request.header("authorization").is_empty()));
    write(&second, &[entry(&mirror.host, "m")]);
    server.forget();
    images.remove(&name("c")).await.unwrap();
    pulled(&images, &name("c")).await;
    assert_eq!(server.requests().len(), 0);
    // What can't be read is said, but only where nothing else helps and somebody asks for credentials.
    std::fs::write(&first, "nonsense").unwrap();
    node.conf(&format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", server.host));
    fails(&images, &name("c"), None, Kind::FailedPrecondition, "auth.json is no auth file: wrong at line 1").await;
    write(&second, &[entry(&server.host, "c")]);
    pulled(&images, &name("c")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_kept_and_renewed() {
    if !root("tokens_are_kept_and_renewed") {
        return;
    }
    let sample = Sample::simple("x");
    let content = Content::default().add("x", &sample);
    // The service numbers its tokens; the registry takes only the newest, and each a few times.
    let (given, used) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (number, counter) = (Arc::clone(&given), Arc::clone(&used));
    let busy = AtomicUsize::new(0);
    let tokens = Server::start(move |_: &Request| {
        // At first it has no time.
        if busy.fetch_add(1, Ordering::Relaxed) == 0 {
            return Answer::new(429, "").with("retry-after", "0");
        }
        counter.store(0, Ordering::Relaxed);
        let n = number.fetch_add(1, Ordering::Relaxed) + 1;
        Answer::new(200, format!(r#"{{"access_token":"t{n}","expires_in":300}}"#))
    })
    .await;
    let (realm, number, uses) = (tokens.host.clone(), Arc::clone(&given), Arc::clone(&used));
    let limit = Arc::new(AtomicUsize::new(usize::MAX));
    let allowed = Arc::clone(&limit);
    let registry = Server::start(move |request: &Request| {
        let newest = format!("Bearer t{}", number.load(Ordering::Relaxed));
        if request.header("authorization") != newest || uses.fetch_add(1, Ordering::Relaxed) >= allowed.load(Ordering::Relaxed) {
            let name = request.path.split('/').nth(2).unwrap_or("");
            let challenge = format!("Bearer realm=\"http://{realm}/token\",service=\"s\",scope=\"repository:{name}:pull\"");
            return Answer::new(401, "").with("www-authenticate", challenge);
        }
        content.answer(request)
    })
    .await;
    let mut node = Node::new(&[&registry.host]);
    // What one request uses up must not be what another was given.
    node.config.max_parallel_layers = 1;
    let images = node.open();
    let name = |repository: &str| format!("{}/{repository}:x", registry.host);
    let asked = || given.load(Ordering::Relaxed);
    pulled(&images, &name("r")).await;
    pulled(&images, &name("r")).await;
    assert_eq!(asked(), 1, "the second pull has the token of the first");
    // Another repository or other credentials need another token.
    pulled(&images, &name("s")).await;
    images.pull(&name("s"), credentials("secret")).await.unwrap();
    assert_eq!(asked(), 3);
    // The registry has forgotten the first one: it is renewed, and the pull succeeds.
    pulled(&images, &name("r")).await;
    assert_eq!(asked(), 4);
    // A token that ends in the middle of a pull is renewed as often as it takes.
    images.remove(&name("r")).await.unwrap();
    images.remove(&name("s")).await.unwrap();
    images.collect().await;
    limit.store(1, Ordering::Relaxed);
    pulled(&images, &name("r")).await;
    assert!(asked() >= 6, "{}", asked());
    // One that is refused when it is new is not asked for again and again.
    limit.store(0, Ordering::Relaxed);
    let before = asked();
    fails(&images, &name("r"), None, Kind::Unauthenticated, "not accepted").await;
    assert_eq!(asked(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_helpers_are_run() {
    if !root("credential_helpers_are_run") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (server, _) = guarded().await;
    let programs = directory.path().join("bin");
    std::fs::create_dir(&programs).unwrap();
    let helper = |name: &str, script: &str| {
        let path = programs.join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    // It is told the registry and says who is asked for.
    helper("good", r#"read -r host; [ "$1" = get ] || exit 3; printf '{"ServerURL":"%s","Username":"a","Secret":"secret"}' "$host""#);
    helper("none", "echo 'credentials not found in native keychain'; exit 1");
    helper("bad", "echo 'the vault is sealed' >&2; exit 2");
    helper("empty", "cat >/dev/null");
    helper("flood", r#"printf '{"Username":"a","Secret":"secret"'; yes | head -c 300000; echo '}'"#);
    helper("stuck", r#"sleep 1000 & echo $! >"$COPEPOD_TEST_DIRECTORY/pid"; wait"#);
    helper("token", r#"echo '{"Username":"<token>","Secret":"identity"}'"#);
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    elsewhere("auth::the_process_with_helpers", directory.path(), &[("PATH", path), ("COPEPOD_TEST_HOST", server.host.clone())]).await;
}

/// Only ever does something in the process that `credential_helpers_are_run` starts.
#[tokio::test(flavor = "multi_thread")]
async fn the_process_with_helpers() {
    let Some(directory) = child_of("auth::the_process_with_helpers") else { return };
    let host = std::env::var("COPEPOD_TEST_HOST").unwrap();
    let mut config = config(&directory);
    config.auth_files = vec![directory.join("auth.json")];
    config.credential_helper_timeout = Duration::from_secs(1);
    let conf = |helpers: &str| {
        let text = format!("credential-helpers = [{helpers}]\n[[registry]]\nlocation = \"{host}\"\ninsecure = true\n");
        std::fs::write(directory.join("registries.conf"), text).unwrap();
    };
    let images = copepod::image::Images::open(config.clone()).unwrap();
    let name = format!("{host}/a/app:x");
    let check = async |helpers: &str, expected: Result<(), (Kind, &str)>| {
        conf(helpers);
        match (images.pull(&name, None).await, expected) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err((kind, part))) => {
                let text = Chain(&error).to_string();
                assert_eq!((error.kind(), text.contains(part)), (kind, true), "{helpers}: {text}");
                assert!(!text.contains("Secret"), "{text}");
            }
            (other, _) => panic!("{helpers}: {:?}", other.map_err(|error| Chain(&error).to_string())),
        }
    };
    check(r#""good""#, Ok(())).await;
    check(r#""none", "good""#, Ok(())).await;
    check(r#""bad", "good""#, Ok(())).await;
    check(r#""none""#, Err((Kind::Unauthenticated, "none were given"))).await;
    check(r#""bad""#, Err((Kind::FailedPrecondition, "the vault is sealed"))).await;
    check(r#""missing""#, Err((Kind::FailedPrecondition, "cannot start docker-credential-missing"))).await;
    check(r#""empty""#, Err((Kind::FailedPrecondition, "something else than credentials"))).await;
    check(r#""flood""#, Err((Kind::FailedPrecondition, "more than 65536 bytes"))).await;
    check(r#""stuck""#, Err((Kind::DeadlineExceeded, "did not answer"))).await;
    // What it left ends with it.
    let pid = std::fs::read_to_string(directory.join("pid")).unwrap();
    let alive = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "));
    while alive() {
        tokio::task::yield_now().await;
    }
    // A file may send to a helper, for one registry or for all that it does not know.
    let file = |text: &str| std::fs::write(directory.join("auth.json"), text).unwrap();
    file(&format!(r#"{{"auths": {{"{host}": {{}}}}, "credHelpers": {{"{host}": "good"}}}}"#));
    check(r#""containers-auth.json""#, Ok(())).await;
    check(r#""none", "containers-auth.json""#, Ok(())).await;
    file(r#"{"credsStore": "good"}"#);
    check(r#""containers-auth.json""#, Ok(())).await;
    // An identity token is no password.
    check(r#""token""#, Err((Kind::Unauthenticated, "a user and a password"))).await;
}
