//! The help texts, and the rules of the command line.

use clap::{CommandFactory as _, Parser as _};

use crate::cli::{Cli, Command};
use crate::failure::{Failure, printable};

/// Help of a command and all below it, as `--help` prints it on a wide terminal.
fn help(command: &mut clap::Command, out: &mut String) {
    let text = command.render_long_help();
    out.push_str(&format!("$ {} --help\n{text}\n", command.get_bin_name().unwrap_or("stasis")));
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    for name in names {
        if let Some(child) = command.find_subcommand_mut(&name) {
            help(child, out);
        }
    }
}

#[test]
fn help_texts() {
    let mut command = Cli::command().term_width(100).mut_args(|a| a.hide_env_values(true));
    command.build();
    let mut all = String::new();
    help(&mut command, &mut all);
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("help", all);
    });
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_an_example() {
    let command = Cli::command();
    for child in command.get_subcommands().filter(|c| !c.has_subcommands()) {
        let help = child.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains(&format!("stasis {}", child.get_name())), "{}", child.get_name());
    }
}

#[test]
fn options_go_before_and_after_the_command() {
    for line in ["stasis -o json ps -a", "stasis ps -a -o json"] {
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        assert!(matches!(cli.command, Command::Ps { all: true }));
        assert_eq!(cli.global.output, crate::cli::Format::Json);
    }
    let exec = Cli::try_parse_from(["stasis", "exec", "c", "--", "sh", "-c", "-o"]).unwrap();
    assert!(matches!(exec.command, Command::Exec { command, .. } if command == ["sh", "-c", "-o"]));
    for line in
        ["stasis", "stasis exec c", "stasis rm", "stasis --timeout 0 ps", "stasis pull r --creds a:b --creds-stdin"]
    {
        assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
    }
}

/// What people meet, with its hint and its exit code.
#[test]
fn failures_in_words() {
    let daemon = |code, message: &str| Failure::daemon("pull r", &tonic::Status::new(code, message));
    let failures = [
        Failure::Permission { path: "/run/stasis/stasis.sock".into() },
        Failure::OtherRuntime { path: "/run/x.sock".into(), runtime: "containerd v2.1.9".into() },
        Failure::NotFound { kind: "container", wanted: "app".into() },
        Failure::NotFound { kind: "image", wanted: "app".into() },
        Failure::Ambiguous { kind: "pod", wanted: "a".into(), candidates: "ab, ac".into() },
        Failure::TimedOut { what: "stop app".into(), seconds: 30 },
        daemon(tonic::Code::FailedPrecondition, "the base image x is not here\npull it first"),
        daemon(tonic::Code::NotFound, "no such image"),
        daemon(tonic::Code::Unimplemented, ""),
        daemon(tonic::Code::Unavailable, "registry x cannot be reached"),
        Failure::daemon("pull r", &tonic::Status::from_error(Box::new(std::io::Error::other("broken pipe")))),
        Failure::State("app is running: stop it first, or give --force".into()),
    ];
    let text = failures.map(|f| format!("{}\n[{}]", f.text(), f.exit_code())).join("\n");
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("failures", text);
    });
}

#[test]
fn what_strangers_wrote_stays_on_its_line() {
    assert_eq!(printable("a\r\n\nb\x07c\x1b[1m"), "a; b?c?[1m");
}
