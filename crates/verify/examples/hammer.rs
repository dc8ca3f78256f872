//! Changes a recorded checkpoint at random and verifies it, over and over: `hammer COUNT SEED`. A panic ends it and names
//! the round; the same seed comes to it again.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use stasis_checkpoint::reader::ArchiveReader;
use stasis_criu_image::{Style, write_json};
use stasis_verify::{Members, check::check};

/// Random enough, and the same everywhere (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound.max(1) as u64).unwrap_or_default()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let count: u64 = arguments.next().ok_or("usage: hammer COUNT SEED")?.parse()?;
    let seed: u64 = arguments.next().unwrap_or_else(|| "1".to_owned()).parse()?;
    let members = recorded()?;
    let archive = archive(&members)?;
    let mut random = Random(seed.max(1));
    let (mut accepted, mut told) = (0u64, 0u64);
    for round in 0..count {
        let hook = std::panic::AssertUnwindSafe(|| match round % 8 {
            // The whole archive.
            0 => {
                let changed = change(&archive, &mut random);
                let contents = Members::of_archive(&mut ArchiveReader::new(changed.as_slice()));
                accepted += u64::from(contents.is_ok_and(|contents| check(&contents, None).is_ok()));
            }
            // One image, which is quicker.
            _ => {
                let (_, content) = &members[random.below(members.len())];
                let changed = change(content, &mut random);
                let style = if round % 2 == 0 { Style::Plain } else { Style::Pretty };
                told += u64::from(write_json(changed.as_slice(), style, &mut std::io::sink()).is_ok());
            }
        });
        std::panic::catch_unwind(hook).map_err(|_| format!("round {round} of seed {seed} panicked"))?;
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{count} rounds of seed {seed}: {accepted} archives accepted, {told} images told, no panic")?;
    Ok(())
}

fn change(content: &[u8], random: &mut Random) -> Vec<u8> {
    let mut changed = content.to_vec();
    for _ in 0..=random.below(4) {
        if changed.is_empty() {
            break;
        }
        let at = random.below(changed.len());
        match random.below(6) {
            0 => changed.truncate(at),
            1 => changed[at] = 0xff,
            2 => changed[at] ^= 1 << random.below(8),
            3 => drop(changed.splice(at..at, [0x80, 0x80, 1])),
            4 => drop(changed.drain(at..(at + 1 + random.below(8)).min(changed.len()))),
            _ => changed[at] = u8::try_from(random.below(256)).unwrap_or_default(),
        }
    }
    changed
}

/// Name and content of a member.
type Member = (String, Vec<u8>);

/// Members without the container's memory.
fn recorded() -> Result<Vec<Member>, Box<dyn std::error::Error>> {
    let crates = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut members = Vec::new();
    for name in ["config.dump", "spec.dump"] {
        members.push((name.to_owned(), fs::read(crates.join("verify/tests/data").join(name))?));
    }
    for entry in fs::read_dir(crates.join("criu-image/tests/data/container"))? {
        let entry = entry?;
        members.push((format!("checkpoint/{}", entry.file_name().to_string_lossy()), fs::read(entry.path())?));
    }
    members.sort();
    Ok(members)
}

/// The members as a tar.
fn archive(members: &[(String, Vec<u8>)]) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut archive = Vec::new();
    let empty = [73728, 73728, 69632, 69632, 65536usize].into_iter().enumerate();
    let pages = empty.map(|(at, size)| (format!("checkpoint/pages-{}.img", at + 1), vec![0; size]));
    for (name, content) in members.iter().cloned().chain(pages) {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000600\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        archive.extend(&content);
        archive.extend(vec![0; content.len().wrapping_neg() % 512]);
    }
    archive.extend([0; 1024]);
    Ok(archive)
}
