//! Tests of [`super`].

use super::*;
use std::fs;

/// The log that comes of reads of the given chunks, its times cut off.
fn log_of(chunks: &[&[u8]], end: fn(&mut LogWriter)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let mut writer = LogWriter::cri(Arc::new(Mutex::new(LogFile::open(path.clone()).unwrap())), "stdout");
    for chunk in chunks {
        writer.write(chunk);
    }
    end(&mut writer);
    let text = fs::read_to_string(&path).unwrap();
    text.lines()
        .map(|line| {
            let (time, rest) = line.split_once(' ').unwrap();
            assert_eq!(time.len(), "2016-10-06T00:17:09.669794202Z".len(), "{time}");
            time.parse::<Timestamp>().unwrap();
            format!("{rest}\n")
        })
        .collect()
}

#[test]
fn lines_come_out_whole_however_they_came_in() {
    let check = |chunks: &[&[u8]], expected: &str| assert_eq!(log_of(chunks, LogWriter::finish), expected);
    check(&[b"one\ntwo\n"], "stdout F one\nstdout F two\n");
    check(&[b"on", b"e\nt", b"wo", b"\n"], "stdout F one\nstdout F two\n");
    check(&[b"\n\n"], "stdout F \nstdout F \n");
    check(&[b"no end"], "stdout F no end\n");
    check(&[], "");
}

#[test]
fn a_line_that_goes_on_is_partial() {
    assert_eq!(log_of(&[b"begun"], LogWriter::flush), "stdout P begun\n");
}

#[test]
fn long_lines_are_written_in_pieces() {
    let full = "x".repeat(CRI_LOG_LINE_MAX);
    let check = |length: usize, expected: &str| {
        let line = format!("{}\n", "x".repeat(length));
        assert_eq!(log_of(&[line.as_bytes()], LogWriter::finish), expected, "{length}");
        let bytes: Vec<&[u8]> = line.as_bytes().chunks(1000).collect();
        assert_eq!(log_of(&bytes, LogWriter::finish), expected, "{length} in small reads");
    };
    check(CRI_LOG_LINE_MAX, &format!("stdout F {full}\n"));
    check(CRI_LOG_LINE_MAX + 1, &format!("stdout P {full}\nstdout F x\n"));
    check(2 * CRI_LOG_LINE_MAX + 3, &format!("stdout P {full}\nstdout P {full}\nstdout F xxx\n"));
}

#[test]
fn a_log_is_a_regular_file_and_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    assert!(LogFile::open(link).is_err());
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    assert!(LogFile::open(fifo).is_err());
    assert!(LogFile::open(dir.path().join("no/such/dir.log")).is_err());
}

#[test]
fn after_a_rotation_the_log_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let log = Arc::new(Mutex::new(LogFile::open(path.clone()).unwrap()));
    let mut writer = LogWriter::cri(Arc::clone(&log), "stderr");
    writer.write(b"old\n");
    fs::rename(&path, dir.path().join("0.log.1")).unwrap();
    writer.write(b"still old\n");
    lock(&log).reopen().unwrap();
    writer.write(b"new\n");
    assert!(fs::read_to_string(&path).unwrap().ends_with(" stderr F new\n"));
    assert_eq!(fs::read_to_string(dir.path().join("0.log.1")).unwrap().lines().count(), 2);
}

#[test]
fn a_full_disk_loses_lines_and_tears_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let log = Arc::new(Mutex::new(LogFile::open(path.clone()).unwrap()));
    let mut writer = LogWriter::cri(Arc::clone(&log), "stdout");
    writer.write(b"before\n");
    // /dev/full fails every write as a full disk does.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let file = std::mem::replace(&mut lock(&log).file, full);
    writer.write(b"lost\n");
    assert!(lock(&log).lost > 0);
    lock(&log).file = file;
    lock(&log).torn = true;
    writer.write(b"after\n");
    let text = fs::read_to_string(&path).unwrap();
    let messages: Vec<&str> =
        text.lines().filter(|line| !line.is_empty()).map(|line| line.rsplit(' ').next().unwrap()).collect();
    assert_eq!(messages, ["before", "after"]);
    assert_eq!(lock(&log).lost, 0);
}
