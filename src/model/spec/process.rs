//! The process: what runs, as whom, with which capabilities.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{ImageDefaults, SpecError, absolute};
use crate::model::container::{ContainerSpec, GroupsPolicy};
use crate::plan::{self, Capabilities, User, capability};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The capabilities of a container's processes. `ALL` in either list is taken first, then single names. Of what is asked for, a
/// container has what the daemon's own bounding set (`available`) has.
///
/// Ambient ones (KEP-2763) need no place in the list of those to add: they are added to every set, since the kernel lets a
/// set be ambient only where it is permitted and inheritable too. Beside them nothing is inheritable (CVE-2022-29162).
pub fn capabilities(spec: &ContainerSpec, defaults: u64, available: u64) -> Result<Capabilities, SpecError> {
    let security = &spec.security;
    let parse = |names: &[String]| -> Result<(bool, u64), SpecError> {
        names.iter().try_fold((false, 0), |(all, mask), name| match capability::parse(name) {
            Some(capability::ALL) => Ok((true, mask)),
            Some(bit) => Ok((all, mask | bit)),
            None => Err(SpecError::Capability(name.clone())),
        })
    };
    let (add_all, add) = parse(&security.add_capabilities)?;
    let (drop_all, drop) = parse(&security.drop_capabilities)?;
    let (ambient_all, ambient) = parse(&security.add_ambient_capabilities)?;
    let drop = if security.privileged { 0 } else { drop };
    if let Some(name) = security.add_ambient_capabilities.iter().find(|name| capability::parse(name).is_some_and(|bit| bit & drop == bit)) {
        return Err(SpecError::Contradiction(name.clone()));
    }
    let ambient = if ambient_all { capability::ALL & !drop } else { ambient };
    let mut mask = match (security.privileged || add_all, drop_all && !security.privileged) {
        (_, true) => 0,
        (true, false) => capability::ALL,
        (false, false) => defaults,
    };
    mask = (mask | add) & !drop;
    let (ambient, all) = (ambient & available, (mask | ambient) & available);
    Ok(Capabilities { bounding: all, permitted: all, effective: all, inheritable: ambient, ambient })
}

pub(super) fn args(spec: &ContainerSpec, image: &ImageDefaults) -> Result<Vec<OsString>, SpecError> {
    // As in Docker and both peers: a command of the request leaves the image's arguments out too.
    let (command, args) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (&image.entrypoint, &image.cmd),
        (true, false) => (&image.entrypoint, &spec.args),
        (false, _) => (&spec.command, &spec.args),
    };
    let all: Vec<OsString> = command.iter().chain(args).map(OsString::from).collect();
    if all.is_empty() || all[0].is_empty() { Err(SpecError::NoCommand { image: image.name.clone() }) } else { Ok(all) }
}

pub(super) fn env(spec: &ContainerSpec, image: &ImageDefaults, hostname: &str) -> Vec<OsString> {
    let mut env: Vec<(&str, &[u8])> = vec![("PATH", DEFAULT_PATH)];
    if spec.tty {
        env.push(("TERM", b"xterm"));
    }
    env.push(("HOSTNAME", hostname.as_bytes()));
    let from_image = image.env.iter().filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name, value.as_bytes()));
    let from_request = spec.envs.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    for (name, value) in from_image.filter(|(name, _)| !name.is_empty()).chain(from_request) {
        match env.iter_mut().find(|(old, _)| *old == name) {
            Some(pair) => pair.1 = value,
            None => env.push((name, value)),
        }
    }
    env.into_iter().map(|(name, value)| OsString::from_vec([name.as_bytes(), b"=", value].concat())).collect()
}

pub(super) fn cwd(spec: &ContainerSpec, image: &ImageDefaults) -> Result<PathBuf, SpecError> {
    let dir = [&spec.working_dir, &image.working_dir].into_iter().find(|dir| !dir.is_empty()).map_or("/", String::as_str);
    absolute("working_dir", dir)
}

pub(super) fn user(spec: &ContainerSpec, image: &ImageDefaults) -> Result<User, SpecError> {
    let security = &spec.security;
    let (image_user, image_group) = image.user.split_once(':').unwrap_or((&image.user, ""));
    let from_request = security.run_as_user.is_some() || !security.run_as_username.is_empty();
    if security.run_as_group.is_some() && !from_request && image.user.is_empty() {
        return Err(SpecError::Field {
            field: "linux.security_context.run_as_group",
            value: security.run_as_group.unwrap_or_default().to_string(),
            reason: "is set without run_as_user or run_as_username, and the image names no user",
        });
    }
    let (name, group) = if from_request { (security.run_as_username.as_str(), "") } else { (image_user, image_group) };
    Ok(User {
        uid: security.run_as_user,
        name: name.into(),
        gid: security.run_as_group,
        group: group.into(),
        supplemental: security.supplemental_groups.clone(),
        policy: match security.groups_policy {
            GroupsPolicy::Merge => plan::GroupsPolicy::Merge,
            GroupsPolicy::Strict => plan::GroupsPolicy::Strict,
        },
    })
}

