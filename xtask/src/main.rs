//! The program of the development tasks; they are in the library, which the end-to-end tests use, too.

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::main()
}
