//! `crit decode` without Python: tells one image file, or checks all files of a dump's directory.

use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::path::Path;

use stasis_criu_image::{SetBuilder, Style, write_json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (style, path) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--pretty", path] => (Style::Pretty, Path::new(path).to_owned()),
        [path] => (Style::Plain, Path::new(path).to_owned()),
        _ => return Err("usage: crit [--pretty] IMAGE | DIRECTORY".into()),
    };
    let mut stdout = std::io::stdout().lock();
    if !path.is_dir() {
        return Ok(write_json(BufReader::new(File::open(path)?), style, &mut stdout)?);
    }
    let mut set = SetBuilder::default();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let content = BufReader::new(File::open(entry.path())?);
        set.add(&entry.file_name().to_string_lossy(), entry.metadata()?.len(), content)?;
    }
    let set = set.finish()?;
    writeln!(stdout, "{} processes, {} files, {} bytes of memory", set.processes.len(), set.files.len(), set.memory)?;
    Ok(())
}
