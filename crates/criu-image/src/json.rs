//! An image as JSON, as `crit decode` tells it, byte for byte.

use std::io::{self, Read, Write};

use crate::error::{Error, Fault, Result};
use crate::image::{Entry, Extra, ImageReader};
use crate::pretty;
use crate::schema::{Field, IPC_MSG, Kind, Label, Message, Shown};
use crate::wire::{Value, fields, word};

/// How it is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// On one line, numbers as numbers: `crit decode`.
    Plain,
    /// Indented, with addresses, flags and words: `crit decode --pretty`.
    Pretty,
}

/// Writes the image that `input` is, and ends with a line feed.
///
/// # Errors
/// As [`ImageReader`]; and if nothing can be written, as [`Fault::Unreadable`]. What was written until then stays.
pub fn write_json(input: impl Read, style: Style, output: &mut impl Write) -> Result<()> {
    let mut reader = ImageReader::new(input)?;
    let mut json = Json { output, style, depth: 0, first: true, failed: None };
    json.open('{');
    json.key("magic");
    json.text(reader.kind().name());
    json.key("entries");
    json.open('[');
    while let Some(entry) = reader.next_entry(true)? {
        json.item();
        json.entry(&entry)?;
        json.check()?;
    }
    json.close(']');
    json.close('}');
    json.raw("\n");
    json.check()
}

struct Json<'a, W> {
    output: &'a mut W,
    style: Style,
    depth: usize,
    /// Nothing has been written yet into what was opened last.
    first: bool,
    failed: Option<io::Error>,
}

