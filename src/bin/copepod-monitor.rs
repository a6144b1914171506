//! The monitor of a pod; see [`copepod::monitor`].

fn main() -> std::process::ExitCode {
    copepod::monitor::main()
}
