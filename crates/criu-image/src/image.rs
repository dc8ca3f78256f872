//! One image file, an entry at a time.

use std::io::{self, Read};

use prost::Message as _;

use crate::error::{Error, Fault, Result};
use crate::kind::{CLASS_IMAGE, CLASS_SERVICE, Follows, Kind};
use crate::messages;
use crate::schema::{self, Message};
use crate::{limits, wire};

/// A file of a known type, read from its start.
#[derive(Debug)]
pub struct ImageReader<R> {
    input: R,
    kind: Kind,
    entries: u64,
    /// Chunks follow in a file whose first entry says so.
    chunks: bool,
    ended: bool,
}

/// A message as it lies in the file, and what follows it. It has been checked: every field is known, comes as often as it
/// may and holds what its type allows.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(crate) message: &'static Message,
    pub(crate) bytes: Vec<u8>,
    /// Data behind the message.
    pub extra: Extra,
}

/// Data behind a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extra {
    /// The type has none.
    None,
    /// Bytes, or only their number if they are not kept.
    Data(u64, Option<Vec<u8>>),
    /// What came in and what is to go out of a connection.
    Stream([u64; 2], Option<[Vec<u8>; 2]>),
    /// Values of semaphores.
    Semaphores(Vec<u16>),
    /// Messages of a queue: the message of CRIU and its text.
    Messages(Vec<(Vec<u8>, Vec<u8>)>),
}

impl Entry {
    /// The message.
    ///
    /// # Errors
    /// If `M` is not the message of the image's type.
    pub fn decode<M: prost::Message + Default>(&self) -> Result<M> {
        M::decode(self.bytes.as_slice())
            .map_err(|error| Error::new(Fault::Malformed, format!("{}: {error}", self.message.name)))
    }
}

impl<R: Read> ImageReader<R> {
    /// Reads the magic.
    ///
    /// # Errors
    /// If it is not one of CRIU's.
    pub fn new(mut input: R) -> Result<Self> {
        let first = read_u32(&mut input)?;
        // The inventory says which version all others are of, and so has no class itself.
        let magic = if first == Kind::Inventory.magic() { first } else { read_u32(&mut input)? };
        let unknown = || Error::new(Fault::UnknownImage, format!("the magic is {first:#x} {magic:#x}, of no image"));
        let kind = Kind::of_magic(magic).ok_or_else(unknown)?;
        let class = match kind {
            Kind::Inventory => Kind::Inventory.magic(),
            Kind::Stats | Kind::IrmapCache => CLASS_SERVICE,
            _ => CLASS_IMAGE,
        };
        if first != class {
            return Err(unknown());
        }
        Ok(Self { input, kind, entries: 0, chunks: false, ended: false })
    }

    /// The type of the image.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The next entry; none at the end. With `keep`, the data behind it too, of which there is as much as the file has.
    ///
    /// # Errors
    /// If the file is not as CRIU writes it. There is no entry after an error.
    pub fn next_entry(&mut self, keep: bool) -> Result<Option<Entry>> {
        if self.ended {
            return Ok(None);
        }
        let entry = self.read_entry(keep);
        self.ended = !matches!(entry, Ok(Some(_)));
        entry
    }

    fn read_entry(&mut self, keep: bool) -> Result<Option<Entry>> {
        let Some(length) = self.next_length()? else { return self.complete().map(|()| None) };
        let message = match (self.kind.follows(), self.entries) {
            (Follows::Pagemap, 1..) => &schema::PAGEMAP_ENTRY,
            (Follows::Ghost, 1..) if !self.chunks => {
                return Err(Error::new(Fault::Malformed, "a second entry in a file that has no chunks"));
            }
            (Follows::Ghost, 1..) => &schema::GHOST_CHUNK_ENTRY,
            _ => self.kind.message(),
        };
        let bytes = self.read_message(message, length)?;
        let mut entry = Entry { message, bytes, extra: Extra::None };
        entry.extra = self.read_extra(&entry, keep)?;
        self.entries += 1;
        Ok(Some(entry))
    }

    /// An image is empty where nothing is to be told, but some are of one thing.
    fn complete(&self) -> Result<()> {
        let needs_one = matches!(self.kind, Kind::Inventory | Kind::Pstree | Kind::Core | Kind::Mm | Kind::GhostFile)
            || self.kind == Kind::Pagemap;
        if needs_one && self.entries == 0 {
            return Err(Error::new(Fault::Truncated, "it has no entry"));
        }
        Ok(())
    }

    fn next_length(&mut self) -> Result<Option<u32>> {
        let mut length = [0; 4];
        let mut have = 0;
        while have < length.len() {
            match self.input.read(&mut length[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(Error::new(Fault::Truncated, "it ends in the middle of a length")),
                Ok(read) => have += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::reading(&error)),
            }
        }
        Ok(Some(u32::from_le_bytes(length)))
    }

    fn read_message(&mut self, message: &'static Message, length: u32) -> Result<Vec<u8>> {
        if length > limits::ENTRY_MAX {
            let why = format!("an entry of {length} bytes is larger than {}", limits::ENTRY_MAX);
            return Err(Error::new(Fault::TooLarge, why));
        }
        let bytes = self.read_exactly(length.into())?;
        wire::check_message(message, &bytes)?;
        Ok(bytes)
    }

