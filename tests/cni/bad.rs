//! Plugins that fail, hang, print rubbish and leave processes behind: a clear error, and nothing left.

use std::time::Duration;

use copepod::errchain::{Kind, Kinded};
use copepod::net::cni::{Config, Networks};

use crate::world::{World, block_on, chain, sh_in, wait_gone};

tests! {
    a_failure_in_the_chain_undoes_what_came_before
    an_undo_that_fails_is_tried_again
    a_plugin_that_hangs_ends_with_its_children
    an_add_that_is_given_up_ends_its_plugin_and_is_undone_later
    rubbish
    what_a_plugin_is_told
    what_a_plugin_may_do
    verbs_over_one_pod_take_turns
}

/// ADD passes the result on, or makes one.
const PASS: &str = r#"cat > $D/in.$CNI_COMMAND
[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.99.0.2/24"}]}'
exit 0"#;

fn a_failure_in_the_chain_undoes_what_came_before() {
    let check = |script: &str, kind: Kind, expected: &str| {
        let world = World::new(20);
        world.plugin("second", &format!("cat > /dev/null; [ $CNI_COMMAND = DEL ] && exit 0\n{script}"));
        world.conf("1.0.0", &[&world.bridge(), r#""type":"second""#]);
        block_on(async {
            let networks = world.networks();
            let pod = world.pod("aaa");
            let error = networks.add(&pod).await.unwrap_err();
            assert_eq!((chain(&error).as_str(), error.kind()), (expected, kind));
            assert_eq!(sh_in(&pod, "ip -o link show type veth"), "", "the interface is gone");
            world.assert_clean();
            networks.del(&pod).await.unwrap();
        });
    };
    check(
        r#"echo '{"code":101,"msg":"no","details":"because"}'; echo hint >&2; exit 1"#,
        Kind::Internal,
        "CNI ADD second (network \"pods\"): no; because (code 101); stderr: hint",
    );
    check(r#"echo '{"code":11,"msg":"later"}'; exit 1"#, Kind::Unavailable, "CNI ADD second (network \"pods\"): later (code 11)");
    check("exit 3", Kind::Internal, "CNI ADD second (network \"pods\"): it ended with exit code 3 and no error that can be read");
}

fn an_undo_that_fails_is_tried_again() {
    let world = World::new(21);
    world.plugin("second", r#"cat > /dev/null; echo "{\"code\":100,\"msg\":\"$CNI_COMMAND fails\"}"; exit 1"#);
    world.conf("1.0.0", &[&world.bridge(), r#""type":"second""#]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        let error = networks.add(&pod).await.unwrap_err();
        assert_eq!(
            chain(&error),
            "cannot attach pod aaa, and undoing it failed too (CNI DEL second (network \"pods\"): DEL fails (code 100)): \
             CNI ADD second (network \"pods\"): ADD fails (code 100)"
        );
        // The other plugins were undone all the same, and the attachment is still known.
        assert!(world.leases().is_empty());
        assert_eq!(world.cached(), ["pods-aaa-eth0"]);
        let error = networks.del(&pod).await.unwrap_err();
        assert_eq!(chain(&error), "cannot detach pod aaa: CNI DEL second (network \"pods\"): DEL fails (code 100)");
        world.plugin("second", "cat > /dev/null");
        networks.del(&pod).await.unwrap();
        world.assert_clean();
    });
}

fn a_plugin_that_hangs_ends_with_its_children() {
    let world = World::new(22);
    let hang = r#"cat > /dev/null; echo still here >&2
sleep 1000 & echo $! > $D/child; sh -c 'echo $$ > $0/grandchild; exec sleep 1000' $D & echo $$ > $D/self; wait"#;
    world.plugin("second", &format!("if [ $CNI_COMMAND = ADD ]; then\n{hang}\nfi"));
    world.conf("1.0.0", &[&world.bridge(), r#""type":"second""#]);
    block_on(async {
        let networks = Networks::new(Config { add_timeout: Duration::from_millis(1500), ..world.config() }).unwrap();
        let pod = world.pod("aaa");
        let error = networks.add(&pod).await.unwrap_err();
        assert_eq!(chain(&error), "CNI ADD second (network \"pods\"): deadline of 1.5 s passed; stderr: still here");
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        for file in ["self", "child", "grandchild"] {
            wait_gone(world.read(file).trim().parse().unwrap());
        }
        world.assert_clean();
    });
}

fn an_add_that_is_given_up_ends_its_plugin_and_is_undone_later() {
    let world = World::new(23);
    let fifo = world.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    world.plugin("second", "if [ $CNI_COMMAND = ADD ]; then sleep 1000 & echo $$ $! > $D/fifo; wait; fi");
    world.conf("1.0.0", &[&world.bridge(), r#""type":"second""#]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        let add = tokio::spawn({
            let (networks, pod) = (networks.clone(), pod.clone());
            async move { networks.add(&pod).await.map(|_| ()) }
        });
        // The plugin says so itself when it runs.
        let pids = tokio::task::spawn_blocking(move || std::fs::read_to_string(fifo).unwrap()).await.unwrap();
        add.abort();
        assert!(add.await.unwrap_err().is_cancelled());
        for pid in pids.split_whitespace() {
            wait_gone(pid.parse().unwrap());
        }
        assert_eq!(world.leases().len(), 1, "the first plugin had its turn");
        let kept = world.networks().cached().unwrap();
        assert_eq!((kept.len(), kept[0].id.as_str(), kept[0].attachment.is_some()), (1, "aaa", false));
        // The next daemon.
        let done = world.networks().gc(&[]).await.unwrap();
        assert_eq!(done.detached, [("aaa".to_string(), "eth0".to_string())]);
        world.assert_clean();
    });
}

fn rubbish() {
    let check = |script: &str, expected: &str| {
        let world = World::new(24);
        world.plugin("only", &format!("cat > /dev/null; [ $CNI_COMMAND = DEL ] && exit 0\n{script}"));
        world.conf("1.0.0", &[r#""type":"only""#]);
        block_on(async {
            let networks = world.networks();
            let error = networks.add(&world.pod("aaa")).await.unwrap_err();
            let text = chain(&error);
            assert!(text.starts_with("CNI ADD only (network \"pods\"): ") || text.starts_with("network \"pods\" gave pod aaa no address"), "{text}");
            assert!(text.contains(expected), "{script}: {text}");
            world.assert_clean();
        });
    };
    check("exit 0", "what it printed is no result");
    check("echo hello; echo why >&2", "no result; stdout: hello; stderr: why: it has not the form of a result");
    check("echo '{\"cniVersion\":\"9.0.0\"}'", "version \"9.0.0\" of results is not known");
    check("echo '{\"cniVersion\":\"1.0.0\"}'", "it has no address of eth0");
    check("echo '{\"ips\":[{\"address\":\"nowhere\"}]}'", "\"nowhere\" is no address");
    check("echo oops; echo why >&2; exit 7", "exit code 7 and no error that can be read; stdout: oops; stderr: why");
    check("echo '{\"msg\":\"no code\"}'; exit 1", "exit code 1 and no error that can be read; stdout: {\"msg\":\"no code\"}");
    check("kill -9 $$", "it ended with signal 9");
    check("head -c 2000000 /dev/zero", "it printed more than 1048576 bytes");
    check("yes >&2 & yes", "it printed more than 1048576 bytes");
    check("head -c 2000000 /dev/zero | tr '\\0' x >&2; exit 1", "xxx…");
    check("echo '{}'; sleep 1000 &", "it left a process behind that holds its output open");
    check("printf '\\377\\376\\033[31m'; exit 1", "stdout: \u{fffd}\u{fffd} [31m");
    let world = World::new(24);
    world.conf("1.0.0", &[r#""type":"nowhere""#]);
    block_on(async {
        let error = world.networks().add(&world.pod("aaa")).await.unwrap_err();
        assert!(chain(&error).contains("needs plugin nowhere, which is not in "), "{}", chain(&error));
        assert_eq!(error.kind(), Kind::Unavailable);
        world.assert_clean();
    });
}

fn what_a_plugin_is_told() {
    let world = World::new(25);
    world.plugin("first", PASS);
    let dump = "env > $D/env.$CNI_COMMAND; cat > $D/second.$CNI_COMMAND; [ $CNI_COMMAND = ADD ] && echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.99.0.3/24\"}],\"x\":1.50}'; exit 0";
    world.plugin("second", dump);
    world.conf("1.0.0", &[r#""type":"first""#, r#""type":"second","capabilities":{"mac":true},"own":[1,2]"#]);
    block_on(async {
        let networks = world.networks();
        let mut pod = world.pod("aaa");
        pod.mac = Some("c2:11:22:33:44:55".into());
        networks.add(&pod).await.unwrap();
        let env = world.read("env.ADD");
        // What the shell adds of its own.
        let mut env: Vec<_> = env.lines().filter(|line| !["PWD=", "_=", "SHLVL=", "OLDPWD="].iter().any(|own| line.starts_with(own))).collect();
        env.sort();
        let bins = world.config().bin_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(":");
        let expected = [
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=test;K8S_POD_NAME=pod-aaa;K8S_POD_INFRA_CONTAINER_ID=aaa;K8S_POD_UID=uid-aaa".to_string(),
            "CNI_COMMAND=ADD".into(),
            "CNI_CONTAINERID=aaa".into(),
            "CNI_IFNAME=eth0".into(),
            format!("CNI_NETNS={}", pod.netns.display()),
            format!("CNI_PATH={bins}"),
            format!("PATH={}", std::env::var("PATH").unwrap()),
        ];
        assert_eq!(env, expected);
        let stdin = world.read("second.ADD");
        assert!(stdin.contains(r#""prevResult":{"cniVersion":"1.0.0","ips":[{"address":"10.99.0.2/24"}]}"#), "{stdin}");
        for part in [r#""runtimeConfig":{"mac":"c2:11:22:33:44:55"}"#, r#""own":[1,2]"#, r#""name":"pods""#, r#""cniVersion":"1.0.0""#] {
            assert!(stdin.contains(part), "{part}: {stdin}");
        }
        let first = world.read("in.ADD");
        assert!(!first.contains("runtimeConfig") && !first.contains("prevResult"), "{first}");
        // A daemon that starts anew tells DEL what ADD was told, and its final result as it was printed.
        world.networks().del(&pod).await.unwrap();
        for file in ["second.DEL", "in.DEL"] {
            let stdin = world.read(file);
            assert!(stdin.contains(r#""x":1.50}"#), "{stdin}");
        }
        assert!(world.read("second.DEL").contains(r#""runtimeConfig":{"mac":"c2:11:22:33:44:55"}"#));
        world.assert_clean();
    });
}

fn what_a_plugin_may_do() {
    let world = World::new(27);
    let result = r#"echo '{"cniVersion":"1.0.0","ips":[{"address":"10.99.0.2/24"}]}'"#;
    // It need not read its configuration, and a daemon that has let go of its output lives on.
    world.plugin("only", &format!("{result}\n[ $CNI_COMMAND = DEL ] || {{ sleep 1000 < /dev/null > /dev/null 2>&1 & echo $! > $D/daemon; }}"));
    let big = "x".repeat(900 << 10);
    world.conf("1.0.0", &[&format!(r#""type":"only","big":"{big}""#)]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        networks.add(&pod).await.unwrap();
        let daemon: u32 = world.read("daemon").trim().parse().unwrap();
        let pidfd = copepod::sys::process::pidfd_open(daemon).expect("the daemon lives on");
        rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
        networks.del(&pod).await.unwrap();
        world.assert_clean();
    });
}

fn verbs_over_one_pod_take_turns() {
    let world = World::new(26);
    // A directory can be made once: two at a time would meet.
    world.plugin("only", &format!("mkdir $D/turn || echo met >> $D/met\nls / > /dev/null; rmdir $D/turn\n{PASS}"));
    world.conf("1.0.0", &[r#""type":"only""#]);
    block_on(async {
        let networks = world.networks();
        let pod = world.pod("aaa");
        let verbs: Vec<_> = (0..12)
            .map(|n| {
                let (networks, pod) = (networks.clone(), pod.clone());
                tokio::spawn(async move {
                    match n % 3 {
                        0 => networks.add(&pod).await.map(|_| ()),
                        _ => networks.del(&pod).await,
                    }
                })
            })
            .collect();
        for verb in verbs {
            verb.await.unwrap().unwrap();
        }
        assert_eq!(world.read("met"), "");
        networks.del(&pod).await.unwrap();
        world.assert_clean();
    });
}
