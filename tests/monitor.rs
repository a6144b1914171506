//! The monitor's program over its socket: real containers on a busybox root, in control groups and mounts of the test's own.

#[path = "monitor/attach.rs"]
mod attach;
#[path = "monitor/faults.rs"]
mod faults;
#[path = "monitor/lab.rs"]
mod lab;
#[path = "monitor/life.rs"]
mod life;
#[path = "common/monitor_client.rs"]
mod monitor_client;
#[path = "common/root.rs"]
mod root;

/// Each is a test of its own, and needs root.
macro_rules! tests {
    ($($module:ident::{$($name:ident),* $(,)?})*) => {$($(
        #[test]
        fn $name() {
            if root::root(stringify!($name)) {
                $module::$name();
            }
        }
    )*)*};
}

tests! {
    attach::{
        clients_get_what_is_written_from_then_on,
        clients_attach_to_running_containers_alone,
        stdin_ends_with_the_first_client_if_asked_for,
        a_client_that_stops_reading_holds_up_nobody,
        a_container_that_does_not_read_holds_up_nobody,
        a_terminal_is_shared_and_resized,
        clients_end_with_the_stdio_process_and_come_back,
        an_exec_has_a_terminal,
        execs_end_with_the_connection_that_asked_for_them,
        a_newer_daemons_call_is_refused,
    }
    life::{
        a_container_runs_and_its_exit_and_log_are_kept,
        calls_are_refused_where_they_do_not_fit,
        a_start_that_fails_is_an_exit_with_its_reason,
        a_stop_signals_then_kills,
        a_running_container_is_removed_by_force,
        an_exit_is_told_though_a_grandchild_holds_the_pipe,
        an_exec_runs_times_out_and_dies_with_its_container,
        the_sandbox_is_made_once_and_shared,
        a_pause_process_that_dies_stops_the_sandbox,
        memory_that_runs_out_is_told,
        twenty_containers_at_once,
        a_terminal_is_logged,
        signals_for_the_group_do_not_end_the_monitor,
        a_pod_with_one_container_is_small,
    }
    faults::{
        a_monitor_that_was_asked_for_nothing_ends_with_its_daemon,
        a_client_that_is_gone_comes_back_to_everything,
        nonsense_closes_its_connection_and_nothing_else,
        a_stdio_process_that_dies_is_replaced,
        a_full_disk_loses_whole_lines_and_counts_them,
        a_creator_on_a_hung_mount_holds_up_nobody,
        a_creator_that_is_killed_fails_its_call_and_leaves_nothing,
        a_log_is_renamed_and_opened_anew_in_mid_line,
        sixty_four_mebibytes_on_both_streams_arrive_whole,
        a_line_of_a_mebibyte_arrives_whole,
    }
}
