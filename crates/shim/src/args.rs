//! The command line of containerd's shim protocol: Go-style flags, then an action.

use std::path::PathBuf;

use crate::error::Error;

/// What the shim is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Print name and version.
    Version,
    /// Start a server, or find the one of the pod, and print its address.
    Start,
    /// Clean up what a dead shim left.
    Delete,
    /// Be the server; the listening socket is standard input.
    Serve,
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// What to do.
    pub(crate) action: Action,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// ID of the pod, or of the container that containerd starts.
    pub(crate) id: String,
    /// Directory of the bundle, where it is not the working directory (`delete`).
    pub(crate) bundle: Option<PathBuf>,
    /// Whether the journal is to say more.
    pub(crate) debug: bool,
}

impl Args {
    /// Reads the command line without the program's name. Flags are `-name value`, `-name=value`, or with two dashes, as
    /// in Go's `flag`.
    pub(crate) fn parse(arguments: &[String]) -> Result<Args, Error> {
        let (mut namespace, mut id, mut bundle, mut debug) = (String::new(), String::new(), None, false);
        let mut action = Action::Serve;
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                action = parse_action(argument)?;
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                let value = inline.clone().or_else(|| rest.next().cloned());
                value.ok_or_else(|| Error::Invalid(format!("flag -{name} needs a value")))
            };
            match name {
                "namespace" => namespace = value()?,
                "id" => id = value()?,
                "bundle" => bundle = Some(value()?).filter(|dir| !dir.is_empty()).map(PathBuf::from),
                // The daemon's sockets and event publisher: this shim reports to those who ask, and to nobody else.
                "address" | "publish-binary" | "socket" => drop(value()?),
                "debug" => debug = inline.is_none_or(|value| value != "false"),
                "v" | "version" => action = Action::Version,
                other => return Err(Error::Invalid(format!("unknown flag -{other}"))),
            }
        }
        if id.is_empty() && action != Action::Version {
            return Err(Error::Invalid("flag -id is missing: the ID of the pod or container".to_owned()));
        }
        Ok(Args { action, namespace, id, bundle, debug })
    }
}

fn parse_action(word: &str) -> Result<Action, Error> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        other => Err(Error::Invalid(format!("unknown action {other:?}: start, delete, or none to serve"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_line_of_containerd() {
        let args = parse("-namespace k8s.io -address /run/d.sock -publish-binary /bin/d -id abc -debug start").unwrap();
        let expected = Args {
            action: Action::Start,
            namespace: "k8s.io".to_owned(),
            id: "abc".to_owned(),
            bundle: None,
            debug: true,
        };
        assert_eq!(args, expected);
        assert_eq!(parse("--id=abc -bundle=/b delete").unwrap().bundle, Some(PathBuf::from("/b")));
        assert_eq!(parse("-id abc").unwrap().action, Action::Serve);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |line: &str, words: &str| {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(words), "{line}: {error}");
        };
        check("start", "-id");
        check("-id", "needs a value");
        check("-id x -nosuch start", "-nosuch");
        check("-id x restart", "restart");
    }
}
