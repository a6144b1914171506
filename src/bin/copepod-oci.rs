//! copepod-oci: the embedded runtime behind runc's command line. Its commands come with a later release.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--version" | "-v" | "version") => {
            println!("copepod-oci {}\nspec: 1.3.0", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        command => {
            eprintln!("copepod-oci: {} is not built yet; the daemon runs containers with the same runtime", command.unwrap_or("a command"));
            ExitCode::FAILURE
        }
    }
}
