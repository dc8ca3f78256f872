//! What the configuration accepts, what it refuses, and in which words.

use super::*;

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(Path::new("config.toml"), text)
}

#[track_caller]
fn refused(text: &str, message: &str) {
    match parse(text) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => assert_eq!(error.to_string(), message),
    }
}

/// The documented file with the commented-out keys set: sets every key that exists.
fn everything_set() -> String {
    let uncomment = |line: &str| match line.strip_prefix('#') {
        Some(key) if !key.starts_with(' ') && !key.is_empty() => key.to_owned(),
        _ => line.to_owned(),
    };
    DEFAULT_TOML.lines().map(uncomment).collect::<Vec<_>>().join("\n")
}

fn dotted_keys(table: &toml::Table, above: &str, keys: &mut Vec<String>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(table) => dotted_keys(table, &format!("{above}{key}."), keys),
            _ => keys.push(format!("{above}{key}")),
        }
    }
}

#[test]
fn documented_defaults_are_the_defaults() {
    assert_eq!(parse(DEFAULT_TOML).unwrap(), Config::default());
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn every_key_is_documented_with_a_sentence() {
    let config = parse(&everything_set()).unwrap();
    let mut of_types = Vec::new();
    dotted_keys(&toml::Table::try_from(&config).unwrap(), "", &mut of_types);
    let mut documented = Vec::new();
    dotted_keys(&toml::from_str(&everything_set()).unwrap(), "", &mut documented);
    assert_eq!(of_types, documented);

    let lines: Vec<_> = DEFAULT_TOML.lines().collect();
    for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(" = ")) {
        assert!(number > 0 && lines[number - 1].starts_with("# "), "no sentence above: {line}");
        assert!(lines[number - 1].ends_with('.'), "no sentence: {}", lines[number - 1]);
    }
}

#[test]
fn metrics_are_served_on_loopback_only() {
    for address in ["127.0.0.1:9790", "[::1]:9790"] {
        parse(&format!("[metrics]\naddress = \"{address}\"\n")).unwrap();
    }
    refused(
        "[metrics]\naddress = \"0.0.0.0:9790\"\n",
        "config.toml:2:11: metrics.address is no loopback address; metrics are not encrypted, and name pods and images",
    );
}

#[test]
fn a_partial_file_keeps_the_other_defaults() {
    let config = parse("state = \"/run/other\"\n[log]\nformat = \"json\"\n").unwrap();
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.log.level, "info");
    assert_eq!(config.socket(), Path::new("/run/other/stasis.sock"));
}

#[test]
fn listen_takes_a_path_or_a_unix_url() {
    for listen in ["unix:///run/x.sock", "/run/x.sock"] {
        assert_eq!(parse(&format!("listen = {listen:?}")).unwrap().socket(), Path::new("/run/x.sock"));
    }
    refused(
        "listen = \"tcp://0.0.0.0:1\"",
        "config.toml:1:10: listen = \"tcp://0.0.0.0:1\" is neither unix:///PATH nor an absolute path; \
         other sockets are not served",
    );
}

#[test]
fn unknown_keys_are_refused_with_place_and_nearest_match() {
    refused(
        "version = 1\n\n[log]\n  leval = \"info\"\n",
        "config.toml:4:3: unknown key \"log.leval\"; did you mean \"log.level\"?",
    );
    refused("roots = \"/x\"", "config.toml:1:1: unknown key \"roots\"; did you mean \"root\"?");
    refused("[chekpoint]\n", "config.toml:1:2: unknown key \"chekpoint\"; did you mean \"checkpoint\"?");
    refused("driver = 1", "config.toml:1:1: unknown key \"driver\"; did you mean \"driver\" of [cgroup]?");
    refused("[shim]\nzzz = 1", "config.toml:2:1: unknown key \"shim.zzz\"; known here: shim.path");
    refused(
        "[runtimes.crun]\nbinari = \"crun\"",
        "config.toml:2:1: unknown key \"runtimes.crun.binari\"; did you mean \"runtimes.crun.binary\"?",
    );
}

#[test]
fn all_unknown_keys_are_named_at_once() {
    refused(
        "roots = 1\nstat = 2",
        "config.toml:1:1: unknown key \"roots\"; did you mean \"root\"?\n\
         config.toml:2:1: unknown key \"stat\"; did you mean \"state\"?",
    );
}

#[test]
fn bad_values_are_refused_with_their_place() {
    refused("[log]\nformat = \"xml\"", "config.toml:2:10: unknown variant `xml`, expected `text` or `json`");
    refused("[cni]\nplugin_timeout_seconds = \"1\"", "config.toml:2:26: invalid type: string \"1\", expected u64");
    refused("[cni]\nplugin_timeout_seconds = 0", "config.toml:2:26: cni.plugin_timeout_seconds must be at least 1");
    refused("version = 2", "config.toml:1:11: version 2 is not known; this stasisd reads version 1");
    refused("root = \"var\"", "config.toml:1:8: root = \"var\" is not an absolute path");
    refused(
        "[shim]\npath = \"/bin/shim\"",
        "config.toml:2:8: the program of the shim must be called containerd-shim-stasis-v1, by which runtime types find it",
    );
    refused(
        "default_runtime = \"kata\"",
        "config.toml:1:19: default_runtime \"kata\" has no table [runtimes.NAME]; there are: runc",
    );
    refused(
        "[log]\nlevel = \"loud=?\"",
        "config.toml:2:9: log.level \"loud=?\" is no level; use error, warn, info, debug or trace",
    );
}

#[test]
fn broken_grammar_is_refused_with_its_place() {
    let error = parse("root = \n").unwrap_err().to_string();
    assert!(error.starts_with("config.toml:1:8: "), "{error}");
}

#[test]
fn a_named_file_must_exist_and_the_default_one_need_not() {
    let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err().to_string();
    assert_eq!(error, "cannot read the configuration /nonexistent/config.toml: No such file or directory (os error 2)");
}
