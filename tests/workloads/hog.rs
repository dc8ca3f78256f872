//! Holds memory and tells the time: `hog [MIB] [TICK_MS]`.
//!
//! It fills MIB mebibytes (1), every other page with random bytes and the rest with text, prints `ready MIB`, and
//! then every TICK_MS milliseconds (2) `tick N NANOSECONDS`: a count and the wall clock. A gap in the clock is time
//! that the process did not run. With each tick one page, in turn, is compared with what was filled in; a difference
//! ends the program with code 3.

use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PAGE: usize = 4096;
const TEXT: &[u8] = b"The quick brown fox jumps over the lazy dog and goes on to count its pages. ";

fn main() {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse::<usize>().expect("a number"));
    let mebibytes = arguments.next().unwrap_or(1);
    let tick = Duration::from_millis(arguments.next().unwrap_or(2) as u64);
    let mut memory = vec![0_u8; mebibytes << 20];
    for (number, page) in memory.chunks_mut(PAGE).enumerate() {
        fill(number, page);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready {mebibytes}").expect("write");
    let pages = (memory.len() / PAGE).max(1);
    let mut expected = vec![0_u8; PAGE];
    for count in 0_usize.. {
        if let Some(page) = memory.chunks(PAGE).nth(count % pages) {
            fill(count % pages, &mut expected);
            if page != expected {
                eprintln!("page {} is not what was filled in", count % pages);
                std::process::exit(3);
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock past 1970").as_nanos();
        writeln!(out, "tick {count} {now}").expect("write");
        std::thread::sleep(tick);
    }
}

/// Fills a page with what belongs there, by its number alone.
fn fill(number: usize, page: &mut [u8]) {
    if number % 2 == 0 {
        let mut state = number as u64 ^ 0x9e37_79b9_7f4a_7c15;
        for word in page.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    } else {
        for (place, byte) in page.iter_mut().zip(TEXT.iter().cycle()) {
            *place = *byte;
        }
    }
}
