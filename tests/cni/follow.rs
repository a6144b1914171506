//! Readiness follows the directory; STATUS and GC of CNI 1.1.

use std::sync::Arc;

use copepod::net::cni::{Changes, Config, Networks};

use crate::world::{World, block_on, chain};

tests! {
    ready_follows_the_directory
    ready_follows_plugins_beside_a_list
    the_network_asked_for
    status_of_plugins
    gc_names_what_is_alive
}

/// Waits until the state is as expected: `None` ready, else a part of the message.
async fn until(networks: &Networks, changes: &mut Changes, expected: Option<&str>) {
    loop {
        match (networks.ready(), expected) {
            (Ok(()), None) => return,
            (Err(not_ready), Some(part)) if not_ready.message.contains(part) => {
                assert_eq!(not_ready.reason, "NetworkPluginNotReady");
                return;
            }
            _ => assert!(changes.changed().await),
        }
    }
}

const LIST: &str = r#"{"name":"pods","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;

fn ready_follows_the_directory() {
    let world = World::new(40);
    std::fs::remove_dir(world.path("conf")).unwrap();
    block_on(async {
        let config = Config { conf_dir: world.path("etc/cni/net.d"), ..world.config() };
        let networks = Networks::new(config).unwrap();
        let mut changes = networks.changes();
        let watch = tokio::spawn(networks.clone().watch());
        until(&networks, &mut changes, Some("etc/cni/net.d: No such file")).await;
        std::fs::create_dir_all(world.path("etc/cni/net.d")).unwrap();
        until(&networks, &mut changes, Some("no network in ")).await;
        world.write("etc/cni/net.d/10-pods.conflist", "{");
        until(&networks, &mut changes, Some("10-pods.conflist: it has not the form")).await;
        world.write("etc/cni/net.d/10-pods.conflist", LIST);
        until(&networks, &mut changes, None).await;
        // A file of higher rank, put there by rename, whose plugin comes later.
        world.write("new", &LIST.replace("bridge", "later"));
        std::fs::rename(world.path("new"), world.path("etc/cni/net.d/05-pods.conflist")).unwrap();
        until(&networks, &mut changes, Some("needs plugin later, which is not in ")).await;
        world.plugin("later", "exit 0");
        until(&networks, &mut changes, None).await;
        std::fs::remove_file(world.path("bin/later")).unwrap();
        until(&networks, &mut changes, Some("later")).await;
        std::fs::remove_file(world.path("etc/cni/net.d/05-pods.conflist")).unwrap();
        until(&networks, &mut changes, None).await;
        // The directory replaced by another, far above.
        std::fs::create_dir_all(world.path("other/net.d")).unwrap();
        std::fs::rename(world.path("etc/cni"), world.path("old")).unwrap();
        until(&networks, &mut changes, Some("No such file")).await;
        std::fs::rename(world.path("other"), world.path("etc/cni")).unwrap();
        until(&networks, &mut changes, Some("no network in ")).await;
        world.write("etc/cni/net.d/10-pods.conflist", LIST);
        until(&networks, &mut changes, None).await;
        std::fs::remove_dir_all(world.path("etc")).unwrap();
        until(&networks, &mut changes, Some("No such file")).await;
        watch.abort();
        assert!(watch.await.unwrap_err().is_cancelled());
    });
}