pub(super) fn oom_score_adj(spec: &ContainerSpec) -> Result<i32, SpecError> {
    let value = spec.resources.oom_score_adj;
    i32::try_from(value).ok().filter(|n| (-1000..=1000).contains(n)).ok_or_else(|| SpecError::Field {
        field: "linux.resources.oom_score_adj",
        value: value.to_string(),
        reason: "is not -1000 to 1000",
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::base;
    use super::*;

    #[test]
    fn command_and_arguments_merge_as_docker_does() {
        let check = |command: &[&str], args_: &[&str], want: &[&str]| {
            let list = |l: &[&str]| l.iter().map(|s| s.to_string()).collect::<Vec<_>>();
            let spec = ContainerSpec { command: list(command), args: list(args_), ..ContainerSpec::default() };
            let image = ImageDefaults { entrypoint: list(&["e"]), cmd: list(&["c"]), ..ImageDefaults::default() };
            assert_eq!(args(&spec, &image).unwrap(), want.iter().map(OsString::from).collect::<Vec<_>>());
        };
        check(&[], &[], &["e", "c"]);
        check(&[], &["a"], &["e", "a"]);
        check(&["x"], &[], &["x"]);
        check(&["x"], &["a"], &["x", "a"]);
        let none = args(&ContainerSpec::default(), &ImageDefaults { name: "img".into(), ..ImageDefaults::default() });
        assert_eq!(none, Err(SpecError::NoCommand { image: "img".into() }));
    }

    #[test]
    fn capabilities_are_added_dropped_and_clamped() {
        let bit = |name| capability::parse(name).unwrap();
        let list = |names: &[&str]| names.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let sets = |add: &[&str], drop: &[&str], ambient: &[&str], privileged, available| {
            let (mut spec, _) = base();
            spec.security.add_capabilities = list(add);
            spec.security.drop_capabilities = list(drop);
            spec.security.add_ambient_capabilities = list(ambient);
            spec.security.privileged = privileged;
            capabilities(&spec, bit("CHOWN") | bit("KILL"), available)
        };
        let check = |add: &[&str], drop: &[&str], ambient: &[&str], want: u64, want_ambient: u64| {
            let found = sets(add, drop, ambient, false, capability::ALL).unwrap();
            let want = Capabilities { bounding: want, permitted: want, effective: want, inheritable: want_ambient, ambient: want_ambient };
            assert_eq!(found, want, "+{add:?} -{drop:?} ^{ambient:?}");
        };
        let some = bit("CHOWN") | bit("KILL");
        check(&[], &[], &[], some, 0);
        check(&["NET_ADMIN"], &["CHOWN"], &[], bit("KILL") | bit("NET_ADMIN"), 0);
        check(&["ALL"], &["CHOWN"], &[], capability::ALL & !bit("CHOWN"), 0);
        check(&["CHOWN"], &["ALL"], &[], bit("CHOWN"), 0);
        check(&["ALL"], &["ALL"], &[], 0, 0);
        check(&["cap_net_admin"], &["all"], &[], bit("NET_ADMIN"), 0);
        check(&[], &[], &["CAP_NET_RAW"], some | bit("NET_RAW"), bit("NET_RAW"));
        check(&[], &["ALL"], &["NET_RAW"], bit("NET_RAW"), bit("NET_RAW"));
        check(&[], &["CHOWN"], &["ALL"], capability::ALL & !bit("CHOWN"), capability::ALL & !bit("CHOWN"));

        assert_eq!(sets(&[], &["ALL"], &[], true, capability::ALL).unwrap().bounding, capability::ALL);
        assert_eq!(sets(&["NET_RAW"], &[], &["NET_RAW", "KILL"], false, some).unwrap().ambient, bit("KILL"));
        assert_eq!(sets(&["ALL"], &[], &[], false, some).unwrap().bounding, some);
        assert_eq!(sets(&[], &[], &[], true, some).unwrap().effective, some);
        assert_eq!(sets(&["FLY"], &[], &[], false, some), Err(SpecError::Capability("FLY".into())));
        assert_eq!(sets(&[], &[], &["FLY"], true, some), Err(SpecError::Capability("FLY".into())));
        assert_eq!(sets(&[], &["KILL"], &["kill"], false, some), Err(SpecError::Contradiction("kill".into())));
    }

    #[test]
    fn environment_is_overridden_in_order() {
        let (mut spec, mut image) = base();
        image.env = vec!["PATH=/i".into(), "A=image".into(), "=bad".into(), "bad".into()];
        spec.envs = vec![("A".into(), b"request=x".to_vec()), ("B".into(), Vec::new())];
        let env: Vec<_> = env(&spec, &image, "h").into_iter().map(|v| v.into_string().unwrap()).collect();
        assert_eq!(env, ["PATH=/i", "HOSTNAME=h", "A=request=x", "B="]);
    }

    #[test]
    fn users_come_from_the_request_or_the_image() {
        let (mut spec, mut image) = base();
        image.user = "web:data".into();
        let u = user(&spec, &image).unwrap();
        assert_eq!((u.name.as_str(), u.group.as_str(), u.uid), ("web", "data", None));
        spec.security.run_as_user = Some(5);
        let u = user(&spec, &image).unwrap();
        assert_eq!((u.name.as_str(), u.group.as_str(), u.uid), ("", "", Some(5)));
        let (mut spec, image) = base();
        spec.security.run_as_group = Some(5);
        assert!(user(&spec, &image).unwrap_err().to_string().contains("run_as_group"));
    }
}
