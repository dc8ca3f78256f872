//! Two recorded dumps of CRIU 4.2.1 without their pages: a container, and a process tree with a file of many kinds.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use stasis_criu_image::{ImageSet, Result, SetBuilder};

/// The images of a dump by name, with the sizes of those whose content does not matter.
#[derive(Clone)]
pub struct Dump {
    pub files: BTreeMap<String, Vec<u8>>,
    pub pages: BTreeMap<String, u64>,
}

fn data(dump: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(dump)
}

impl Dump {
    pub fn recorded(name: &str) -> Dump {
        let entries = fs::read_dir(data(name)).unwrap().map(|entry| entry.unwrap());
        let files = entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
        let pages: &[(&str, u64)] = match name {
            "container" => &[
                ("pages-1.img", 73728),
                ("pages-2.img", 73728),
                ("pages-3.img", 69632),
                ("pages-4.img", 69632),
                ("pages-5.img", 65536),
            ],
            "many" => &[
                ("pages-1.img", 4096),
                ("pages-2.img", 8192),
                ("pages-3.img", 8417280),
                ("pages-4.img", 8417280),
                ("pages-5.img", 0),
            ],
            _ => panic!("{name}"),
        };
        Dump { files: files.collect(), pages: pages.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect() }
    }

    pub fn load(&self) -> Result<ImageSet> {
        let mut set = SetBuilder::default();
        for (name, content) in &self.files {
            set.add(name, content.len() as u64, content.as_slice())?;
        }
        for (name, size) in &self.pages {
            set.add(name, *size, std::io::empty())?;
        }
        set.finish()
    }
}

/// What crit 4.2.1 said of the images: name, whether `--pretty`, text.
pub fn told_by_crit(dump: &str) -> Vec<(String, bool, String)> {
    let text = fs::read_to_string(data("crit").join(format!("{dump}.txt"))).unwrap();
    let parts = text.split("\n# ").map(|part| part.strip_prefix("# ").unwrap_or(part));
    parts
        .map(|part| {
            let (head, text) = part.split_once('\n').unwrap();
            let (name, style) = head.split_once(' ').unwrap();
            (name.to_owned(), style == "--pretty", text.trim_end().to_owned())
        })
        .collect()
}
