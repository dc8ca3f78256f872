//! Archives built for tests, also such as no honest writer makes. Not by our own writer, which would agree with our reader.

use std::io::Write;

/// A tar archive in the making.
#[derive(Default, Clone)]
pub(crate) struct Archive(Vec<u8>);

impl Archive {
    pub(crate) fn file(self, name: &str, content: &[u8]) -> Archive {
        self.entry(name, b'0', 0o644, "", content)
    }

    pub(crate) fn dir(self, name: &str) -> Archive {
        self.entry(name, b'5', 0o755, "", b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Archive {
        self.entry(name, b'2', 0o777, target, b"")
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Archive {
        self.entry(name, b'1', 0o644, target, b"")
    }

    /// Any type, mode and link.
    pub(crate) fn entry(self, name: &str, kind: u8, mode: u32, link: &str, content: &[u8]) -> Archive {
        self.with_header(content, |header| {
            let fields = header.as_old_mut();
            fields.name[..name.len()].copy_from_slice(name.as_bytes());
            fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
            fields.linkflag = [kind];
            header.set_mode(mode);
        })
    }

    /// A header that `change` may spoil; its sum is made right afterwards.
    pub(crate) fn with_header(mut self, content: &[u8], change: impl FnOnce(&mut tar::Header)) -> Archive {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.raw(content)
    }

    /// Bytes, filled up to a block.
    pub(crate) fn raw(mut self, content: &[u8]) -> Archive {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Archive {
        let mut text = Vec::new();
        for (keyword, value) in records {
            let rest = keyword.len() + value.len() + 3;
            let length = (1..).map(|digits| rest + digits).find(|all| all.to_string().len() + rest == *all).unwrap();
            write!(text, "{length} {keyword}=").unwrap();
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        self.entry("pax", b'x', 0o644, "", &text)
    }

    pub(crate) fn device(self, name: &str, kind: u8, major: u32, minor: u32) -> Archive {
        self.with_header(b"", |header| {
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_old_mut().linkflag = [kind];
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }

    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.0
    }
}
