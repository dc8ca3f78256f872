//! One TOML text with the places of its keys: errors that name line and column, and unknown keys with the nearest known.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{DEFAULT_TOML, Error, Problem};

/// How alike two keys must be (Jaro-Winkler, 0 to 1) for one to be suggested instead of the other.
const ALIKE: f64 = 0.8;

/// The table whose keys are names that the administrator chooses.
const NAMED_TABLES: &str = "runtimes";

/// A parsed text and where it came from.
pub(super) struct Document<'a> {
    file: &'a Path,
    text: &'a str,
    table: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    /// Parses; a mistake in the grammar of TOML is reported with its place.
    pub(super) fn parse(file: &'a Path, text: &'a str) -> Result<Self, Error> {
        match DeTable::parse(text) {
            Ok(table) => Ok(Self { file, text, table }),
            Err(error) => Err(Error::Refused(vec![from_toml(file, text, &error)])),
        }
    }

    /// Refuses keys that the documented defaults do not have, all at once.
    pub(super) fn refuse_unknown_keys(&self) -> Result<(), Error> {
        let known = known_keys();
        let mut problems = Vec::new();
        self.unknown_in(self.table.get_ref(), &known, &[], &known, &mut problems);
        if problems.is_empty() { Ok(()) } else { Err(Error::Refused(problems)) }
    }

    /// The values; one of the wrong type is reported with its place.
    pub(super) fn deserialize<T: DeserializeOwned>(&self) -> Result<T, Error> {
        toml::from_str(self.text).map_err(|error| Error::Refused(vec![from_toml(self.file, self.text, &error)]))
    }

    /// A problem with the value of `key`; placed if the text sets it.
    pub(super) fn problem_at(&self, key: &[&str], message: String) -> Problem {
        let place = find(self.table.get_ref(), key).map(|span| position(self.text, span.start));
        Problem { file: self.file.to_owned(), place, message }
    }

    /// The line of each value, by dotted key.
    pub(super) fn lines(&self) -> BTreeMap<String, usize> {
        let mut lines = BTreeMap::new();
        self.lines_in(self.table.get_ref(), "", &mut lines);
        lines
    }

    fn lines_in(&self, table: &DeTable<'_>, above: &str, lines: &mut BTreeMap<String, usize>) {
        for (key, value) in table {
            let name = format!("{above}{}", key.get_ref());
            match value.get_ref() {
                DeValue::Table(table) => self.lines_in(table, &format!("{name}."), lines),
                _ => drop(lines.insert(name, position(self.text, value.span().start).0)),
            }
        }
    }

    fn unknown_in(
        &self,
        table: &DeTable<'_>,
        known: &toml::Table,
        above: &[&str],
        all: &toml::Table,
        problems: &mut Vec<Problem>,
    ) {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let path = [above, &[name]].concat();
            match (lookup(known, above, name), value.get_ref()) {
                (Some(toml::Value::Table(known)), DeValue::Table(table)) => {
                    self.unknown_in(table, known, &path, all, problems);
                }
                (Some(_), _) => {}
                (None, _) => problems.push(Problem {
                    file: self.file.to_owned(),
                    place: Some(position(self.text, key.span().start)),
                    message: format!("unknown key {:?}; {}", path.join("."), advice(name, above, known, all)),
                }),
            }
        }
    }
}

/// The keys that exist: those of the documented defaults, with the ones that are commented out.
fn known_keys() -> toml::Table {
    let uncomment = |line: &'static str| match line.strip_prefix('#') {
        Some(key) if key.starts_with(|first: char| first.is_ascii_lowercase()) => key,
        _ => line,
    };
    let text: Vec<_> = DEFAULT_TOML.lines().map(uncomment).collect();
    toml::from_str(&text.join("\n")).expect("the documented defaults are TOML, as a test holds")
}

/// The known entry for `name`; inside a table of freely named tables any entry stands for all.
fn lookup<'k>(known: &'k toml::Table, above: &[&str], name: &str) -> Option<&'k toml::Value> {
    if above == [NAMED_TABLES] { known.values().next() } else { known.get(name) }
}

/// What to write instead of the unknown `name`.
fn advice(name: &str, above: &[&str], known: &toml::Table, all: &toml::Table) -> String {
    let dotted = |key: &str| [above, &[key]].concat().join(".");
    let (score, nearest) = known
        .keys()
        .map(|key| (strsim::jaro_winkler(name, key), key))
        .fold((0.0, ""), |best, (score, key)| if score > best.0 { (score, key.as_str()) } else { best });
    if score >= ALIKE {
        return format!("did you mean {:?}?", dotted(nearest));
    }
    let elsewhere: Vec<_> = all
        .iter()
        .filter(|(_, table)| table.as_table().is_some_and(|table| table.contains_key(name)))
        .map(|(table, _)| format!("{name:?} of [{table}]"))
        .collect();
    if !elsewhere.is_empty() {
        return format!("did you mean {}?", elsewhere.join(" or "));
    }
    let keys: Vec<_> = known.keys().map(|key| dotted(key)).collect();
    format!("known here: {}", keys.join(", "))
}

fn find(table: &DeTable<'_>, key: &[&str]) -> Option<Range<usize>> {
    let (first, rest) = key.split_first()?;
    let (_, value) = table.iter().find(|(name, _)| name.get_ref().as_ref() == *first)?;
    match (rest, value.get_ref()) {
        ([], _) => Some(value.span()),
        (rest, DeValue::Table(table)) => find(table, rest),
        _ => None,
    }
}

fn from_toml(file: &Path, text: &str, error: &toml::de::Error) -> Problem {
    let place = error.span().map(|span| position(text, span.start));
    Problem { file: file.to_owned(), place, message: error.message().to_owned() }
}

/// Line and column, both from 1, of a byte offset; columns count characters.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(offset)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
