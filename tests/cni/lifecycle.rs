//! Real plugins: pods are attached, reach each other, and leave nothing.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::AsFd;

use copepod::errchain::Kinded;
use copepod::net::cni::{Pod, PortMapping, Protocol};
use copepod::net::{netns, stats};

use crate::world::{World, block_on, chain, get, inside, serve, sh, sh_in};

tests! {
    a_pod_is_attached_and_leaves_nothing
    the_sample_works
    every_version
    a_port_of_the_node_leads_to_the_pod
    del_without_the_namespace
    del_without_the_configuration
    del_without_the_cache
    concurrent_adds_get_addresses_of_their_own
    check_sees_what_is_missing
    a_daemon_takes_over_what_an_earlier_one_attached
    a_second_daemon_keeps_its_hands_off
    counters_of_a_pods_interfaces
    a_pin_comes_and_goes
}

fn a_pod_is_attached_and_leaves_nothing() {
    let world = World::new(1);
    world.conf("1.0.0", &[&world.bridge(), r#""type":"tuning","sysctl":{"net.ipv4.conf.IFNAME.arp_notify":"1"}"#]);
    block_on(async {
        let networks = world.networks();
        networks.ready().unwrap();
        let (a, b) = (world.pod("aaa"), world.pod("bbb"));
        let (at, bt) = (networks.add(&a).await.unwrap(), networks.add(&b).await.unwrap());
        assert_eq!((at.network.as_str(), at.interface.as_str(), at.ips.len()), ("pods", "eth0", 1));
        let shown = sh_in(&a, "ip addr show dev eth0");
        assert!(shown.contains(&format!("inet {}/24", at.ips[0])), "{shown}");
        assert!(shown.contains(at.mac.as_deref().unwrap()), "{shown}");
        assert_eq!(sh_in(&a, "cat /proc/sys/net/ipv4/conf/eth0/arp_notify").trim(), "1", "the second plugin ran");

        let ip = at.ips[0];
        let listener = inside(&a, move || TcpListener::bind((ip, 80)).unwrap());
        serve(listener.try_clone().unwrap(), "to the node");
        assert_eq!(get((ip, 80).into()).unwrap(), "to the node");
        serve(listener, "to a pod");
        assert_eq!(inside(&b, move || get((ip, 80).into())).unwrap(), "to a pod");

        assert_eq!(world.leases(), [at.ips[0].to_string(), bt.ips[0].to_string()]);
        assert_eq!(world.cached(), ["pods-aaa-eth0", "pods-bbb-eth0"]);
        let kept = networks.cached().unwrap();
        assert_eq!(kept[0].attachment.as_ref().unwrap().ips, at.ips);
        assert_eq!(kept[0].netns, a.netns);

        networks.del(&a).await.unwrap();
        assert_eq!(world.leases(), [bt.ips[0].to_string()]);
        assert_eq!(sh_in(&a, "ip -o link show type veth"), "");
        networks.del(&a).await.unwrap();
        networks.del(&b).await.unwrap();
        world.assert_clean();
    });
}

fn the_sample_works() {
    let world = World::new(13);
    world.write("conf/10-copepod.conflist", include_str!("../../config/10-copepod.conflist"));
    block_on(async {
        // With everything else as it is by default.
        let config = copepod::net::cni::Config { conf_dir: world.path("conf"), bin_dirs: world.config().bin_dirs, ..Default::default() };
        let networks = copepod::net::cni::Networks::new(config).unwrap();
        networks.ready().unwrap();
        let pod = world.pod("aaa");
        let ip = networks.add(&pod).await.unwrap().ips[0];
        serve(inside(&pod, move || TcpListener::bind((ip, 80)).unwrap()), "sample");
        assert_eq!(get((ip, 80).into()).unwrap(), "sample");
        assert!(std::path::Path::new(&format!("/var/lib/cni/networks/copepod/{ip}")).exists());
        networks.del(&pod).await.unwrap();
        assert!(!std::path::Path::new(&format!("/var/lib/cni/networks/copepod/{ip}")).exists());
        assert_eq!(std::fs::read_dir("/var/lib/cni/results").unwrap().count(), 0);
    });
    sh("ip link delete copepod0");
}

fn every_version() {
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        let world = World::new(2);
        // Before 0.3.0 there were no lists.
        let single = version < "0.3.0";
        if single {
            world.write("conf/10-pods.conf", &format!(r#"{{"name":"pods","cniVersion":"{version}",{}}}"#, world.bridge()));
        } else {
            world.conf(version, &[&world.bridge(), r#""type":"portmap","capabilities":{"portMappings":true}"#]);
        }
        block_on(async {
            let networks = world.networks();
            let pod = world.pod("aaa");
            let attachment = networks.add(&pod).await.unwrap_or_else(|error| panic!("{version}: {}", chain(&error)));
            assert_eq!(attachment.ips, [IpAddr::V4(Ipv4Addr::new(10, 90, 2, 2))], "{version}");
            assert_eq!(attachment.mac.is_some(), !single, "{version}");
            networks.check(&pod).await.unwrap_or_else(|error| panic!("{version}: {}", chain(&error)));
            networks.del(&pod).await.unwrap_or_else(|error| panic!("{version}: {}", chain(&error)));
            world.assert_clean();
        });
    }
}

fn a_port_of_the_node_leads_to_the_pod() {
    let world = World::new(3);
    world.conf("1.0.0", &[&world.bridge(), r#""type":"portmap","capabilities":{"portMappings":true}"#]);
    block_on(async {
        let networks = world.networks();
        let port_mappings = vec![PortMapping { host_port: 8080, container_port: 80, protocol: Protocol::Tcp, host_ip: None }];
        let pod = Pod { port_mappings, ..world.pod("aaa") };
        let ip = networks.add(&pod).await.unwrap().ips[0];
        serve(inside(&pod, move || TcpListener::bind((ip, 80)).unwrap()), "mapped");
        assert_eq!(get("10.90.3.1:8080".parse().unwrap()).unwrap(), "mapped");
        networks.del(&pod).await.unwrap();
        let rules = sh("iptables-save -t nat");
        assert!(!rules.contains("8080"), "{rules}");
        world.assert_clean();
    });
}

fn del_without_the_namespace() {
    let world = World::new(4);
    world.conf("1.0.0", &[&world.bridge(), r#""type":"portmap","capabilities":{"portMappings":true}"#]);
    block_on(async {
        let networks = world.networks();
        for (id, leave_a_file) in [("aaa", false), ("bbb", true)] {
            let pod = world.pod(id);
            networks.add(&pod).await.unwrap();
            netns::unpin(&pod.netns).unwrap();
            if leave_a_file {
                // As a reboot leaves a directory that is no tmpfs.
                std::fs::write(&pod.netns, "").unwrap();
            }
            networks.del(&pod).await.unwrap();
            world.assert_clean();
        }
    });
}

fn del_without_the_configuration() {
    let world = World::new(5);
    block_on(async {
        for with in ["", "{", r#"{"name":"other","cniVersion":"1.0.0","plugins":[{"type":"nowhere"}]}"#] {
            world.conf("1.0.0", &[&world.bridge()]);
            let pod = world.pod("aaa");
            world.networks().add(&pod).await.unwrap();
            std::fs::remove_file(world.path("conf/10-pods.conflist")).unwrap();
            if !with.is_empty() {
                world.write("conf/10-pods.conflist", with);
            }
            let networks = world.networks();
            networks.ready().unwrap_err();
            networks.del(&pod).await.unwrap();
            world.assert_clean();
            netns::unpin(&pod.netns).unwrap();
        }
    });
}

fn del_without_the_cache() {
    let world = World::new(6);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let pod = world.pod("aaa");
        world.networks().add(&pod).await.unwrap();
        std::fs::remove_dir_all(world.path("cache")).unwrap();
        world.networks().del(&pod).await.unwrap();
        world.assert_clean();
    });
}

fn concurrent_adds_get_addresses_of_their_own() {
    let world = World::new(7);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let networks = world.networks();
        let pods: Vec<_> = (0..10).map(|n| world.pod(&format!("pod{n}"))).collect();
        let adds: Vec<_> = pods
            .iter()
            .map(|pod| {
                let (networks, pod) = (networks.clone(), pod.clone());
                tokio::spawn(async move { networks.add(&pod).await })
            })
            .collect();
        let mut ips = std::collections::BTreeSet::new();
        for add in adds {
            ips.insert(add.await.unwrap().unwrap().ips[0]);
        }
        assert_eq!(ips.len(), 10);
        let dels: Vec<_> = pods
            .iter()
            .map(|pod| {
                let (networks, pod) = (networks.clone(), pod.clone());
                tokio::spawn(async move { networks.del(&pod).await })
            })
            .collect();
        for del in dels {
            del.await.unwrap().unwrap();
        }
        world.assert_clean();
    });
}

fn check_sees_what_is_missing() {
    let world = World::new(8);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        let error = networks.check(&pod).await.unwrap_err();
        assert!(chain(&error).contains("not attached"), "{}", chain(&error));
        networks.add(&pod).await.unwrap();
        networks.check(&pod).await.unwrap();
        sh_in(&pod, "ip addr flush dev eth0");
        let error = networks.check(&pod).await.unwrap_err();
        assert!(chain(&error).starts_with("CNI CHECK bridge (network \"pods\"): "), "{}", chain(&error));
        networks.del(&pod).await.unwrap();
        world.assert_clean();
    });
}

fn a_daemon_takes_over_what_an_earlier_one_attached() {
    let world = World::new(9);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let (a, b) = (world.pod("aaa"), world.pod("bbb"));
        let earlier = world.networks();
        earlier.add(&a).await.unwrap();
        earlier.add(&b).await.unwrap();
        drop(earlier);
        let networks = world.networks();
        // A pod that came after the list was made is not in it, and is alive.
        let c = world.pod("ccc");
        let attachment = networks.add(&c).await.unwrap();
        let collector = networks.clone();
        let done = tokio::spawn(async move { collector.gc(&[("aaa".into(), "eth0".into())]).await }).await.unwrap().unwrap();
        assert_eq!(done.detached, [("bbb".to_string(), "eth0".to_string())]);
        assert!(!done.collected, "1.0.0 has no GC");
        assert_eq!(world.cached(), ["pods-aaa-eth0", "pods-ccc-eth0"]);
        assert!(world.leases().contains(&attachment.ips[0].to_string()));
        // ADD over what is there starts afresh.
        let again = networks.add(&a).await.unwrap();
        assert_eq!(world.leases().len(), 2);
        assert!(sh_in(&a, "ip addr show dev eth0").contains(&again.ips[0].to_string()));
        networks.del(&a).await.unwrap();
        networks.del(&c).await.unwrap();
        world.assert_clean();
    });
}

fn a_second_daemon_keeps_its_hands_off() {
    let world = World::new(10);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let pod = world.pod("aaa");
        let networks = world.networks();
        networks.add(&pod).await.unwrap();
        let second = copepod::net::cni::Networks::new(copepod::net::cni::Config { owner: "/run/second".into(), ..world.config() }).unwrap();
        assert!(second.cached().unwrap().is_empty());
        second.gc(&[]).await.unwrap();
        assert_eq!(world.cached(), ["pods-aaa-eth0"]);
        assert_eq!(world.leases().len(), 1);
        networks.del(&pod).await.unwrap();
        world.assert_clean();
    });
}

