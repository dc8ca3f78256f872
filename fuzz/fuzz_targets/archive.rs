//! A whole archive: read, its images cross-checked, compared with its own specification.
#![no_main]

use stasis_checkpoint::reader::ArchiveReader;
use stasis_verify::{Members, check::check};

libfuzzer_sys::fuzz_target!(|archive: &[u8]| {
    if let Ok(contents) = Members::of_archive(&mut ArchiveReader::new(archive)) {
        let _ = check(&contents, None);
    }
});
