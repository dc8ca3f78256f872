//! CRIU's messages as tables, generated from its protos.

/// A message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) name: &'static str,
    /// In ascending order of their numbers.
    pub(crate) fields: &'static [Field],
}

/// A field of a message.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) label: Label,
    pub(crate) shown: Shown,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Uint32,
    Uint64,
    Int32,
    Int64,
    Sint32,
    Sint64,
    Fixed64,
    Bool,
    Text,
    Bytes,
    Enum(&'static [(i32, &'static str)]),
    Message(&'static Message),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Label {
    Required,
    Optional,
    Repeated,
}

/// How `crit --pretty` shows a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Plain,
    Hex,
    Address,
    Device,
    OldDevice,
    Flags(&'static str),
    Word(&'static str),
    UnixName,
}

impl Message {
    pub(crate) fn field(&self, number: u32) -> Option<(usize, &'static Field)> {
        let at = self.fields.binary_search_by_key(&number, |field| field.number).ok()?;
        Some((at, &self.fields[at]))
    }
}

#[allow(dead_code, reason = "some messages of CRIU's protos are in no image")]
mod tables {
    use super::{Field, Kind, Label, Message, Shown};
    include!(concat!(env!("OUT_DIR"), "/schema.rs"));
}
pub(crate) use tables::*;
