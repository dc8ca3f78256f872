//! A prefix directory of programs: from the system where they are good enough, else from Debian packages.
//!
//! ```text
//! <prefix>/bin       programs, or links to them: put it first in PATH
//! <prefix>/cni       the CNI plugins, if the recipe has them
//! <prefix>/root      the unpacked packages, the loader and the libraries among them
//! <prefix>/versions  package versions; and what came from the system
//! <prefix>/.recipe   what this prefix was made by; equal means fresh
//! ```
//! The result holds absolute paths: a prefix that was moved is made anew. Knows nothing of single programs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::debian::{self, Apt};
use crate::layout::hex;
use crate::places::Places;

/// Where a wanted program is taken from and what it becomes.
#[derive(Debug)]
pub(crate) struct Program {
    /// Name in `bin`; or `cni` for the directory of plugins.
    pub(crate) name: &'static str,
    /// The Debian package that has it.
    pub(crate) package: &'static str,
    /// The file (or directory) in the package.
    pub(crate) file: &'static str,
    pub(crate) form: Form,
    /// Finds one on the system that is good enough.
    pub(crate) system: fn() -> Option<PathBuf>,
}

/// How a program of a package is made to run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Runs on any libc: linked as it is, without its dependencies.
    AsItIs,
    /// Brings its libraries: interpreter and library path are set into the prefix.
    Relocated,
    /// Relocated, and loads extensions from the prefix; called under several names, each with its own first argument.
    Xtables,
}

/// A prefix and all that is to be in it.
#[derive(Debug)]
pub(crate) struct Recipe {
    /// Where it stands.
    pub(crate) place: PathBuf,
    pub(crate) programs: &'static [Program],
}

impl Recipe {
    /// Makes the prefix unless it is there and fresh. The caller holds the lock of the development directory.
    ///
    /// Returns whether it was made.
    pub(crate) fn make(&self, places: &Places) -> Result<bool> {
        let mark = self.mark();
        if fs::read_to_string(self.place.join(".recipe")).is_ok_and(|found| found == mark) && self.complete() {
            return Ok(false);
        }
        let draft = self.place.with_extension(format!("draft.{}", process::id()));
        debian::remove_tree(&draft)?;
        let made = self.make_in(places, &draft).and_then(|()| {
            fs::write(draft.join(".recipe"), &mark)?;
            debian::remove_tree(&self.place)?;
            fs::rename(&draft, &self.place).with_context(|| format!("move {} into place", draft.display()))
        });
        if made.is_err() {
            debian::remove_tree(&draft)?;
        }
        made.map(|()| true).with_context(|| format!("set up {}", self.place.display()))
    }

    /// Where the programs came from, a line each: package and version, or the place on the system.
    pub(crate) fn versions(&self) -> Result<String> {
        let path = self.place.join("versions");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let wanted = |line: &&str| {
            let name = line.split('\t').next().unwrap_or("");
            self.programs.iter().any(|program| program.package == name || program.name == name)
        };
        Ok(text.lines().filter(wanted).map(|line| format!("{line}\n")).collect())
    }

    fn mark(&self) -> String {
        let way = concat!(include_str!("prefix.rs"), include_str!("debian.rs"), include_str!("engines.rs"));
        hex(&Sha256::digest(format!("{}\n{way}", self.place.display())))
    }

    /// Whether every program can be reached: one that came from the system may have left it.
    fn complete(&self) -> bool {
        self.programs.iter().all(|program| self.entry(&self.place, program).exists())
    }

    fn entry(&self, prefix: &Path, program: &Program) -> PathBuf {
        if program.name == "cni" { prefix.join("cni") } else { prefix.join("bin").join(program.name) }
    }

    fn make_in(&self, places: &Places, draft: &Path) -> Result<()> {
        fs::create_dir_all(draft.join("bin")).with_context(|| format!("create {}", draft.display()))?;
        let mut versions = String::new();
        let mut packaged = Vec::new();
        for program in self.programs {
            match (program.system)() {
                Some(found) => {
                    versions += &format!("{}\tof the system: {}\n", program.name, found.display());
                    debian::link(&found, &self.entry(draft, program))?;
                }
                None => packaged.push(program),
            }
        }
        if !packaged.is_empty() {
            versions += &load(places, draft, &packaged)?;
        }
        let mut relocated = BTreeSet::new();
        for program in packaged {
            if program.form != Form::AsItIs && relocated.insert(program.file) {
                debian::relocate(&draft.join("root"), &self.place.join("root"), program.file)?;
            }
            self.place_program(draft, program)?;
        }
        fs::write(draft.join("versions"), versions)?;
        Ok(())
    }

    fn place_program(&self, draft: &Path, program: &Program) -> Result<()> {
        let entry = self.entry(draft, program);
        if program.form != Form::Xtables {
            let up = if program.name == "cni" { "" } else { "../" };
            return debian::link(format!("{up}root/{}", program.file), &entry);
        }
        let root = self.place.join("root");
        let argument = if program.file.ends_with("multi") { program.name } else { "" };
        let text = format!(
            "#!/bin/sh\nXTABLES_LIBDIR='{root}/{libraries}/xtables' exec '{root}/{file}' {argument} \"$@\"\n",
            root = root.display(),
            libraries = debian::libraries(),
            file = program.file,
        );
        debian::write_program(&entry, &text)
    }
}

/// Downloads and unpacks the packages of `programs` into `draft/root`.
fn load(places: &Places, draft: &Path, programs: &[&Program]) -> Result<String> {
    let of = |alone: bool| -> BTreeSet<&'static str> {
        let chosen = programs.iter().filter(|program| (program.form == Form::AsItIs) == alone);
        chosen.map(|program| program.package).collect()
    };
    let alone: Vec<&str> = of(true).into_iter().collect();
    let mut resolved: Vec<&str> = of(false).into_iter().collect();
    if !resolved.is_empty() {
        resolved.push("patchelf");
    }
    let archives = draft.join("archives");
    Apt::open(&places.dev.join("apt"))?.download(&archives, &resolved, &alone)?;
    let root = draft.join("root");
    let versions = debian::unpack(&archives, &root)?;
    debian::remove_tree(&archives)?;
    debian::remove_tree(&root.join("var"))?;
    Ok(versions)
}
