//! The members of an unpacked archive on a pipe, as the helper may open nothing.
//!
//! ```text
//! u32 length, grant as JSON                                           0: none
//! { u16 length of the name, name, u64 size, u8 1, content } …         content that is looked at
//! { u16 length of the name, name, u64 size, u8 0 } …                  of others the size alone
//! u16 0
//! ```
//!
//! Little endian. The privileged side writes it, so that it is well formed; what is in it is hostile.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use stasis_checkpoint::Member;

use crate::error::{Reason, Refusal};
use crate::grant::Grant;
use crate::members::{Contents, Members};

/// Size of the reads from the pipe.
const BUFFER: usize = 64 * 1024;

/// Writes what is in `dir` to `out`.
pub(crate) fn write(dir: &Path, grant: &[u8], out: &mut impl Write) -> io::Result<()> {
    let length = u32::try_from(grant.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(grant)?;
    write_dir(dir, "", out)?;
    out.write_all(&0u16.to_le_bytes())?;
    out.flush()
}

fn write_dir(dir: &Path, below: &str, out: &mut impl Write) -> io::Result<()> {
    let open = File::open(dir)?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{below}{}", entry.file_name().to_string_lossy());
        // Other names were refused when the directory was made or surveyed.
        let Some(member) = Member::parse(&name) else { continue };
        if member.is_dir() {
            write_dir(&entry.path(), &format!("{name}/"), out)?;
            continue;
        }
        let size = entry.metadata()?.len();
        let length = u16::try_from(name.len()).map_err(io::Error::other)?;
        out.write_all(&length.to_le_bytes())?;
        out.write_all(name.as_bytes())?;
        out.write_all(&size.to_le_bytes())?;
        let content = Members::wants_content(&member);
        out.write_all(&[content.into()])?;
        if content {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file =
                stasis_sys::path::open_beneath(open.as_fd(), Path::new(&entry.file_name()), flags, Mode::empty())?;
            if io::copy(&mut File::from(file).take(size), out)? != size {
                return Err(io::Error::other(format!("{name} became shorter")));
            }
        }
    }
    Ok(())
}

/// Reads it, and with it the grant.
pub(crate) fn read(input: impl Read) -> Result<(Option<Grant>, Contents), Refusal> {
    let broken = |error: &dyn std::fmt::Display| Refusal::new(Reason::ArchiveForm, "feed", error.to_string());
    let mut input = BufReader::with_capacity(BUFFER, input);
    let mut members = Members::default();
    let length = u32::from_le_bytes(array(&mut input).map_err(|error| broken(&error))?);
    let mut grant = vec![0; length as usize];
    input.read_exact(&mut grant).map_err(|error| broken(&error))?;
    let grant = match length {
        0 => None,
        _ => Some(serde_json::from_slice(&grant).map_err(|error| broken(&error))?),
    };
    loop {
        let length = u16::from_le_bytes(array(&mut input).map_err(|error| broken(&error))?);
        if length == 0 {
            return Ok((grant, members.finish()?));
        }
        let mut name = vec![0; length.into()];
        input.read_exact(&mut name).map_err(|error| broken(&error))?;
        let size = u64::from_le_bytes(array(&mut input).map_err(|error| broken(&error))?);
        let [content] = array(&mut input).map_err(|error| broken(&error))?;
        let name = String::from_utf8_lossy(&name).into_owned();
        let member = Member::parse(&name).ok_or_else(|| broken(&format_args!("{name:?} is no member")))?;
        let mut content = Read::by_ref(&mut input).take(if content == 1 { size } else { 0 });
        members.add(&member, size, &mut content)?;
        io::copy(&mut content, &mut io::sink()).map_err(|error| broken(&error))?;
    }
}

fn array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}
