//! Where each value of the configuration in effect comes from: the command line, a line of the file, or the defaults.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::document::Document;
use super::{Config, DEFAULT_PATH, Error, read};

/// The configuration in effect as TOML, each value with a remark that says where it comes from. `overruled` are the keys
/// that the command line set, with its options.
pub(crate) fn dump(config: &Config, file: Option<&Path>, overruled: &[(&str, &str)]) -> Result<String, Error> {
    let path = file.unwrap_or(Path::new(DEFAULT_PATH));
    let lines = match read(path) {
        Ok(text) => Document::parse(path, &text)?.lines(),
        // That a file must be there if it was named was found out when the configuration was loaded.
        Err(_) => BTreeMap::new(),
    };
    let origin = |key: &str| {
        let option = overruled.iter().find(|(overruled, _)| *overruled == key).map(|(_, option)| (*option).to_owned());
        let line = || lines.get(key).map(|line| format!("{}:{line}", path.display()));
        option.or_else(line).unwrap_or_else(|| "default".to_owned())
    };
    let mut text = String::new();
    write_table(&mut text, &config.table(), "", &origin);
    Ok(text)
}

/// First the values of a table, then the tables in it, as TOML wants it.
fn write_table(text: &mut String, table: &toml::Table, name: &str, origin: &impl Fn(&str) -> String) {
    let dotted = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    let values: Vec<_> = table.iter().filter(|(_, value)| !value.is_table()).collect();
    if !name.is_empty() && (!values.is_empty() || table.is_empty()) {
        let _ = writeln!(text, "\n[{name}]");
    }
    for (key, value) in values {
        let _ = writeln!(text, "{key} = {value}  # {}", origin(&dotted(key)));
    }
    for (key, value) in table {
        if let toml::Value::Table(table) = value {
            write_table(text, table, &dotted(key), origin);
        }
    }
}

impl Config {
    /// All values as TOML; a key without a value is left out.
    fn table(&self) -> toml::Table {
        toml::Table::try_from(self).expect("the configuration is TOML, as a test holds")
    }

    /// The values by dotted key.
    pub(crate) fn values(&self) -> BTreeMap<String, toml::Value> {
        let mut values = BTreeMap::new();
        collect(&self.table(), "", &mut values);
        values
    }
}

fn collect(table: &toml::Table, above: &str, values: &mut BTreeMap<String, toml::Value>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(table) => collect(table, &format!("{above}{key}."), values),
            value => drop(values.insert(format!("{above}{key}"), value.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_says_where_it_comes_from_and_the_whole_is_a_configuration() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "state = \"/a\"\n\n[log]\nlevel = \"warn\"\n\n[runtimes.kata]\ntype = \"io.containerd.kata.v2\"\n";
        std::fs::write(file.path(), text).unwrap();
        let mut config = Config::load(Some(file.path())).unwrap();
        config.root = "/b".into();
        let dumped = dump(&config, Some(file.path()), &[("root", "--root")]).unwrap();
        let path = file.path().display();
        for line in [
            "root = \"/b\"  # --root".to_owned(),
            format!("state = \"/a\"  # {path}:1"),
            format!("level = \"warn\"  # {path}:4"),
            format!("type = \"io.containerd.kata.v2\"  # {path}:7"),
            "format = \"text\"  # default".to_owned(),
            "[runtimes.runc]".to_owned(),
        ] {
            assert!(dumped.lines().any(|have| have == line), "{line} in\n{dumped}");
        }
        assert_eq!(Config::parse(file.path(), &dumped).unwrap(), config);
    }

    #[test]
    fn without_a_file_everything_is_default() {
        let dumped = dump(&Config::default(), Some(Path::new("/nonexistent")), &[]).unwrap();
        assert!(dumped.lines().filter(|line| line.contains(" = ")).all(|line| line.ends_with("# default")), "{dumped}");
    }
}
