//! Seccomp, AppArmor and SELinux, of containers and of the pod's own process.
//!
//! What a node without AppArmor or SELinux answers is part of the contract, so that these tests ask the node what it has and hold it
//! to that.

use std::fs;
use std::path::Path;

use copepod::api::{self, security_profile::ProfileType};
use copepod::sys::process::command;
use tonic::Code;

use super::harness::Test;
use super::node::Node;
use super::observe::{Running, output_of, pod_security, privileged_pod, refused, run, same, security};

/// The tests.
pub const TESTS: &[Test<Node>] = &[
    ("profiles_seccomp", seccomp),
    ("profiles_seccomp_of_the_node", seccomp_of_the_node),
    ("profiles_seccomp_profile_path", seccomp_profile_path),
    ("profiles_seccomp_of_the_sandbox", seccomp_of_the_sandbox),
    ("profiles_apparmor", apparmor),
    ("profiles_apparmor_of_the_sandbox", apparmor_of_the_sandbox),
    ("profiles_selinux", selinux),
];

fn profile(kind: ProfileType, reference: &str) -> Option<api::SecurityProfile> {
    Some(api::SecurityProfile { profile_type: kind.into(), localhost_ref: reference.into() })
}

fn with(profile: Option<api::SecurityProfile>) -> impl Fn(&mut api::ContainerConfig) {
    move |config| security(config, |s| s.seccomp = profile.clone())
}

const MODE: &str = "sed -n 's/^Seccomp:[[:space:]]*//p' /proc/self/status";

fn seccomp(node: &mut Node) {
    let check = |asked: Option<api::SecurityProfile>, want: &str| {
        assert_eq!(output_of(node, MODE, same, with(asked.clone())), want, "{asked:?}");
        assert_eq!(Running::new(node, same, with(asked.clone())).exec(MODE), want, "exec: {asked:?}");
    };
    check(None, "0\n");
    check(profile(ProfileType::Unconfined, ""), "0\n");
    check(profile(ProfileType::RuntimeDefault, ""), "2\n");
    // The default profile lets through what a capability is for.
    let mount = |add: &'static [&'static str]| {
        move |config: &mut api::ContainerConfig| {
            with(profile(ProfileType::RuntimeDefault, ""))(config);
            let add_capabilities = add.iter().map(|name| name.to_string()).collect();
            security(config, |s| s.capabilities = Some(api::Capability { add_capabilities, ..Default::default() }));
            // AppArmor forbids mounts to everybody.
            security(config, |s| s.apparmor = profile(ProfileType::Unconfined, ""));
        }
    };
    assert_eq!(output_of(node, "mount -t tmpfs none /mnt 2>/dev/null || echo refused", same, mount(&[])), "refused\n");
    assert_eq!(output_of(node, "mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted", same, mount(&["SYS_ADMIN"])), "mounted\n");
    let bad = profile(ProfileType::Unconfined, "/x.json");
    refused(node, same, with(bad), Code::InvalidArgument, &["seccomp.localhost_ref", "/x.json"]);
    refused(
        node,
        same,
        |config| security(config, |s| s.seccomp = Some(api::SecurityProfile { profile_type: 9, localhost_ref: String::new() })),
        Code::InvalidArgument,
        &["seccomp.profile_type", "9"],
    );
}

/// Allows everything but these calls.
fn blocking(calls: &[&str]) -> String {
    let names = calls.iter().map(|call| format!("\"{call}\"")).collect::<Vec<_>>().join(", ");
    format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": [{names}], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}}]}}"#)
}

