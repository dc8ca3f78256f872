//! The bytes behind gzip, zstd or nothing, told apart by how they begin. Media types are no help: archives of Docker call
//! every layer a tar. Bounds how much may come out of how little, so that a bomb ends early.

use crate::error::{Error, Result};
use crate::limits::{RATIO_FREE_BYTES, RATIO_MAX, ZSTD_WINDOW_LOG_MAX};
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

/// Bytes read from the source at once.
const BUFFER_BYTES: usize = 256 << 10;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The uncompressed bytes of `source`, whose compression is told by its beginning. A bomb ends with an error.
pub fn decompress<'a>(source: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let read = Rc::new(Cell::new(0));
    let mut source = BufReader::with_capacity(BUFFER_BYTES, Counted { inner: source, read: read.clone() });
    let beginning = source.fill_buf().map_err(|source| Error::Read { source })?;
    let inner: Box<dyn Read + 'a> = if beginning.starts_with(&GZIP_MAGIC) {
        Box::new(flate2::bufread::MultiGzDecoder::new(source))
    } else if beginning.starts_with(&ZSTD_MAGIC) {
        let mut decoder = zstd::Decoder::with_buffer(source).map_err(|source| Error::Read { source })?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|source| Error::Read { source })?;
        Box::new(decoder)
    } else {
        return Ok(Box::new(source));
    };
    Ok(Box::new(Bounded { inner, read, unpacked: 0 }))
}

/// Counts the compressed bytes.
struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.read.set(self.read.get() + length as u64);
        Ok(length)
    }
}

/// Ends with an error when too much comes out of too little.
struct Bounded<'a> {
    inner: Box<dyn Read + 'a>,
    read: Rc<Cell<u64>>,
    unpacked: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.unpacked += length as u64;
        if self.unpacked > RATIO_FREE_BYTES && self.unpacked / RATIO_MAX > self.read.get() {
            let message = format!("it unpacks to more than {RATIO_MAX} times its size, which no honest layer does");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn check(source: &[u8], expected: &[u8]) {
        let mut plain = Vec::new();
        decompress(source).unwrap().read_to_end(&mut plain).unwrap();
        assert_eq!(plain, expected);
    }

    #[test]
    fn formats_are_told_by_their_beginning() {
        check(b"plain", b"plain");
        check(b"", b"");
        check(&[gzip(b"one "), gzip(b"two")].concat(), b"one two");
        check(&zstd::encode_all(&b"zst"[..], 1).unwrap(), b"zst");
    }

    fn check_bomb(bomb: &[u8]) {
        let mut plain = decompress(bomb).unwrap();
        let error = io::copy(&mut plain, &mut io::sink()).expect_err("a bomb was unpacked");
        assert!(error.to_string().contains("1032 times"), "{error}");
    }

    #[test]
    fn a_bomb_ends_early() {
        let zeros = || io::repeat(0).take(RATIO_FREE_BYTES + (32 << 20));
        check_bomb(&zstd::encode_all(zeros(), 1).unwrap());
    }

    #[test]
    fn a_layer_of_zeros_is_no_bomb() {
        let length = RATIO_FREE_BYTES + (32 << 20);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        io::copy(&mut io::repeat(0).take(length), &mut encoder).unwrap();
        let layer = encoder.finish().unwrap();
        assert_eq!(io::copy(&mut decompress(layer.as_slice()).unwrap(), &mut io::sink()).unwrap(), length);
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let whole = gzip(&[7; 100_000]);
        let error = decompress(&whole[..whole.len() - 5]).unwrap().read_to_end(&mut Vec::new());
        assert!(error.is_err());
    }
}
