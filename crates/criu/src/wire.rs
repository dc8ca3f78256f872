//! The small part of protobuf's wire format that CRIU's images use: varints and nested messages. Knows no message.

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 2: a string, bytes, a nested message or packed numbers.
    Bytes(&'a [u8]),
    /// Wire types 1 and 5, of which no caller needs the content.
    Fixed,
}

/// The fields of a message in the order in which they come: `(number, value)`. Ends after the first malformed field,
/// which comes as `Err`.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

pub(crate) fn fields(message: &[u8]) -> Fields<'_> {
    Fields { rest: message }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Value<'a>), String> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.bytes(8).map(|_| Value::Fixed)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.bytes(usize::try_from(length).map_err(|_| "a length is too large".to_owned())?)?)
            }
            5 => self.bytes(4).map(|_| Value::Fixed)?,
            other => return Err(format!("wire type {other} does not exist")),
        };
        Ok((tag >> 3, value))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let (value, length) = varint(self.rest)?;
        self.rest = &self.rest[length..];
        Ok(value)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or("a field is longer than its message")?;
        self.rest = rest;
        Ok(bytes)
    }
}

/// Value and length in bytes of the varint that `bytes` begins with.
fn varint(bytes: &[u8]) -> Result<(u64, usize), String> {
    let mut value = 0u64;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        let part = u64::from(byte & 0x7f);
        if at == 9 && part > 1 {
            return Err("a varint is larger than 64 bits".to_owned());
        }
        value |= part << (7 * at);
        if byte & 0x80 == 0 {
            return Ok((value, at + 1));
        }
    }
    Err("a varint does not end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_each_wire_type() {
        let message = [0x08, 0x96, 0x01, 0x12, 0x02, b'h', b'i', 0x1d, 1, 2, 3, 4, 0x21, 1, 2, 3, 4, 5, 6, 7, 8];
        let read: Result<Vec<_>, _> = fields(&message).collect();
        let expected = vec![(1, Value::Varint(150)), (2, Value::Bytes(b"hi")), (3, Value::Fixed), (4, Value::Fixed)];
        assert_eq!(read.unwrap(), expected);
    }

    #[test]
    fn malformed_messages_end_in_an_error() {
        let overlong = [0xff; 11];
        for message in [&[0x08][..], &[0x0b], &[0x12, 5, 1], &overlong] {
            assert!(fields(message).any(|field| field.is_err()), "{message:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic_and_the_reader_ends(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(fields(&bytes).count() <= bytes.len());
        }
    }
}
