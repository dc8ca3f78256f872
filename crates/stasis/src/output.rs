//! The three forms of output, and the quiet one. Tables keep their columns: scripts cut them.

use std::fmt::Write as _;
use std::io::Write as _;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Format, Global};
use crate::failure::{Failure, Result, printable};
use crate::yaml;

/// One object of a list.
pub(crate) trait Row: Serialize {
    /// Titles of the columns.
    const COLUMNS: &'static [&'static str];
    /// What `-q` prints.
    fn id(&self) -> &str;
    /// Lines of the table: usually one.
    fn lines(&self, now: Timestamp) -> Vec<Vec<String>>;
}

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    format: Format,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        Self { format: global.output, quiet: global.quiet }
    }

    /// Whether nothing but results is wanted.
    pub(crate) fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Prints a list.
    pub(crate) fn list<R: Row>(self, rows: &[R]) -> Result<()> {
        print(&self.render_list(rows, Timestamp::now())?)
    }

    /// Prints one result: `human` as a table, `id` with `-q`.
    pub(crate) fn item(self, item: &impl Serialize, human: &str, id: &str) -> Result<()> {
        print(&self.render_item(item, human, id)?)
    }

    /// Prints a line for people, or with `-q` an ID; nothing for programs.
    pub(crate) fn line(self, human: &str, id: &str) -> Result<()> {
        if self.format == Format::Table { print(&format!("{}\n", if self.quiet { id } else { human })) } else { Ok(()) }
    }

    /// Prints a value for programs; nothing for people.
    pub(crate) fn structure(self, value: &impl Serialize) -> Result<()> {
        self.structured(value)?.map_or(Ok(()), |text| print(&text))
    }

    fn render_list<R: Row>(self, rows: &[R], now: Timestamp) -> Result<String> {
        if self.quiet && self.format == Format::Table {
            return Ok(rows.iter().fold(String::new(), |out, row| out + row.id() + "\n"));
        }
        match self.structured(&rows)? {
            Some(text) => Ok(text),
            None => Ok(table(R::COLUMNS, rows.iter().flat_map(|row| row.lines(now)))),
        }
    }

    fn render_item(self, item: &impl Serialize, human: &str, id: &str) -> Result<String> {
        match self.structured(item)? {
            Some(text) => Ok(text),
            None if self.quiet && id.is_empty() => Ok(String::new()),
            None if self.quiet => Ok(format!("{id}\n")),
            None => Ok(format!("{}\n", human.trim_end_matches('\n'))),
        }
    }

    fn structured(self, value: &impl Serialize) -> Result<Option<String>> {
        let text = match self.format {
            Format::Table => return Ok(None),
            Format::Json => serde_json::to_string_pretty(value).map(|text| text + "\n"),
            Format::Yaml => serde_json::to_value(value).map(|value| yaml::document(&value)),
        };
        text.map(Some).map_err(|e| Failure::Answer(e.to_string()))
    }
}

/// Columns as wide as their widest cell, two spaces between them, nothing after the last cell of a line. That one may
/// be as long as it likes: it widens no column.
pub(crate) fn table(columns: &[&str], lines: impl Iterator<Item = Vec<String>>) -> String {
    let head = columns.iter().map(ToString::to_string).collect();
    let body = lines.map(|cells| cells.iter().map(|c| printable(c)).collect());
    let all: Vec<Vec<String>> = std::iter::once(head).chain(body).collect();
    let inner =
        |line: &Vec<String>, column: usize| if column + 1 < line.len() { line[column].chars().count() } else { 0 };
    let width = |column: usize| all.iter().map(|line| inner(line, column)).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut out = String::new();
    for line in &all {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// Writes to standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a list looks like in all forms.
    pub(crate) fn every_form<R: Row>(rows: &[R]) -> String {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let render = |format, quiet| Output { format, quiet }.render_list(rows, now).unwrap();
        let table = render(Format::Table, false);
        format!("{table}---\n{}---\n{}", render(Format::Table, true), render(Format::Json, false))
    }

    #[test]
    fn cells_of_strangers_cannot_move_the_cursor() {
        let lines = vec![vec!["a\x1b[2Jb".to_owned(), "x\ny".to_owned()]];
        assert_eq!(table(&["A", "LONG"], lines.into_iter()), "A       LONG\na?[2Jb  x; y\n");
    }

    #[test]
    fn one_result_in_every_form() {
        let item = serde_json::json!({"id": "sha256:ab"});
        let render = |format, quiet| Output { format, quiet }.render_item(&item, "pulled ab", "sha256:ab").unwrap();
        assert_eq!(render(Format::Table, false), "pulled ab\n");
        assert_eq!(render(Format::Table, true), "sha256:ab\n");
        assert_eq!(render(Format::Json, true), "{\n  \"id\": \"sha256:ab\"\n}\n");
        assert_eq!(render(Format::Yaml, false), "id: \"sha256:ab\"\n");
    }
}
