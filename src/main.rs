//! copepod: the daemon and its administration.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use copepod::config::{Config, DEFAULT_PATH};
use copepod::errchain::Chain;
use copepod::{admin, daemon, telemetry};

/// A Kubernetes container runtime.
///
/// kubelet reaches it with --container-runtime-endpoint=unix:///run/copepod/copepod.sock, crictl with the same path.
#[derive(Parser)]
#[command(name = "copepod", version, disable_version_flag = true)]
struct Args {
    /// The configuration file; drop-ins are read from config.d/ beside it.
    #[arg(long, global = true, default_value = DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the CRI until SIGTERM. Containers go on without the daemon; the next one takes them back.
    Serve,
    /// Print, show or check the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Say what the daemon serves: its conditions, pods and containers.
    Status,
    /// Stop and remove every pod, for an uninstall or a move to another runtime.
    Drain,
    /// Print the version.
    Version,
    /// Print a shell's completions.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page, for man(1).
    Manual,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the default configuration.
    Default,
    /// Print the configuration in force: the file, its drop-ins and the defaults.
    Show,
    /// Check the configuration; exits with 1 and says what is wrong.
    Check,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("copepod: {}", Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    match &args.command {
        Command::Version => println!("copepod {}", env!("CARGO_PKG_VERSION")),
        Command::Config(ConfigCommand::Default) => print!("{}", include_str!("../config/copepod.yaml")),
        Command::Config(ConfigCommand::Show) => print!("{}", Config::load(&args.config)?.to_yaml()),
        Command::Config(ConfigCommand::Check) => {
            Config::load(&args.config)?;
            println!("{} is valid", args.config.display());
        }
        Command::Completions { shell } => clap_complete::generate(*shell, &mut Args::command(), "copepod", &mut std::io::stdout()),
        Command::Manual => manual(&mut std::io::stdout())?,
        Command::Serve => {
            let config = Config::load(&args.config)?;
            telemetry::start(&config.log);
            daemon::run(config)?;
        }
        Command::Status => admin::status(&Config::load(&args.config)?)?,
        Command::Drain => admin::drain(&Config::load(&args.config)?)?,
    }
    Ok(())
}

/// The manual page: the program, then each subcommand as a section of its own.
fn manual(out: &mut impl Write) -> std::io::Result<()> {
    let mut command = Args::command();
    command.build();
    let page = clap_mangen::Man::new(command.clone()).title("copepod").section("8").manual("System administration");
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    writeln!(out, ".SH COMMANDS")?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        writeln!(out, ".TP\n\\fBcopepod {}\\fR\n{about}", subcommand.get_name())?;
    }
    writeln!(
        out,
        ".SH FILES\n.TP\n{DEFAULT_PATH}\nThe configuration; drop-ins in config.d/ beside it. \\fBcopepod config default\\fR explains every key."
    )?;
    writeln!(out, ".TP\n/run/copepod/copepod.sock\nWhere the CRI is served.")?;
    writeln!(out, ".TP\n/var/lib/copepod\nImages and containers' writable layers.")?;
    writeln!(out, ".SH SEE ALSO\ncrictl(1), kubelet(1), systemd.resource\\-control(5)")
}
