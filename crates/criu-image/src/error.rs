//! What can be wrong with images.

use std::{fmt, io};

/// What is wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The file could not be read.
    Unreadable,
    /// The file ends in the middle.
    Truncated,
    /// The name or the magic is of no image that CRIU 4.2.1 knows.
    UnknownImage,
    /// An image is of another type than its name says.
    WrongType,
    /// A message is not what its type demands.
    Malformed,
    /// A message has a field that CRIU 4.2.1 does not know: it was made by a later CRIU, or tampered with.
    UnknownField,
    /// Something is larger than is accepted.
    TooLarge,
    /// Something is referred to that is not there.
    Dangling,
    /// Two things contradict each other.
    Inconsistent,
    /// Something is there twice.
    Duplicate,
    /// Memory lies where it cannot be.
    Memory,
}

impl Fault {
    /// The stable name of the fault.
    pub fn code(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Truncated => "truncated",
            Self::UnknownImage => "unknown_image",
            Self::WrongType => "wrong_type",
            Self::Malformed => "malformed",
            Self::UnknownField => "unknown_field",
            Self::TooLarge => "too_large",
            Self::Dangling => "dangling",
            Self::Inconsistent => "inconsistent",
            Self::Duplicate => "duplicate",
            Self::Memory => "memory",
        }
    }
}

/// What is wrong with which image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file's name; empty where one file is read by itself.
    pub file: String,
    /// For programs.
    pub fault: Fault,
    /// For people.
    pub why: String,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(fault: Fault, why: impl Into<String>) -> Self {
        Self { file: String::new(), fault, why: why.into() }
    }

    pub(crate) fn of(file: impl Into<String>, fault: Fault, why: impl Into<String>) -> Self {
        Self { file: file.into(), fault, why: why.into() }
    }

    /// Names the file, unless it is named already.
    pub(crate) fn in_file(mut self, file: &str) -> Self {
        if self.file.is_empty() {
            file.clone_into(&mut self.file);
        }
        self
    }

    pub(crate) fn reading(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::new(Fault::Truncated, "it ends in the middle"),
            _ => Self::new(Fault::Unreadable, error.to_string()),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.file.as_str() {
            "" => write!(f, "the image is refused: {}", self.why),
            file => write!(f, "{file}: {}", self.why),
        }
    }
}

impl std::error::Error for Error {}