fn file(node: &Node, name: &str, text: &str) -> String {
    let path = node.dir.join(name);
    fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

const CHMOD: &str = "chmod 700 / 2>/dev/null && echo done || echo refused";
const CALLS: [&str; 4] = ["chmod", "fchmod", "fchmodat", "fchmodat2"];

fn seccomp_of_the_node(node: &mut Node) {
    let path = file(node, "block-chmod.json", &blocking(&CALLS));
    let local = |path: &str| with(profile(ProfileType::Localhost, path));
    assert_eq!(output_of(node, CHMOD, same, local(&path)), "refused\n");
    assert_eq!(Running::new(node, same, local(&path)).exec(CHMOD), "refused\n");
    assert_eq!(output_of(node, CHMOD, same, same), "done\n");
    // The file's content counts at the time of the create.
    file(node, "block-chmod.json", &blocking(&["acct"]));
    assert_eq!(output_of(node, CHMOD, same, local(&path)), "done\n");
    // In the form of Docker's own, conditions are about the container's capabilities.
    let rule = |condition: &str| {
        let rule = format!(r#"{{"names": {CALLS:?}, "action": "SCMP_ACT_ERRNO", "{condition}": {{"caps": ["CAP_NET_ADMIN"]}}}}"#);
        file(node, "docker.json", &format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{rule}]}}"#))
    };
    assert_eq!(output_of(node, CHMOD, same, local(&rule("includes"))), "done\n");
    assert_eq!(output_of(node, CHMOD, same, local(&rule("excludes"))), "refused\n");
    // Privileged containers have no profile, not even one that isn't there.
    let privileged = |config: &mut api::ContainerConfig| {
        local("/no/such/profile.json")(config);
        security(config, |s| s.privileged = true);
    };
    assert_eq!(output_of(node, MODE, privileged_pod, privileged), "0\n");

    refused(node, same, local("/no/such/profile.json"), Code::FailedPrecondition, &["/no/such/profile.json", "No such file"]);
    refused(node, same, local("profiles/x.json"), Code::InvalidArgument, &["profiles/x.json", "absolute"]);
    refused(node, same, local(""), Code::InvalidArgument, &["seccomp.localhost_ref", "missing"]);
    refused(node, same, local("/etc"), Code::InvalidArgument, &["/etc", "regular file"]);
    let bad = file(node, "bad.json", "{\"defaultAction\": 1}");
    refused(node, same, local(&bad), Code::InvalidArgument, &["bad.json", "parse"]);
    let bad = file(node, "bad.json", &blocking(&["chmod"]).replace("SCMP_ACT_ERRNO", "SCMP_ACT_SMILE"));
    refused(node, same, local(&bad), Code::InvalidArgument, &["bad.json", "SCMP_ACT_SMILE"]);
    let large = file(node, "bad.json", &" ".repeat((1 << 20) + 1));
    refused(node, same, local(&large), Code::InvalidArgument, &["bad.json", "larger"]);
}

fn seccomp_profile_path(node: &mut Node) {
    let path = file(node, "old.json", &blocking(&CALLS));
    #[allow(deprecated)]
    let old = |value: &str| {
        let value = value.to_string();
        move |config: &mut api::ContainerConfig| security(config, |s| s.seccomp_profile_path = value.clone())
    };
    for (value, want) in [("", "0\n"), ("unconfined", "0\n"), ("runtime/default", "2\n"), ("docker/default", "2\n")] {
        assert_eq!(output_of(node, MODE, same, old(value)), want, "{value}");
    }
    assert_eq!(output_of(node, CHMOD, same, old(&format!("localhost/{path}"))), "refused\n");
    // The new field wins.
    let both = |config: &mut api::ContainerConfig| {
        old("localhost/nothing")(config);
        with(profile(ProfileType::RuntimeDefault, ""))(config);
    };
    assert_eq!(output_of(node, MODE, same, both), "2\n");
    refused(node, same, old("nonsense"), Code::InvalidArgument, &["seccomp_profile_path", "nonsense"]);
    refused(node, same, old("localhost/"), Code::InvalidArgument, &["seccomp_profile_path"]);
}

