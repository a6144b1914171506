//! The device filter's rules.

use crate::plan::DeviceRule;

pub(super) fn default_rules(privileged: bool) -> Vec<DeviceRule> {
    let any = u32::from(b'a');
    let chr = u32::from(b'c');
    if privileged {
        return vec![DeviceRule { allow: true, kind: any, major: None, minor: None, access: "rwm".into() }];
    }
    let mut rules = vec![
        DeviceRule { allow: false, kind: any, major: None, minor: None, access: "rwm".into() },
        // mknod alone is harmless: what is made can't be opened.
        DeviceRule { allow: true, kind: chr, major: None, minor: None, access: "m".into() },
        DeviceRule { allow: true, kind: u32::from(b'b'), major: None, minor: None, access: "m".into() },
    ];
    // null, zero, full, random, urandom, tty, console, ptmx, the pty slaves (devices.txt of the kernel).
    for (major, minor) in
        [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(1)), (5, Some(2)), (136, None)]
    {
        rules.push(DeviceRule { allow: true, kind: chr, major: Some(major), minor, access: "rwm".into() });
    }
    rules
}
