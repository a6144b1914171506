//! Names: short ones, those that registries.conf changes, and many of one image.

use std::collections::BTreeSet;
use std::sync::Arc;

use copepod::errchain::Kind;
use copepod::image::Credentials;

use super::root::root;
use super::sample::{Content, Sample};
use super::server::{Answer, Request, Server};
use super::{Node, credentials, fails, pulled};

/// Registries may be spoken to without TLS.
fn insecure(servers: &[&Server]) -> String {
    servers.iter().map(|server| format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", server.host)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn short_names_are_searched_for() {
    if !root("short_names_are_searched_for") {
        return;
    }
    let sample = Sample::simple("x");
    let (content, other) = (Content::default().add("x", &sample), Content::default());
    let (first, second) = (Server::start(move |r| other.answer(r)).await, Server::start(move |r| content.answer(r)).await);
    let node = Node::new(&[]);
    let images = node.open();
    let conf = |top: &str, aliases: &str| {
        let search = format!("unqualified-search-registries = [\"{}\", \"{}\"]\n", first.host, second.host);
        node.conf(&format!("{top}\n{search}{}{aliases}", insecure(&[&first, &second])));
    };
    conf("", "");
    let image = pulled(&images, "team/app:x").await;
    assert_eq!((image.id.clone(), image.tags.clone()), (sample.id(), vec![format!("{}/team/app:x", second.host)]));
    assert_eq!((first.count("/v2/team/app/manifests/x"), second.count("/v2/team/app/manifests/x")), (1, 1));
    assert_eq!(images.find("team/app:x").unwrap().map(|found| found.id.clone()), Some(sample.id()));
    assert_eq!(images.find("team/app").unwrap(), None);
    // All that was tried is said; the last one decides about the kind.
    fails(&images, "team/app:missing", None, Kind::NotFound, "short name \"team/app:missing\" is found in no registry").await;
    fails(&images, "team/app:missing", None, Kind::NotFound, &first.host).await;
    images.remove("team/app:x").await.unwrap();
    assert!(images.list().is_empty());

    // Where nobody can be asked which one is meant, none is.
    conf("short-name-mode = \"enforcing\"", "");
    first.forget();
    fails(&images, "team/app:x", None, Kind::InvalidArgument, "short-name-mode is enforcing").await;
    assert!(first.requests().is_empty());
    conf("short-name-mode = \"enforcing\"", &format!("[aliases]\napp = \"{}/team/app\"\n", second.host));
    let image = pulled(&images, "app:x").await;
    assert_eq!(image.tags, [format!("{}/team/app:x", second.host)]);
    assert_eq!(images.find("app:x").unwrap().map(|found| found.id.clone()), Some(sample.id()));
    assert_eq!(pulled(&images, &format!("app@{}", sample.digest())).await.id, sample.id());
    assert!(first.requests().is_empty());
    // The alias is gone, and with it the name.
    node.conf("unqualified-search-registries = []\n");
    assert_eq!(images.find("app:x").unwrap(), None);
    fails(&images, "app:x", None, Kind::InvalidArgument, "unqualified-search-registries of registries.conf is empty").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_for_a_short_name_are_docker_hubs() {
    if !root("credentials_for_a_short_name_are_docker_hubs") {
        return;
    }
    let asking = Server::start(|_: &Request| Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\"")).await;
    let node = Node::new(&[]);
    node.conf(&format!("unqualified-search-registries = [\"{}\"]\n{}", asking.host, insecure(&[&asking])));
    let images = node.open();
    fails(&images, "app:x", credentials("secret"), Kind::Unauthenticated, "none were given").await;
    assert!(asking.requests().iter().all(|request| request.header("authorization").is_empty()));
    // Those that name the registry are for it.
    let named = Credentials { server_address: asking.host.clone(), ..credentials("secret").unwrap() };
    fails(&images, "app:x", Some(named), Kind::Unauthenticated, "not accepted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_conf_moves_names_and_chooses_mirrors() {
    if !root("registries_conf_moves_names_and_chooses_mirrors") {
        return;
    }
    let sample = Sample::simple("x");
    let start = async |tag: &'static str| {
        let content = Content::default().add(tag, &sample);
        Server::start(move |request| content.answer(request)).await
    };
    let (own, tags, digests) = (start("v2").await, start("v1").await, start("unused").await);
    let node = Node::new(&[]);
    let images = node.open();
    let mirror = |server: &Server, when: &str| {
        format!("[[registry.mirror]]\nlocation = \"{}/cache\"\ninsecure = true\npull-from-mirror = \"{when}\"\n", server.host)
    };
    node.conf(&format!(
        "[[registry]]\nprefix = \"*.example.com/team\"\nlocation = \"{0}/moved\"\ninsecure = true\n{1}{2}\
         [[registry]]\nprefix = \"reg.example.com/app:v1\"\nlocation = \"{0}/app:v2\"\ninsecure = true\n\
         [[registry]]\nprefix = \"bad.example.com\"\nblocked = true\n",
        own.host,
        mirror(&tags, "tag-only"),
        mirror(&digests, "digest-only"),
    ));
    // By tag only the one mirror is asked, by digest only the other; the name stays as it was written.
    let image = pulled(&images, "a.example.com/team/app:v1").await;
    assert_eq!(image.tags, ["a.example.com/team/app:v1"]);
    assert_eq!((tags.count("/v2/cache/app/"), own.requests().len(), digests.requests().len()), (4, 0, 0));
    images.remove(&image.id).await.unwrap();
    images.collect().await;
    tags.forget();
    let image = pulled(&images, &format!("b.a.example.com/team/app:v1@{}", sample.digest())).await;
    assert_eq!((image.tags.len(), image.digests.len()), (0, 1));
    assert_eq!((digests.count("/v2/cache/app/"), own.requests().len(), tags.requests().len()), (4, 0, 0));
    // What the mirror lacks comes from the place itself; a tag may be another one there.
    pulled(&images, "a.example.com/team/app:v2").await;
    assert_eq!((tags.count("/manifests/v2"), own.count("/v2/moved/app/manifests/v2")), (1, 1));
    let image = pulled(&images, "reg.example.com/app:v1").await;
    assert!(image.tags.contains(&"reg.example.com/app:v1".to_string()), "{:?}", image.tags);
    assert_eq!(own.count("/v2/app/manifests/v2"), 1);
    fails(&images, "bad.example.com/x", None, Kind::PermissionDenied, "registry bad.example.com is blocked by ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_go_by_any_name_and_at_once() {
    if !root("images_go_by_any_name_and_at_once") {
        return;
    }
    let samples: Vec<_> = ["one", "two", "three"].iter().map(|label| Sample::simple(label)).collect();
    let content = samples.iter().enumerate().fold(Content::default(), |content, (n, sample)| {
        content.add(&format!("t{n}"), sample).add(&format!("u{n}"), sample).add(&format!("v{n}"), sample)
    });
    let copy = content.clone();
    let (server, other) = (Server::start(move |r| content.answer(r)).await, Server::start(move |r| copy.answer(r)).await);
    let node = Node::new(&[&server.host, &other.host]);
    let images = node.open();
    images.collect().await;
    for n in 0..3 {
        for tag in ["t", "u", "v"] {
            pulled(&images, &format!("{}/r:{tag}{n}", server.host)).await;
        }
        pulled(&images, &format!("{}/r:t{n}", other.host)).await;
    }
    // Three images, each with three tags here and one there.
    let list = images.list();
    assert_eq!(list.len(), 3);
    assert!(list.iter().all(|image| image.tags.len() == 4 && image.digests.len() == 2 && image.tags.iter().collect::<BTreeSet<_>>().len() == 4));
    // Everybody removes at once, by every name: no removal fails, and each takes all names.
    let mut removals = tokio::task::JoinSet::new();
    for image in &list[..2] {
        for name in image.tags.iter().chain(&image.digests).chain([&image.id]) {
            let (images, name) = (Arc::clone(&images), name.clone());
            removals.spawn(async move { images.remove(&name).await.map_err(|error| error.to_string()) });
        }
    }
    removals.join_all().await.into_iter().for_each(|removed| removed.unwrap());
    assert_eq!(images.list().iter().map(|image| &image.id).collect::<Vec<_>>(), [&list[2].id]);
    images.remove(&list[2].tags[3]).await.unwrap();
    assert_eq!((images.list().len(), node.names("images").len(), node.names("layers").len()), (0, 0, 0));
}