impl<W: Write> Json<'_, W> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.open('{');
        self.members(entry.message, &entry.bytes, false)?;
        match &entry.extra {
            Extra::None | Extra::Data(_, None) | Extra::Stream(_, None) => {}
            Extra::Data(_, Some(data)) => {
                self.key("extra");
                self.text(&pretty::base64(data));
            }
            Extra::Stream(_, Some([incoming, outgoing])) => {
                self.key("extra");
                self.open('{');
                self.key("inq");
                self.text(&pretty::base64(incoming));
                self.key("outq");
                self.text(&pretty::base64(outgoing));
                self.close('}');
            }
            Extra::Semaphores(values) => {
                self.key("extra");
                self.open('[');
                for value in values {
                    self.item();
                    self.raw(&value.to_string());
                }
                self.close(']');
            }
            Extra::Messages(held) => {
                self.key("extra");
                self.open('[');
                for (header, text) in held {
                    self.item();
                    self.open('{');
                    // Its fields have no options of crit's, so both styles tell them alike.
                    self.members(&IPC_MSG, header, false)?;
                    self.close('}');
                    self.item();
                    self.text(&pretty::base64(text));
                }
                self.close(']');
            }
        }
        self.close('}');
        Ok(())
    }

    /// The fields of a message, in the order of their numbers.
    fn members(&mut self, message: &'static Message, bytes: &[u8], hex: bool) -> Result<()> {
        let mut values: Vec<(&'static Field, Value<'_>)> = Vec::new();
        let mut read = fields(message, bytes);
        while let Some(field) = read.next()? {
            values.push(field);
        }
        values.sort_by_key(|(field, _)| field.number);
        for group in values.chunk_by(|(one, _), (other, _)| one.number == other.number) {
            let field = group[0].0;
            self.key(field.name);
            if field.label != Label::Repeated {
                self.value(field, group[0].1, hex)?;
                continue;
            }
            self.open('[');
            if self.style == Style::Pretty && field.shown == Shown::Address {
                self.item();
                self.address(group);
            } else {
                for (field, value) in group {
                    self.item();
                    self.value(field, *value, hex)?;
                }
            }
            self.close(']');
        }
        Ok(())
    }

    fn value(&mut self, field: &'static Field, value: Value<'_>, hex: bool) -> Result<()> {
        let hex = hex || field.shown == Shown::Hex;
        match (field.kind, value) {
            (Kind::Message(message), Value::Bytes(bytes)) => {
                self.open('{');
                self.members(message, bytes, hex)?;
                self.close('}');
            }
            (Kind::Bytes, Value::Bytes(bytes)) if field.shown == Shown::UnixName => {
                self.text(&pretty::quoted_printable(bytes));
            }
            (Kind::Bytes, Value::Bytes(bytes)) => self.text(&pretty::base64(bytes)),
            (Kind::Text, Value::Bytes(bytes)) => self.text(&String::from_utf8_lossy(bytes)),
            (Kind::Enum(values), Value::Number(number)) => self.text(word(values, number).unwrap_or_default()),
            (Kind::Bool, Value::Number(number)) => self.raw(if number == 0 { "false" } else { "true" }),
            (kind, Value::Number(number)) => self.number(field, signed(kind, number), hex),
            _ => return Err(Error::new(Fault::Malformed, format!("{} has the wrong form", field.name))),
        }
        Ok(())
    }

    fn number(&mut self, field: &Field, number: i128, hex: bool) {
        let shown = match self.style {
            Style::Plain => None,
            Style::Pretty => pretty::number(field, number, hex),
        };
        match shown {
            Some(text) => self.text(&text),
            None => self.raw(&number.to_string()),
        }
    }

    fn address(&mut self, words: &[(&'static Field, Value<'_>)]) {
        let words: Vec<u32> = words
            .iter()
            .filter_map(|(_, value)| match value {
                Value::Number(number) => u32::try_from(*number).ok(),
                Value::Bytes(_) => None,
            })
            .collect();
        self.text(&pretty::address(&words));
    }

    fn open(&mut self, bracket: char) {
        self.raw(bracket.encode_utf8(&mut [0; 4]));
        self.depth += 1;
        self.first = true;
    }

    fn close(&mut self, bracket: char) {
        self.depth -= 1;
        if !self.first {
            self.line();
        }
        self.raw(bracket.encode_utf8(&mut [0; 4]));
        self.first = false;
    }

    fn item(&mut self) {
        if !self.first {
            self.raw(if self.style == Style::Pretty { "," } else { ", " });
        }
        self.first = false;
        self.line();
    }

    fn key(&mut self, name: &str) {
        self.item();
        self.text(name);
        self.raw(": ");
    }

    fn line(&mut self) {
        if self.style == Style::Pretty {
            self.raw("\n");
            for _ in 0..self.depth {
                self.raw("    ");
            }
        }
    }

    /// Text as Python's json writes it: in ASCII.
    fn text(&mut self, text: &str) {
        let mut escaped = String::with_capacity(text.len() + 2);
        escaped.push('"');
        for c in text.chars() {
            match c {
                '"' => escaped.push_str("\\\""),
                '\\' => escaped.push_str("\\\\"),
                '\n' => escaped.push_str("\\n"),
                '\r' => escaped.push_str("\\r"),
                '\t' => escaped.push_str("\\t"),
                '\u{8}' => escaped.push_str("\\b"),
                '\u{c}' => escaped.push_str("\\f"),
                ' '..='~' => escaped.push(c),
                other => {
                    for unit in other.encode_utf16(&mut [0; 2]) {
                        escaped.push_str(&format!("\\u{unit:04x}"));
                    }
                }
            }
        }
        escaped.push('"');
        self.raw(&escaped);
    }

    fn raw(&mut self, text: &str) {
        if self.failed.is_none() {
            self.failed = self.output.write_all(text.as_bytes()).err();
        }
    }

    fn check(&mut self) -> Result<()> {
        match self.failed.take() {
            Some(error) => Err(Error::new(Fault::Unreadable, format!("the JSON cannot be written: {error}"))),
            None => Ok(()),
        }
    }
}

/// The number that a field of this type means.
fn signed(kind: Kind, number: u64) -> i128 {
    match kind {
        Kind::Int32 | Kind::Int64 => number.cast_signed().into(),
        Kind::Sint32 | Kind::Sint64 => ((number >> 1).cast_signed() ^ -((number & 1).cast_signed())).into(),
        _ => number.into(),
    }
}
