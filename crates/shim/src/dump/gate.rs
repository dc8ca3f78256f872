//! The gate: CRIU's configuration file is a FIFO, so CRIU waits at it until there is something to read.
//!
//! Starting runc, its question for CRIU's version, and starting CRIU take 10 ms, in which the container would be frozen for
//! nothing. CRIU reads its configuration file after it has started and before it looks at the container; so the container
//! is frozen when CRIU opens the file, and only then is there something in it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::io::Errno;
use stasis_shim_api::ShimError;
use stasis_sys::mount;

use super::engine::Engine;
use super::job::internal;
use super::stop::Stop;
use crate::bundle::CRIU_CONFIG_FILE;

/// How often the gate looks whether CRIU is there. The container still runs, so this costs no freeze.
const PAUSE: Duration = Duration::from_micros(200);

/// CRIU's configuration file, closed.
#[derive(Debug)]
pub(crate) struct Gate {
    fifo: PathBuf,
}

/// CRIU waits for the content.
#[derive(Debug)]
pub(crate) struct Open {
    file: File,
}

impl Gate {
    /// Puts a FIFO, made at `fifo`, over the bundle's configuration file, in this mount namespace only.
    pub(crate) fn close(bundle: &Path, fifo: &Path) -> Result<Self, ShimError> {
        let config = bundle.join(CRIU_CONFIG_FILE);
        let failed = |error: std::io::Error| internal(format!("cannot prepare {}: {error}", config.display()));
        mknodat(CWD, fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).map_err(|error| failed(error.into()))?;
        mount::bind(fifo, &config).map_err(failed)?;
        Ok(Self { fifo: fifo.to_owned() })
    }

    /// Waits until CRIU is at the gate; none if `engine` ends before.
    pub(crate) fn wait(self, engine: &mut Engine, stop: &Stop) -> Result<Option<Open>, ShimError> {
        loop {
            // Without a reader this is an error.
            match open(&self.fifo, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
                Ok(file) => return Ok(Some(Open { file: file.into() })),
                Err(Errno::NXIO) => {}
                Err(error) => return Err(internal(format!("cannot open {}: {error}", self.fifo.display()))),
            }
            if engine.wait(stop, PAUSE)? {
                return Ok(None);
            }
        }
    }
}

impl Open {
    /// Gives CRIU its configuration and lets it go on.
    pub(crate) fn let_through(mut self, config: &str) -> Result<(), ShimError> {
        // Less than a pipe holds, so this does not wait.
        self.file.write_all(config.as_bytes()).map_err(|error| internal(format!("cannot configure CRIU: {error}")))
    }
}