fn seccomp_of_the_sandbox(node: &mut Node) {
    // The pod's own process is the first of a shared PID namespace.
    let pause = MODE.replace("self", "1");
    let set = |asked: Option<api::SecurityProfile>| move |pod: &mut api::PodSandboxConfig| pod_security(pod, |s| s.seccomp = asked.clone());
    #[allow(deprecated)]
    let old = |value: &'static str| move |pod: &mut api::PodSandboxConfig| pod_security(pod, |s| s.seccomp_profile_path = value.into());
    let harmless = file(node, "pause.json", &blocking(&["chmod"]));
    let local = |path: &str| profile(ProfileType::Localhost, path);
    assert_eq!(output_of(node, &pause, set(None), same), "0\n");
    assert_eq!(output_of(node, &pause, set(profile(ProfileType::Unconfined, "")), same), "0\n");
    assert_eq!(output_of(node, &pause, set(profile(ProfileType::RuntimeDefault, "")), same), "2\n");
    assert_eq!(output_of(node, &pause, set(local(&harmless)), same), "2\n");
    assert_eq!(output_of(node, &pause, old("runtime/default"), same), "2\n");
    assert_eq!(output_of(node, MODE, set(profile(ProfileType::RuntimeDefault, "")), same), "0\n", "containers have their own");
    refused(node, set(local("/no/such.json")), same, Code::FailedPrecondition, &["/no/such.json"]);
    refused(node, old("nonsense"), same, Code::InvalidArgument, &["seccomp_profile_path", "nonsense"]);
    let deaf = file(node, "pause.json", &blocking(&["rt_sigtimedwait"]));
    refused(node, set(local(&deaf)), same, Code::InvalidArgument, &["pause", "wait for signals"]);
}

fn has_apparmor() -> bool {
    fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.first() == Some(&b'Y'))
}

fn with_apparmor(profile: Option<api::SecurityProfile>) -> impl Fn(&mut api::ContainerConfig) {
    move |config| security(config, |s| s.apparmor = profile.clone())
}

#[allow(deprecated)]
fn with_old_apparmor(value: &'static str) -> impl Fn(&mut api::ContainerConfig) {
    move |config| security(config, |s| s.apparmor_profile = value.into())
}

const LABEL: &str = "cat /proc/self/attr/apparmor/current";

fn apparmor(node: &mut Node) {
    let refused_by = |change: &dyn Fn(&mut api::ContainerConfig), words: &[&str]| refused(node, same, change, Code::FailedPrecondition, words);
    let named = |name: &str| with_apparmor(profile(ProfileType::Localhost, name));
    let bad = with_apparmor(profile(ProfileType::RuntimeDefault, "x"));
    refused(node, same, bad, Code::InvalidArgument, &["apparmor.localhost_ref", "x"]);
    refused(node, same, with_apparmor(profile(ProfileType::Localhost, "")), Code::InvalidArgument, &["apparmor.localhost_ref"]);
    refused(node, same, with_old_apparmor("nonsense"), Code::InvalidArgument, &["apparmor_profile", "nonsense"]);
    if !has_apparmor() {
        for asked in [None, profile(ProfileType::RuntimeDefault, ""), profile(ProfileType::Unconfined, "")] {
            assert_eq!(run(node, "true", same, with_apparmor(asked.clone())).unwrap().0, 0, "{asked:?}");
        }
        for old in ["", "runtime/default", "unconfined"] {
            assert_eq!(run(node, "true", same, with_old_apparmor(old)).unwrap().0, 0, "{old}");
        }
        refused_by(&named("localhost/mine"), &["\"mine\"", "not enabled"]);
        refused_by(&with_old_apparmor("localhost/mine"), &["\"mine\"", "not enabled"]);
        return;
    }
    let check = |change: &dyn Fn(&mut api::ContainerConfig), want: &str| {
        assert_eq!(output_of(node, LABEL, same, change), want);
        assert_eq!(Running::new(node, same, change).exec(LABEL), want, "exec");
    };
    let default = "copepod-default (enforce)\n";
    check(&with_apparmor(None), default);
    check(&with_apparmor(profile(ProfileType::RuntimeDefault, "")), default);
    check(&with_old_apparmor("runtime/default"), default);
    check(&with_apparmor(profile(ProfileType::Unconfined, "")), "unconfined\n");
    check(&with_old_apparmor("unconfined"), "unconfined\n");
    refused_by(&named("copepod-test-missing"), &["copepod-test-missing", "not loaded"]);

    let text = "profile copepod-test-deny flags=(attach_disconnected) {\n file,\n signal,\n capability,\n network,\n deny /** w,\n}\n";
    let policy = file(node, "apparmor", text);
    let load = |how: &str| assert!(command("apparmor_parser").args([how, "--skip-cache", &policy]).status().unwrap().success());
    load("--replace");
    check(&named("copepod-test-deny"), "copepod-test-deny (enforce)\n");
    check(&with_old_apparmor("localhost/copepod-test-deny"), "copepod-test-deny (enforce)\n");
    assert_ne!(run(node, "touch /tmp/x || touch /x", same, named("copepod-test-deny")).unwrap().0, 0);
    assert_eq!(run(node, "touch /x", same, with_apparmor(None)).unwrap().0, 0);
    // Privileged containers have no profile unless they name one.
    let privileged = |change: &dyn Fn(&mut api::ContainerConfig)| {
        output_of(node, LABEL, privileged_pod, |config| {
            change(config);
            security(config, |s| s.privileged = true);
        })
    };
    assert_eq!(privileged(&with_apparmor(profile(ProfileType::RuntimeDefault, ""))), "unconfined\n");
    assert_eq!(privileged(&named("copepod-test-deny")), "copepod-test-deny (enforce)\n");
    load("--remove");
    refused_by(&named("copepod-test-deny"), &["copepod-test-deny", "not loaded"]);
    // Somebody unloads the default one, as aa-remove-unknown does.
    fs::write("/sys/kernel/security/apparmor/.remove", "copepod-default").unwrap();
    check(&with_apparmor(None), default);
}