fn counters_of_a_pods_interfaces() {
    let world = World::new(11);
    world.conf("1.0.0", &[&world.bridge()]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        let ip = networks.add(&pod).await.unwrap().ips[0];
        let eth0 = async || {
            let found = stats::interfaces(pod.netns.clone()).await.unwrap();
            assert!(found.iter().any(|i| i.name == "lo"));
            found.into_iter().find(|i| i.name == "eth0").unwrap()
        };
        let before = eth0().await;
        serve(inside(&pod, move || TcpListener::bind((ip, 80)).unwrap()), "counted");
        get((ip, 80).into()).unwrap();
        let after = eth0().await;
        assert!(after.rx_bytes > before.rx_bytes && after.tx_packets > before.tx_packets, "{before:?} {after:?}");
        networks.del(&pod).await.unwrap();

        let nowhere = world.path("ns/nowhere");
        let found = stats::interfaces_of(vec![nowhere, pod.netns.clone()]).await;
        assert_eq!(found[0].as_ref().unwrap_err().kind(), copepod::errchain::Kind::NotFound);
        assert!(found[1].as_ref().unwrap().iter().all(|i| i.name != "eth0"), "the second is read though the first is not there");
    });
}

fn a_pin_comes_and_goes() {
    let world = World::new(12);
    let path = world.path("ns/made/pin");
    let fd = copepod::sys::netns::create().unwrap();
    netns::pin(fd.as_fd(), &path).unwrap();
    assert!(netns::is_pinned(&path).unwrap());
    let again = netns::pin(fd.as_fd(), &path).unwrap_err();
    assert_eq!(again.kind(), copepod::errchain::Kind::AlreadyExists);
    drop(fd);
    assert!(netns::is_pinned(&path).unwrap(), "the pin alone keeps it");
    // Stacked by somebody else.
    sh(&format!("mount --bind {0} {0}", path.display()));
    netns::unpin(&path).unwrap();
    assert!(!path.exists());
    assert!(!sh("cat /proc/self/mountinfo").contains("made/pin"));
    netns::unpin(&path).unwrap();
}
