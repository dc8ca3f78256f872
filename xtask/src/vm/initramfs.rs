//! The archive that the kernel unpacks as its first root: cpio in the form `newc`, cpio(5).
//!
//! ```text
//! entry  "070701", thirteen fields of eight hexadecimal digits, name and NUL, padding to 4; content, padding to 4
//! end    an entry called TRAILER!!!
//! ```

const MAGIC: &str = "070701";
const END: &str = "TRAILER!!!";

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive that is being written.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// A directory; those above it come first.
    pub(super) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, &[]);
    }

    /// A file that may be executed.
    pub(super) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, content);
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) {
        self.entry(name, LINK, target.as_bytes());
    }

    /// The whole archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(END, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a boot file is no gigabytes");
        let name_size = u32::try_from(name.len() + 1).expect("a name is short");
        // Inode, mode, owner, group, links, time, size, device twice, device of the node twice, size of the name, sum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(MAGIC.bytes());
        self.bytes.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_as_cpio_describes_it() {
        let mut archive = Archive::default();
        archive.directory("a");
        archive.file("a/b", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let second = "070701000000020000\
                      81ED00000000000000000000000100000000000000050000000000000000000000000000000000000004\
                      00000000a/b\0\0\0hello\0\0\0";
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(second), "{text:?}");
        assert!(text.contains("TRAILER!!!\0"), "{text:?}");
    }
}
