//! One image file: told as JSON in both styles. Seeds: `crates/criu-image/tests/data/*/*.img`.
#![no_main]

use stasis_criu_image::{Style, write_json};

libfuzzer_sys::fuzz_target!(|content: &[u8]| {
    for style in [Style::Plain, Style::Pretty] {
        let _ = write_json(content, style, &mut std::io::sink());
    }
});