fn apparmor_of_the_sandbox(node: &mut Node) {
    let set = |asked: Option<api::SecurityProfile>| move |pod: &mut api::PodSandboxConfig| pod_security(pod, |s| s.apparmor = asked.clone());
    let missing = set(profile(ProfileType::Localhost, "copepod-test-missing"));
    refused(node, missing, same, Code::FailedPrecondition, &["copepod-test-missing"]);
    refused(node, set(profile(ProfileType::Localhost, "")), same, Code::InvalidArgument, &["apparmor.localhost_ref"]);
    for asked in [None, profile(ProfileType::RuntimeDefault, ""), profile(ProfileType::Unconfined, "")] {
        let running = Running::new(node, set(asked.clone()), same);
        if has_apparmor() {
            let pause = running.pid_of_pause();
            let label = fs::read_to_string(format!("/proc/{pause}/attr/apparmor/current")).unwrap();
            let confined = asked.is_none_or(|asked| asked.profile_type() == ProfileType::RuntimeDefault);
            assert_eq!(label.trim(), if confined { "copepod-default (enforce)" } else { "unconfined" });
        }
    }
}

fn selinux(node: &mut Node) {
    let options = |user: &str, role: &str, kind: &str, level: &str| {
        Some(api::SeLinuxOption { user: user.into(), role: role.into(), r#type: kind.into(), level: level.into() })
    };
    let whole = || options("system_u", "system_r", "container_t", "s0:c4,c5");
    let container =
        |asked: Option<api::SeLinuxOption>| move |config: &mut api::ContainerConfig| security(config, |s| s.selinux_options = asked.clone());
    let pod = |asked: Option<api::SeLinuxOption>| move |pod: &mut api::PodSandboxConfig| pod_security(pod, |s| s.selinux_options = asked.clone());
    let enabled = Path::new("/sys/fs/selinux/enforce").exists();
    for (of_pod, of_container) in [(None, whole()), (whole(), None), (None, None), (whole(), options("", "", "", "s0"))] {
        let output =
            output_of(node, "cat /proc/self/attr/current 2>/dev/null | tr '\\0' '\\n'; true", pod(of_pod.clone()), container(of_container.clone()));
        if enabled {
            let level = of_container.or(of_pod).map_or(":c", |options| if options.level == "s0" { ":container_t:s0\n" } else { ":s0:c4,c5" });
            assert!(output.contains(level), "{output}");
        }
    }
    // The form is checked whether there is SELinux or not.
    let bad = [
        (options("", "", "", "s0,c4,c5"), "level", "s0,c4,c5"),
        (options("", "", "a:b", ""), "type", "a:b"),
        (options("", "a b", "", ""), "role", "a b"),
        (options("u\n", "", "", ""), "user", "u\\n"),
    ];
    for (asked, part, value) in bad {
        let field = format!("config.linux.security_context.selinux_options.{part}");
        refused(node, same, container(asked.clone()), Code::InvalidArgument, &[&field, value]);
        refused(node, pod(asked), same, Code::InvalidArgument, &[&field, value]);
    }
}