    fn read_extra(&mut self, entry: &Entry, keep: bool) -> Result<Extra> {
        Ok(match self.kind.follows() {
            Follows::Nothing | Follows::Pagemap => Extra::None,
            Follows::PipeData => {
                let data: messages::PipeDataEntry = entry.decode()?;
                self.data(data.bytes.into(), 0, keep)?
            }
            Follows::Packet => {
                let packet: messages::SkPacketEntry = entry.decode()?;
                self.data(packet.length.into(), 0, keep)?
            }
            Follows::BpfMap => {
                let map: messages::BpfmapDataEntry = entry.decode()?;
                self.data(u64::from(map.keys_bytes) + u64::from(map.values_bytes), 0, keep)?
            }
            Follows::SharedMemory => {
                let segment: messages::IpcShmEntry = entry.decode()?;
                let size = if segment.in_pagemaps() { 0 } else { segment.size };
                self.data(size, size.wrapping_neg() % 4, keep)?
            }
            Follows::Stream => {
                let stream: messages::TcpStreamEntry = entry.decode()?;
                let lengths = [u64::from(stream.inq_len), u64::from(stream.outq_len)];
                if keep {
                    Extra::Stream(lengths, Some([self.read_exactly(lengths[0])?, self.read_exactly(lengths[1])?]))
                } else {
                    self.skip(lengths[0] + lengths[1])?;
                    Extra::Stream(lengths, None)
                }
            }
            Follows::Semaphores => self.semaphores(entry)?,
            Follows::Messages => self.queue(entry)?,
            Follows::Ghost => self.ghost(entry, keep)?,
        })
    }

    fn ghost(&mut self, entry: &Entry, keep: bool) -> Result<Extra> {
        if self.entries > 0 {
            let chunk: messages::GhostChunkEntry = entry.decode()?;
            return self.data(chunk.len, 0, keep);
        }
        let ghost: messages::GhostFileEntry = entry.decode()?;
        self.chunks = ghost.chunks();
        if self.chunks {
            return Ok(Extra::None);
        }
        let mut content = Vec::new();
        let size = if keep {
            self.input.read_to_end(&mut content).map(|read| read as u64)
        } else {
            io::copy(&mut self.input, &mut io::sink())
        };
        let size = size.map_err(|error| Error::reading(&error))?;
        Ok(Extra::Data(size, keep.then_some(content)))
    }

    fn semaphores(&mut self, entry: &Entry) -> Result<Extra> {
        let set: messages::IpcSemEntry = entry.decode()?;
        // More than the kernel's SEMMSL allows, by a wide margin.
        if set.nsems > 1 << 20 {
            return Err(Error::new(Fault::TooLarge, format!("a set of {} semaphores", set.nsems)));
        }
        let size = u64::from(set.nsems) * 2;
        let bytes = self.read_exactly(size)?;
        self.skip(size.wrapping_neg() % 8)?;
        Ok(Extra::Semaphores(bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()))
    }

    fn queue(&mut self, entry: &Entry) -> Result<Extra> {
        let queue: messages::IpcMsgEntry = entry.decode()?;
        let mut held = Vec::new();
        let mut size = 0u64;
        for _ in 0..queue.qnum {
            let length = read_u32(&mut self.input)?;
            let bytes = self.read_message(&schema::IPC_MSG, length)?;
            let header = messages::IpcMsg::decode(bytes.as_slice())
                .map_err(|error| Error::new(Fault::Malformed, error.to_string()))?;
            size += u64::from(header.msize) + bytes.len() as u64;
            if size > limits::ENTRY_MAX.into() {
                return Err(Error::new(Fault::TooLarge, "a queue of more messages than are accepted"));
            }
            let text = self.read_exactly(header.msize.into())?;
            self.skip(u64::from(header.msize).wrapping_neg() % 8)?;
            held.push((bytes, text));
        }
        Ok(Extra::Messages(held))
    }

    fn data(&mut self, size: u64, padding: u64, keep: bool) -> Result<Extra> {
        let kept = if keep { Some(self.read_exactly(size)?) } else { self.skip(size).map(|()| None)? };
        self.skip(padding)?;
        Ok(Extra::Data(size, kept))
    }

    /// Grows with what is there, whatever was said to be.
    fn read_exactly(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = Read::by_ref(&mut self.input).take(size).read_to_end(&mut bytes);
        let read = read.map_err(|error| Error::reading(&error))?;
        if (read as u64) < size {
            return Err(Error::new(Fault::Truncated, format!("it ends {} bytes early", size - read as u64)));
        }
        Ok(bytes)
    }

    fn skip(&mut self, size: u64) -> Result<()> {
        let passed = io::copy(&mut Read::by_ref(&mut self.input).take(size), &mut io::sink());
        let passed = passed.map_err(|error| Error::reading(&error))?;
        if passed < size {
            return Err(Error::new(Fault::Truncated, format!("it ends {} bytes early", size - passed)));
        }
        Ok(())
    }
}

fn read_u32(input: &mut impl Read) -> Result<u32> {
    let mut word = [0; 4];
    input.read_exact(&mut word).map_err(|error| Error::reading(&error))?;
    Ok(u32::from_le_bytes(word))
}
