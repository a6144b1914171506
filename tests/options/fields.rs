//! No field is forgotten: each one of the configurations' messages has a test here, by name.

use std::collections::BTreeSet;

use super::PARTS;
use super::harness::Test;
use super::node::Node;

/// The tests.
pub const TESTS: &[Test<Node>] = &[("fields_have_tests", have_tests)];

/// Messages, their fields, and the tests that set them, rightly and wrongly. `""`: the field is a message with a row of its own.
/// A test of another program stands with its file: `tests/cri.rs::name`.
const FIELDS: &[(&str, &[(&str, &str)])] = &[
    (
        "ContainerConfig",
        &[
            ("metadata", "process_metadata"),
            ("image", "process_image"),
            ("command", "process_command_arguments_directory_environment"),
            ("args", "process_command_arguments_directory_environment"),
            ("working_dir", "process_command_arguments_directory_environment"),
            ("envs", "process_command_arguments_directory_environment"),
            ("mounts", ""),
            ("devices", ""),
            ("labels", "process_labels_and_annotations"),
            ("annotations", "process_labels_and_annotations"),
            ("log_path", "process_log_path"),
            ("stdin", "process_stdin"),
            ("stdin_once", "process_stdin"),
            ("tty", "process_tty"),
            ("linux", ""),
            ("windows", "process_other_systems_parts"),
            ("CDI_devices", "devices_refused"),
            ("stop_signal", "process_stop_signal"),
        ],
    ),
    (
        "Mount",
        &[
            ("container_path", "mounts_targets"),
            ("host_path", "mounts_host_paths"),
            ("readonly", "mounts_readonly"),
            ("selinux_relabel", "mounts_in_status"),
            ("propagation", "mounts_propagation"),
            ("uidMappings", NAMESPACES),
            ("gidMappings", NAMESPACES),
            ("recursive_read_only", "mounts_readonly"),
            ("image", "volumes_image"),
            ("image_sub_path", "volumes_image_sub_path"),
        ],
    ),
    ("Device", &[("container_path", "devices_by_path"), ("host_path", "devices_by_path"), ("permissions", "devices_permissions")]),
    ("LinuxContainerConfig", &[("resources", ""), ("security_context", "")]),
    (
        "LinuxContainerResources",
        &[
            ("cpu_period", "resources_cpu"),
            ("cpu_quota", "resources_cpu"),
            ("cpu_shares", "resources_cpu"),
            ("memory_limit_in_bytes", "resources_memory_and_swap"),
            ("memory_swap_limit_in_bytes", "resources_memory_and_swap"),
            ("oom_score_adj", "resources_oom_score_adj"),
            ("cpuset_cpus", "resources_cpuset"),
            ("cpuset_mems", "resources_cpuset"),
            ("hugepage_limits", "resources_hugepages"),
            ("unified", "resources_unified"),
        ],
    ),
    (
        "LinuxContainerSecurityContext",
        &[
            ("capabilities", "security_capabilities"),
            ("privileged", "security_privileged"),
            ("namespace_options", NAMESPACES),
            ("selinux_options", "profiles_selinux"),
            ("run_as_user", "security_user_by_number"),
            ("run_as_group", "security_user_by_number"),
            ("run_as_username", "security_user_by_name"),
            ("readonly_rootfs", "security_readonly_rootfs"),
            ("supplemental_groups", "security_groups"),
            ("supplemental_groups_policy", "security_groups"),
            ("no_new_privs", "security_no_new_privs"),
            ("masked_paths", "security_masked_paths"),
            ("readonly_paths", "security_readonly_paths"),
            ("seccomp", "profiles_seccomp"),
            ("apparmor", "profiles_apparmor"),
            ("apparmor_profile", "profiles_apparmor"),
            ("seccomp_profile_path", "profiles_seccomp_profile_path"),
        ],
    ),
    (
        "Capability",
        &[
            ("add_capabilities", "security_capabilities"),
            ("drop_capabilities", "security_capabilities"),
            ("add_ambient_capabilities", "security_capabilities"),
        ],
    ),
    ("SecurityProfile", &[("profile_type", "profiles_seccomp"), ("localhost_ref", "profiles_seccomp_of_the_node")]),
    ("SELinuxOption", &[("user", "profiles_selinux"), ("role", "profiles_selinux"), ("type", "profiles_selinux"), ("level", "profiles_selinux")]),
    (
        "PodSandboxConfig",
        &[
            ("metadata", "sandbox_metadata"),
            ("hostname", "sandbox_hostname"),
            ("log_directory", "sandbox_log_directory"),
            ("dns_config", ""),
            ("port_mappings", ""),
            ("labels", "sandbox_labels_and_annotations"),
            ("annotations", "sandbox_labels_and_annotations"),
            ("linux", ""),
            ("windows", "process_other_systems_parts"),
        ],
    ),
    (
        "PodSandboxMetadata",
        &[("name", "sandbox_metadata"), ("uid", "sandbox_metadata"), ("namespace", "sandbox_metadata"), ("attempt", "sandbox_metadata")],
    ),
    ("DNSConfig", &[("servers", "sandbox_dns_config"), ("searches", "sandbox_dns_config"), ("options", "sandbox_dns_config")]),
    (
        "PortMapping",
        &[
            ("protocol", "sandbox_port_mappings"),
            ("container_port", "sandbox_port_mappings"),
            ("host_port", "sandbox_port_mappings"),
            ("host_ip", "sandbox_port_mappings"),
        ],
    ),
    (
        "LinuxPodSandboxConfig",
        &[
            ("cgroup_parent", "sandbox_cgroup_parent"),
            ("security_context", ""),
            ("sysctls", "sandbox_sysctls"),
            ("overhead", "update_of_a_pod_is_kept"),
            ("resources", "update_of_a_pod_is_kept"),
        ],
    ),
    (
        "LinuxSandboxSecurityContext",
        &[
            ("namespace_options", NAMESPACES),
            ("selinux_options", "profiles_selinux"),
            ("run_as_user", "sandbox_user_and_groups"),
            ("run_as_group", "sandbox_user_and_groups"),
            ("readonly_rootfs", "sandbox_readonly_rootfs"),
            ("supplemental_groups", "sandbox_user_and_groups"),
            ("supplemental_groups_policy", "sandbox_user_and_groups"),
            ("privileged", "sandbox_privileged"),
            ("seccomp", "profiles_seccomp_of_the_sandbox"),
            ("apparmor", "profiles_apparmor_of_the_sandbox"),
            ("seccomp_profile_path", "profiles_seccomp_of_the_sandbox"),
        ],
    ),
];

