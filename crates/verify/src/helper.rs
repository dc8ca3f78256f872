//! The confined process that parses what is hostile.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use stasis_checkpoint::reader::{ArchiveReader, Source};
use stasis_sys::confine::{Confinement, confine};

use crate::check::check;
use crate::error::{Reason, Refusal};
use crate::feed;
use crate::grant::Grant;
use crate::members::{Contents, Members};
use crate::plan::Verdict;

/// The hidden subcommand by which a program becomes the helper.
pub const SUBCOMMAND: &str = "verify-helper";

/// The argument for an archive as standard input; otherwise it is a feed of members.
pub(crate) const ARCHIVE: &str = "archive";
/// The argument for a feed of members.
pub(crate) const MEMBERS: &str = "members";

/// User and group of the helper: a number that no range of users has (systemd, Kubernetes and useradd end below).
const USER: u32 = 2_147_450_881;
/// Most memory of the helper.
const MEMORY_MAX: u64 = 64 << 20;
/// Processor time for the small files of an archive; a thousand processes take about a tenth of a second.
const MEMBERS_SECONDS: u64 = 10;
/// The same for an archive that may have to be decompressed to be passed over, at half a gigabyte a second.
const ARCHIVE_SECONDS: u64 = 600;

/// The argument of [`main`], if this program was started to become the helper: asked before anything else, so that
/// nothing is set up that the helper has no use for.
pub fn requested() -> Option<String> {
    let mut arguments = std::env::args().skip(1);
    (arguments.next()? == SUBCOMMAND).then(|| arguments.next().unwrap_or_default())
}

/// Runs the helper in this process, which has done nothing else yet: standard input is what is verified, standard output
/// takes the verdict as JSON.
pub fn main(argument: &str) -> ExitCode {
    match verdict(argument).and_then(|verdict| {
        let mut out = io::stdout().lock();
        out.write_all(&serde_json::to_vec(&verdict)?)?;
        out.flush()
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be reading; there is no other place to say it.
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn verdict(argument: &str) -> io::Result<Verdict> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let is_archive = match argument {
        ARCHIVE => true,
        MEMBERS => false,
        _ => return Err(io::Error::other(format!("{argument:?} is neither {ARCHIVE} nor {MEMBERS}"))),
    };
    let root = rustix::process::geteuid().is_root();
    confine(&Confinement {
        user: root.then_some(USER),
        memory: MEMORY_MAX,
        cpu_seconds: if is_archive { ARCHIVE_SECONDS } else { MEMBERS_SECONDS },
    })
    .map_err(|error| io::Error::other(format!("cannot be confined: {error}")))?;
    let read = if is_archive { archive(input).map(|contents| (None, contents)) } else { feed::read(input) };
    Ok(match read.and_then(|(grant, contents): (Option<Grant>, Contents)| check(&contents, grant.as_ref())) {
        Ok(plan) => Verdict::Accepted(plan),
        Err(refusal) => Verdict::Refused(refusal),
    })
}

fn archive(file: File) -> Result<Contents, Refusal> {
    let source = Source::new(file).map_err(|error| Refusal::new(Reason::ArchiveForm, "archive", error.to_string()))?;
    Members::of_archive(&mut ArchiveReader::new(source))
}
