//! A container's configuration.

use std::path::PathBuf;

use super::mount::mount;
use super::resources::resources;
use super::security::security;
use super::{absolute, bad, clean, labels, later, missing, name};
use crate::api;
use crate::errchain::Remote;
use crate::model::container::{self, ContainerSpec};
use crate::model::signal;

/// A container's configuration.
pub fn container(config: Option<api::ContainerConfig>) -> Result<ContainerSpec, Remote> {
    let config = config.ok_or_else(|| missing("config"))?;
    let metadata = config.metadata.ok_or_else(|| missing("config.metadata"))?;
    let image = config.image.ok_or_else(|| missing("config.image"))?;
    if image.image.is_empty() {
        return Err(missing("config.image.image"));
    }
    let log_path = clean("config.log_path", PathBuf::from(&config.log_path))?;
    if log_path.is_absolute() {
        return Err(bad("config.log_path", &config.log_path, "is not relative to the pod's log directory"));
    }
    for (field, value) in config.command.iter().map(|v| ("config.command", v)).chain(config.args.iter().map(|v| ("config.args", v))) {
        if value.contains('\0') {
            return Err(bad(field, value, "has a NUL byte"));
        }
    }
    let envs = config.envs.into_iter().map(env).collect::<Result<_, _>>()?;
    if let Some(device) = config.cdi_devices.first() {
        return Err(later("config.CDI_devices", &device.name));
    }
    let linux = config.linux.unwrap_or_default();
    let stop_signal = match api::Signal::try_from(config.stop_signal) {
        Ok(api::Signal::RuntimeDefault) => None,
        Ok(named) => Some(stop_signal(named)?),
        Err(_) => return Err(bad("config.stop_signal", &config.stop_signal.to_string(), "is no signal")),
    };
    Ok(ContainerSpec {
        name: name("config.metadata.name", &metadata.name)?,
        attempt: metadata.attempt,
        image: image.image,
        user_specified_image: image.user_specified_image,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        devices: config
            .devices
            .into_iter()
            .map(|device| {
                Ok(container::Device {
                    container_path: clean("config.devices.container_path", absolute("config.devices.container_path", &device.container_path)?)?,
                    host_path: absolute("config.devices.host_path", &device.host_path)?,
                    permissions: device.permissions,
                })
            })
            .collect::<Result<_, Remote>>()?,
        labels: labels("config.labels", config.labels)?,
        annotations: labels("config.annotations", config.annotations)?,
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources(linux.resources)?,
        security: security(linux.security_context)?,
        stop_signal,
    })
}

fn stop_signal(named: api::Signal) -> Result<u32, Remote> {
    // The names are the C library's, but for the offsets: SIGRTMINPLUS1, SIGRTMAXMINUS1.
    let name = named.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
    signal::parse(&name).ok_or_else(|| bad("config.stop_signal", named.as_str_name(), "is no signal"))
}

fn env(pair: api::KeyValue) -> Result<(String, Vec<u8>), Remote> {
    if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
        return Err(bad("config.envs.key", &pair.key, "is empty or has '=' or NUL"));
    }
    if pair.value.contains(&0) {
        return Err(bad("config.envs.value", &String::from_utf8_lossy(&pair.value), "has a NUL byte"));
    }
    Ok((pair.key, pair.value))
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    fn ctr() -> api::ContainerConfig {
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(api::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn container_errors_name_field_and_value() {
        assert_eq!(container(Some(ctr())).unwrap().name, "c");
        let check = |change: fn(&mut api::ContainerConfig), words: &[&str]| {
            let mut config = ctr();
            change(&mut config);
            refused(container(Some(config)), words);
        };
        let context = |c: &mut api::ContainerConfig, change: fn(&mut api::LinuxContainerSecurityContext)| {
            let mut security = api::LinuxContainerSecurityContext::default();
            change(&mut security);
            c.linux = Some(api::LinuxContainerConfig { security_context: Some(security), ..Default::default() });
        };
        check(|c| c.image = None, &["config.image"]);
        check(|c| c.log_path = "../x".into(), &["config.log_path", "../x"]);
        check(|c| c.log_path = "/x".into(), &["config.log_path", "/x"]);
        check(|c| c.envs = vec![api::KeyValue { key: "a=b".into(), value: Vec::new() }], &["config.envs.key", "a=b"]);
        check(
            |c| c.mounts = vec![api::Mount { container_path: "/".into(), host_path: "/x".into(), ..Default::default() }],
            &["container_path", "root"],
        );
        check(|c| c.mounts = vec![api::Mount { container_path: "/a".into(), host_path: "x".into(), ..Default::default() }], &["host_path", "\"x\""]);
        check(|c| c.stop_signal = 99, &["config.stop_signal", "99"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_user = Some(api::Int64Value { value: -1 }));
        refused(container(Some(config)), &["run_as_user", "-1"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_user = Some(api::Int64Value { value: u32::MAX.into() }));
        refused(container(Some(config)), &["run_as_user", "4294967295"]);
        let mut config = ctr();
        context(&mut config, |s| s.run_as_group = Some(api::Int64Value { value: 5 }));
        refused(container(Some(config)), &["run_as_group", "without"]);
    }

    #[test]
    fn every_stop_signal_of_the_api_is_known() {
        for number in 1..=65 {
            let named = api::Signal::try_from(number).unwrap();
            assert!(stop_signal(named).is_ok(), "{}", named.as_str_name());
        }
        assert_eq!(stop_signal(api::Signal::Sigrtmaxminus1).unwrap(), 63);
        assert_eq!(stop_signal(api::Signal::Sigterm).unwrap(), 15);
    }
}