/// What is tested below this program, too.
const NAMESPACES: &str = "tests/oci_runtime/pod.rs::containers_share_the_pods_namespaces";

/// The names of a message's fields, as `proto` defines it.
fn fields(proto: &str, message: &str) -> BTreeSet<String> {
    let head = format!("message {message} {{");
    let body = proto.split_once(&head).unwrap_or_else(|| panic!("no message {message}")).1;
    let mut depth = 0;
    let mut found = BTreeSet::new();
    for line in body.lines().map(str::trim) {
        if depth == 0 && line == "}" {
            return found;
        }
        depth += line.matches('{').count();
        if depth == 0
            && !line.starts_with("//")
            && let Some((field, _)) = line.split_once(" = ")
            && let Some(name) = field.split_whitespace().last()
        {
            found.insert(name.to_string());
        }
        depth -= line.matches('}').count();
    }
    panic!("message {message} does not end")
}

fn have_tests(_: &mut Node) {
    let project = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(project.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let proto = read("proto/cri/runtime/v1/api.proto");
    let tests: BTreeSet<&str> = PARTS.iter().flat_map(|part| part.iter().map(|(name, _)| *name)).collect();
    let mut wrong = Vec::new();
    for (message, rows) in FIELDS {
        let defined = fields(&proto, message);
        let named: BTreeSet<String> = rows.iter().map(|(field, _)| field.to_string()).collect();
        wrong.extend(defined.difference(&named).map(|field| format!("{message}.{field} has no test")));
        wrong.extend(named.difference(&defined).map(|field| format!("{message} has no field {field}")));
        for (field, test) in rows.iter().filter(|(_, test)| !test.is_empty()) {
            let there = match test.split_once("::") {
                Some((file, name)) => read(file).contains(name),
                None => tests.contains(test),
            };
            if !there {
                wrong.push(format!("{message}.{field}: there is no test {test}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
