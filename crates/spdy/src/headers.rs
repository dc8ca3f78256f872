//! Header blocks: names and values, compressed by one zlib stream a direction with a preset dictionary.

use std::sync::LazyLock;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::error::Error;

/// Most bytes of one header block after inflation. zlib makes a thousand bytes of one, so a limit of the frame alone would
/// let a peer fill memory. What streams are opened with here has less than a hundred bytes.
pub(crate) const INFLATED_MAX: usize = 16 * 1024;

/// Most pairs of one header block.
const PAIRS_MAX: usize = 128;

/// Adler-32 of the dictionary, by which zlib names it.
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

/// How an unfinished block grows.
const STEP: usize = 1024;

/// The beginning of SPDY/3's dictionary: names and values, each behind its length.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";

/// Its end: text without lengths.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 \
    Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not \
    Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov \
    Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
    application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8\
    charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::new();
    for word in WORDS.split(' ') {
        push(&mut dictionary, word.replace('_', " ").as_bytes());
    }
    dictionary.extend_from_slice(TEXT.as_bytes());
    dictionary
});

/// Names and values that a stream is opened with, in their order. Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a name in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All pairs.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn parse(block: &[u8]) -> Result<Headers, Error> {
        let mut rest = block;
        let count = take_length(&mut rest)?;
        if count > PAIRS_MAX {
            return Err(Error::Protocol("too many headers"));
        }
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let name = take_text(&mut rest)?.to_ascii_lowercase();
            // A zero byte separates several values of one name.
            let values = take_text(&mut rest)?;
            pairs.extend(values.split('\0').map(|value| (name.clone(), value.to_owned())));
        }
        Ok(Headers(pairs))
    }

    fn encode(&self) -> Vec<u8> {
        let mut block = (self.0.len() as u32).to_be_bytes().to_vec();
        for (name, value) in &self.0 {
            push(&mut block, name.as_bytes());
            push(&mut block, value.as_bytes());
        }
        block
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Headers(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

fn push(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text);
}

const CUT: Error = Error::Protocol("a header block that is cut short");

fn take_length(rest: &mut &[u8]) -> Result<usize, Error> {
    let (length, after) = rest.split_first_chunk::<4>().ok_or(CUT)?;
    *rest = after;
    Ok(u32::from_be_bytes(*length) as usize)
}

fn take_text(rest: &mut &[u8]) -> Result<String, Error> {
    let length = take_length(rest)?;
    let (text, after) = rest.split_at_checked(length).ok_or(CUT)?;
    *rest = after;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The peer's header blocks. All of a connection must go through it, in order: each builds on those before.
pub(crate) struct Inflater(Decompress);

impl Inflater {
    pub(crate) fn new() -> Inflater {
        Inflater(Decompress::new(true))
    }

    pub(crate) fn headers(&mut self, block: &[u8]) -> Result<Headers, Error> {
        Headers::parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, Error> {
        const BROKEN: Error = Error::Protocol("a header block that does not inflate");
        let mut out = Vec::new();
        loop {
            if out.capacity() - out.len() < STEP {
                // Not doubled: a bomb is noticed at the limit.
                out.reserve_exact(STEP);
            }
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let inflated = self.0.decompress_vec(block, &mut out, FlushDecompress::Sync);
            block = &block[(self.0.total_in() - before_in) as usize..];
            match inflated {
                Err(error) if error.needs_dictionary() == Some(DICTIONARY_ID) => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| BROKEN)?;
                    continue;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(BROKEN),
                Ok(_) => {}
            }
            if out.len() > INFLATED_MAX {
                return Err(Error::HeadersTooLarge(INFLATED_MAX));
            }
            let still = self.0.total_out() == before_out;
            if block.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
            if still && out.len() < out.capacity() {
                // It neither eats nor gives: what is left is no zlib stream.
                return Err(BROKEN);
            }
        }
    }
}

/// Our header blocks.
pub(crate) struct Deflater(Compress);

impl Deflater {
    pub(crate) fn new() -> Deflater {
        let mut compress = Compress::new(Compression::fast(), true);
        // A fresh stream takes a dictionary.
        let _ = compress.set_dictionary(&DICTIONARY);
        Deflater(compress)
    }

    pub(crate) fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let plain = headers.encode();
        let mut rest = plain.as_slice();
        let mut out = Vec::with_capacity(STEP);
        loop {
            let before = self.0.total_in();
            // Compressing fails only on a misuse of its state.
            let _ = self.0.compress_vec(rest, &mut out, FlushCompress::Sync);
            rest = &rest[(self.0.total_in() - before) as usize..];
            if rest.is_empty() && out.len() < out.capacity() {
                return out;
            }
            out.reserve(STEP);
        }
    }
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inflater")
    }
}

impl std::fmt::Debug for Deflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Deflater")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_the_one_of_the_protocol() {
        let mut compress = Compress::new(Compression::fast(), true);
        assert_eq!(DICTIONARY.len(), 1423);
        assert_eq!(compress.set_dictionary(&DICTIONARY).unwrap(), DICTIONARY_ID);
    }

    #[test]
    fn blocks_build_on_those_before() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        for round in 0..200 {
            let headers: Headers = [("streamtype", "stdin"), ("port", &round.to_string())].into_iter().collect();
            let block = deflater.block(&headers);
            assert_eq!(inflater.headers(&block).unwrap(), headers);
        }
    }

    #[test]
    fn several_values_of_a_name_are_pairs_each() {
        let headers: Headers = [("Accept", "a\0b")].into_iter().collect();
        let block = Deflater::new().block(&headers);
        let read = Inflater::new().headers(&block).unwrap();
        assert_eq!(read.iter().collect::<Vec<_>>(), [("accept", "a"), ("accept", "b")]);
    }

    #[test]
    fn a_small_block_that_inflates_to_much_is_refused() {
        let bomb: Headers = [("a", "x".repeat(64 << 20))].into_iter().collect();
        let block = Deflater::new().block(&bomb);
        assert!(block.len() < 1 << 20, "{}", block.len());
        let mut inflater = Inflater::new();
        assert!(matches!(inflater.headers(&block), Err(Error::HeadersTooLarge(INFLATED_MAX))));
        assert!(inflater.0.total_out() < 2 * INFLATED_MAX as u64, "it went on inflating");
    }

    #[test]
    fn a_block_of_headers_just_below_the_limit_passes() {
        let headers: Headers = [("a", "x".repeat(INFLATED_MAX - 100))].into_iter().collect();
        assert_eq!(Inflater::new().headers(&Deflater::new().block(&headers)).unwrap(), headers);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_inflater_panic(blocks in proptest::collection::vec(any::<Vec<u8>>(), 1..4)) {
            let mut inflater = Inflater::new();
            for block in blocks {
                let _ = inflater.headers(&block);
            }
        }

        #[test]
        fn a_damaged_block_is_refused_or_read(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let headers: Headers = (0..20).map(|n| (format!("name-{n}"), format!("value-{n}"))).collect();
            let mut block = Deflater::new().block(&headers);
            let at = at.index(block.len());
            block[at] = byte;
            block.truncate(cut.index(block.len()) + 1);
            let _ = Inflater::new().headers(&block);
        }

        #[test]
        fn no_inflated_bytes_make_the_parser_panic(block: Vec<u8>) {
            let _ = Headers::parse(&block);
        }
    }
}