fn ready_follows_plugins_beside_a_list() {
    let world = World::new(41);
    block_on(async {
        let networks = world.networks();
        let mut changes = networks.changes();
        let watch = tokio::spawn(networks.clone().watch());
        world.write("conf/10-pods.conflist", r#"{"name":"pods","cniVersion":"1.0.0"}"#);
        until(&networks, &mut changes, Some("it has no plugins")).await;
        std::fs::create_dir(world.path("conf/pods")).unwrap();
        world.write("conf/pods/10-bridge.conf", r#"{"type":"bridge"}"#);
        until(&networks, &mut changes, None).await;
        world.write("conf/pods/20-x.conf", "{");
        until(&networks, &mut changes, Some("20-x.conf: it has not the form")).await;
        std::fs::remove_dir_all(world.path("conf/pods")).unwrap();
        until(&networks, &mut changes, Some("it has no plugins")).await;
        watch.abort();
        let _ = watch.await;
    });
}

fn the_network_asked_for() {
    let world = World::new(42);
    world.conf("1.0.0", &[&world.bridge()]);
    world.write("conf/20-other.conflist", &LIST.replace("pods", "other").replace("bridge", "nowhere"));
    let message = |name: &str| {
        let config = Config { network: Some(name.into()), ..world.config() };
        Networks::new(config).unwrap().ready().err().map(|not_ready| not_ready.message).unwrap_or_default()
    };
    assert_eq!(message("pods"), "");
    assert!(message("other").contains("network \"other\" needs plugin nowhere"), "{}", message("other"));
    assert!(message("third").contains("no network \"third\" in "), "{}", message("third"));
    assert!(message("third").contains("which has pods, other"), "{}", message("third"));
    for bad in [
        Config { interface: "a/b".into(), ..world.config() },
        Config { conf_dir: "etc".into(), ..world.config() },
        Config { bin_dirs: vec!["/a:/b".into()], ..world.config() },
        Config { bin_dirs: Vec::new(), ..world.config() },
    ] {
        assert!(Networks::new(bad).is_err());
    }
}

fn status_of_plugins() {
    let world = World::new(43);
    world.plugin("only", "cat > $D/in.$CNI_COMMAND; [ -e $D/broken ] || exit 0; echo '{\"code\":50,\"msg\":\"agent is down\"}'; exit 1");
    world.conf("1.1.0", &[r#""type":"only""#]);
    block_on(async {
        let fresh = |age| -> Arc<Networks> { Networks::new(Config { status_age: age, ..world.config() }).unwrap() };
        let networks = fresh(std::time::Duration::ZERO);
        let mut changes = networks.changes();
        networks.status().await.unwrap();
        assert!(world.read("in.STATUS").contains(r#""cniVersion":"1.1.0""#));
        world.write("broken", "");
        let not_ready = networks.status().await.unwrap_err();
        assert_eq!(not_ready.message, "CNI STATUS only (network \"pods\"): agent is down (code 50)");
        assert!(changes.changed().await);
        assert_eq!(networks.ready(), Err(not_ready.clone()));
        std::fs::remove_file(world.path("broken")).unwrap();
        networks.status().await.unwrap();
        networks.ready().unwrap();
        // An answer of late is taken for the present state.
        let networks = fresh(std::time::Duration::from_secs(3600));
        networks.status().await.unwrap();
        world.write("broken", "");
        networks.status().await.unwrap();
        // Older lists are not asked.
        world.conf("1.0.0", &[r#""type":"only""#]);
        fresh(std::time::Duration::ZERO).status().await.unwrap();
    });
}

fn gc_names_what_is_alive() {
    let world = World::new(44);
    let only = "cat > $D/in.$CNI_COMMAND; env > $D/env.$CNI_COMMAND\n[ $CNI_COMMAND = ADD ] && echo '{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"10.99.0.2/24\"}]}'\n[ ! -e $D/broken ]";
    world.plugin("only", &format!("{only} || [ $CNI_COMMAND != GC ]"));
    world.conf("1.1.0", &[r#""type":"only""#]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        networks.add(&pod).await.unwrap();
        // As another runtime keeps it.
        let foreign = r#"{"kind":"cniCacheV1","containerId":"foreign","config":"","ifName":"net1","networkName":"pods"}"#;
        world.write("cache/results/pods-foreign-net1", foreign);
        let done = networks.gc(&[("old".into(), "eth0".into())]).await.unwrap();
        assert!(done.collected && done.detached.is_empty());
        let valid = r#"[{"containerID":"aaa","ifname":"eth0"},{"containerID":"foreign","ifname":"net1"},{"containerID":"old","ifname":"eth0"}]"#;
        let stdin = world.read("in.GC");
        assert!(stdin.contains(&format!(r#""cni.dev/valid-attachments":{valid}"#)), "{stdin}");
        assert!(!world.read("env.GC").contains("CNI_CONTAINERID"));
        world.write("broken", "");
        let error = networks.gc(&[]).await.unwrap_err();
        assert!(chain(&error).starts_with("cannot release all stale attachments: CNI GC only (network \"pods\")"), "{}", chain(&error));
        networks.del(&pod).await.unwrap();
        world.write("conf/10-pods.conflist", r#"{"name":"pods","cniVersion":"1.1.0","disableGC":true,"plugins":[{"type":"only"}]}"#);
        assert!(!world.networks().gc(&[]).await.unwrap().collected);
    });
}
