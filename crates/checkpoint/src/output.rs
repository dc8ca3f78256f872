//! Where an archive's bytes go: past the page cache, and on their way compressed and hashed if that is asked for.

use std::fs::File;
use std::io::{self, Write};

use lz4_flex::frame::{BlockSize, FrameEncoder, FrameInfo};
use sha2::{Digest, Sha256};

use crate::direct::DirectWriter;
use crate::image::sha256_name;
use crate::limits;

/// What a skippable frame of zstd begins with (RFC 8878, 3.1.2); four bytes of length follow.
const SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

/// In which form an archive is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// How to compress it; none to leave it plain, which every reader takes.
    pub codec: Option<Codec>,
    /// Find the digests that an image needs.
    pub digest: bool,
}

/// How to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// By zstd.
    Zstd {
        /// zstd's own level.
        level: i32,
        /// Threads beside the one that writes.
        threads: u32,
    },
    /// By lz4, in its frames. Images have no media type for it.
    Lz4,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Size of the file.
    pub bytes: u64,
    /// `sha256:…` of the file, if digests were asked for.
    pub digest: Option<String>,
    /// The same of the archive before its compression.
    pub diff_id: Option<String>,
}

/// The file, and what is done with the bytes before.
pub(crate) enum Output {
    Plain(Hashed),
    Compressed { encoder: Encoder, plain: Option<Sha256> },
}

pub(crate) enum Encoder {
    Zstd(Box<zstd::Encoder<'static, Hashed>>),
    Lz4(Box<FrameEncoder<Hashed>>),
}

impl Encoder {
    fn out(&mut self) -> &mut dyn Write {
        match self {
            Self::Zstd(encoder) => encoder,
            Self::Lz4(encoder) => encoder,
        }
    }

    fn finish(self) -> io::Result<Hashed> {
        match self {
            Self::Zstd(encoder) => encoder.finish(),
            Self::Lz4(encoder) => Ok(encoder.finish()?),
        }
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Compressed { .. } => "Compressed",
        })
    }
}

impl Output {
    /// Writes into `file`, which is empty; `expected` bytes are reserved, if they go there as they are. No more than that may
    /// come, or a reader may refuse a compressed archive.
    pub(crate) fn new(file: File, expected: u64, form: Form) -> io::Result<Self> {
        let hash = || form.digest.then(Sha256::new);
        let reserved = if form.codec.is_some() { 0 } else { expected };
        let mut file = Hashed { file: DirectWriter::new(file, reserved)?, hash: hash() };
        let encoder = match form.codec {
            None => return Ok(Self::Plain(file)),
            Some(Codec::Zstd { level, threads }) => {
                file.write_all(&room_for(expected)?)?;
                let mut encoder = zstd::Encoder::new(file, level)?;
                encoder.multithread(threads)?;
                Encoder::Zstd(Box::new(encoder))
            }
            // It shrinks nothing to less than a 255th.
            Some(Codec::Lz4) => {
                let blocks = FrameInfo::new().block_size(BlockSize::Max1MB);
                Encoder::Lz4(Box::new(FrameEncoder::with_frame_info(blocks, file)))
            }
        };
        Ok(Self::Compressed { encoder, plain: hash() })
    }

    /// Where in the file the next byte goes; none where that means nothing.
    pub(crate) fn position(&self) -> Option<u64> {
        match self {
            Self::Plain(file) => Some(file.file.position()),
            Self::Compressed { .. } => None,
        }
    }

    /// Makes everything durable.
    pub(crate) fn finish(self) -> io::Result<Written> {
        match self {
            Self::Plain(file) => {
                let (bytes, digest) = file.finish()?;
                Ok(Written { bytes, diff_id: digest.clone(), digest })
            }
            Self::Compressed { encoder, plain } => {
                let (bytes, digest) = encoder.finish()?.finish()?;
                Ok(Written { bytes, digest, diff_id: plain.map(|hash| sha256_name(&hash.finalize())) })
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.write(bytes),
            Self::Compressed { encoder, plain } => {
                let written = encoder.out().write(bytes)?;
                if let Some(hash) = plain {
                    hash.update(&bytes[..written]);
                }
                Ok(written)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a compressed archive begins with, so that memory full of zeros does not make a bomb of it: readers refuse a file that
/// grows beyond reason. It is an empty frame, by whose first bytes the file is known, and one that decoders skip.
fn room_for(expected: u64) -> io::Result<Vec<u8>> {
    if expected < limits::RATIO_FREE {
        return Ok(Vec::new());
    }
    let length = u32::try_from(expected / limits::RATIO_MAX + 1).map_err(io::Error::other)?;
    let mut frames = zstd::encode_all(io::empty(), 0)?;
    frames.extend(SKIPPABLE_MAGIC.to_le_bytes());
    frames.extend(length.to_le_bytes());
    frames.resize(frames.len() + length as usize, 0);
    Ok(frames)
}

/// A file and the hash of what is in it.
pub(crate) struct Hashed {
    file: DirectWriter,
    hash: Option<Sha256>,
}

impl Hashed {
    fn finish(self) -> io::Result<(u64, Option<String>)> {
        let bytes = self.file.position();
        self.file.finish()?;
        Ok((bytes, self.hash.map(|hash| sha256_name(&hash.finalize()))))
    }
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        if let Some(hash) = &mut self.hash {
            hash.update(&bytes[..written]);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use lz4_flex::frame::FrameDecoder;

    use super::*;

    fn check(form: Form) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..9_000_001u32).map(|at| (at / 900) as u8).collect();
        let mut output = Output::new(File::create(&path).unwrap(), 0, form).unwrap();
        content.chunks(1_234_567).for_each(|chunk| output.write_all(chunk).unwrap());
        let written = output.finish().unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!(written.bytes, file.len() as u64);
        let digest_of = |bytes: &[u8]| form.digest.then(|| sha256_name(&Sha256::digest(bytes)));
        assert_eq!((written.digest, written.diff_id), (digest_of(&file), digest_of(&content)));
        let mut read = Vec::new();
        match form.codec {
            Some(Codec::Zstd { .. }) => {
                zstd::Decoder::new(&file[..]).unwrap().read_to_end(&mut read).map(drop).unwrap();
            }
            Some(Codec::Lz4) => FrameDecoder::new(&file[..]).read_to_end(&mut read).map(drop).unwrap(),
            None => read = file,
        }
        assert!(read == content);
    }

    #[test]
    fn what_is_written_is_compressed_and_hashed_as_asked() {
        check(Form::default());
        check(Form { codec: None, digest: true });
        check(Form { codec: Some(Codec::Zstd { level: 1, threads: 0 }), digest: false });
        check(Form { codec: Some(Codec::Zstd { level: -3, threads: 2 }), digest: true });
        check(Form { codec: Some(Codec::Lz4), digest: true });
    }
}
