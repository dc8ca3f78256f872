//! Protobuf's wire format, in the one form in which CRIU writes it.
//!
//! A decoder of protobuf may accept a field twice, numbers longer than need be, and fields it does not know; two decoders
//! that differ in it read different things out of the same bytes. So all of that is an error here.

use crate::error::{Error, Fault, Result};
use crate::limits;
use crate::schema::{Field, Kind, Label, Message};

/// What a field holds on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// Every number, as it is written.
    Number(u64),
    /// Text, bytes or a message.
    Bytes(&'a [u8]),
}

/// The fields of a message in the order in which they come.
pub(crate) struct Fields<'a> {
    message: &'static Message,
    rest: &'a [u8],
    /// Which of the message's fields have come, as bits.
    seen: u64,
}

pub(crate) fn fields<'a>(message: &'static Message, bytes: &'a [u8]) -> Fields<'a> {
    // No message of CRIU has as many fields; a table that grows beyond would fail in the tests.
    debug_assert!(message.fields.len() <= 64, "{}", message.name);
    Fields { message, rest: bytes, seen: 0 }
}

impl<'a> Fields<'a> {
    /// The next field; none at the end, where all that are required must have come.
    pub(crate) fn next(&mut self) -> Result<Option<(&'static Field, Value<'a>)>> {
        if self.rest.is_empty() {
            return self.complete().map(|()| None);
        }
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).unwrap_or(u32::MAX);
        let Some((at, field)) = self.message.field(number) else {
            let why = format!("{} has a field {number}, which CRIU 4.2.1 does not know", self.message.name);
            return Err(Error::new(Fault::UnknownField, why));
        };
        let bit = 1u64.checked_shl(u32::try_from(at).unwrap_or(u32::MAX)).unwrap_or_default();
        if self.seen & bit != 0 && field.label != Label::Repeated {
            return Err(self.malformed(field, "comes twice"));
        }
        self.seen |= bit;
        let value = self.value(field, tag & 7)?;
        check(field, value).map_err(|why| self.malformed(field, &why))?;
        Ok(Some((field, value)))
    }

    fn value(&mut self, field: &'static Field, wire_type: u64) -> Result<Value<'a>> {
        match (field.kind, wire_type) {
            (Kind::Text | Kind::Bytes | Kind::Message(_), 2) => {
                let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
                self.take(length).map(Value::Bytes)
            }
            (Kind::Fixed64, 1) => {
                let bytes = self.take(8)?;
                Ok(Value::Number(u64::from_le_bytes(bytes.try_into().unwrap_or_default())))
            }
            (Kind::Text | Kind::Bytes | Kind::Message(_) | Kind::Fixed64, _) => {
                Err(self.malformed(field, &format!("has the wire type {wire_type}")))
            }
            (_, 0) => self.varint().map(Value::Number),
            _ => Err(self.malformed(field, &format!("has the wire type {wire_type}"))),
        }
    }

    fn complete(&self) -> Result<()> {
        let required = |(at, field): &(usize, &Field)| field.label == Label::Required && self.seen & (1 << at) == 0;
        match self.message.fields.iter().enumerate().find(required) {
            Some((_, field)) => Err(self.malformed(field, "is missing")),
            None => Ok(()),
        }
    }

    fn malformed(&self, field: &Field, why: &str) -> Error {
        Error::new(Fault::Malformed, format!("{}.{} {why}", self.message.name, field.name))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or_else(|| {
            Error::new(Fault::Malformed, format!("a field is longer than its message, {}", self.message.name))
        })?;
        self.rest = rest;
        Ok(bytes)
    }

    fn varint(&mut self) -> Result<u64> {
        let bad = |why: &str| Error::new(Fault::Malformed, format!("a number in {} {why}", self.message.name));
        let mut value = 0u64;
        for (at, byte) in self.rest.iter().enumerate().take(10) {
            let part = u64::from(byte & 0x7f);
            if at == 9 && part > 1 {
                return Err(bad("is larger than 64 bits"));
            }
            value |= part << (7 * at);
            if byte & 0x80 == 0 {
                if part == 0 && at > 0 {
                    return Err(bad("is written too long"));
                }
                self.rest = &self.rest[at + 1..];
                return Ok(value);
            }
        }
        Err(bad("does not end"))
    }
}

/// Whether the value is one of the field's type.
fn check(field: &Field, value: Value<'_>) -> std::result::Result<(), String> {
    match (field.kind, value) {
        (Kind::Uint32 | Kind::Sint32, Value::Number(number)) if number > u32::MAX.into() => {
            Err(format!("is {number}, more than 32 bits"))
        }
        (Kind::Int32, Value::Number(number)) if i32::try_from(number.cast_signed()).is_err() => {
            Err(format!("is {number:#x}, more than 32 bits"))
        }
        (Kind::Bool, Value::Number(number)) if number > 1 => Err(format!("is {number}, neither false nor true")),
        (Kind::Enum(values), Value::Number(number)) if word(values, number).is_none() => {
            Err(format!("is {number}, which CRIU 4.2.1 does not know"))
        }
        (Kind::Text, Value::Bytes(bytes)) if bytes.contains(&0) => Err("has a NUL in it".to_owned()),
        (Kind::Text, Value::Bytes(bytes)) if std::str::from_utf8(bytes).is_err() => Err("is no UTF-8".to_owned()),
        _ => Ok(()),
    }
}

/// The name of an enumeration's value.
pub(crate) fn word(values: &'static [(i32, &'static str)], number: u64) -> Option<&'static str> {
    let number = i32::try_from(number.cast_signed()).ok()?;
    values.iter().find(|(value, _)| *value == number).map(|(_, name)| *name)
}

/// Checks a message and those within it. Afterwards a lenient decoder cannot go wrong, and what it allocates is bounded.
pub(crate) fn check_message(message: &'static Message, bytes: &[u8]) -> Result<()> {
    check_at(message, bytes, 0, &mut 0)
}

fn check_at(message: &'static Message, bytes: &[u8], depth: usize, count: &mut usize) -> Result<()> {
    *count += 1;
    if *count > limits::MESSAGES_MAX {
        let why = format!("an entry has more than {} messages in it", limits::MESSAGES_MAX);
        return Err(Error::new(Fault::TooLarge, why));
    }
    if depth > limits::DEPTH_MAX {
        return Err(Error::new(Fault::TooLarge, format!("{} nests deeper than {}", message.name, limits::DEPTH_MAX)));
    }
    let mut fields = fields(message, bytes);
    while let Some((field, value)) = fields.next()? {
        if let (Kind::Message(inner), Value::Bytes(bytes)) = (field.kind, value) {
            check_at(inner, bytes, depth + 1, count)?;
        }
    }
    Ok(())
}
