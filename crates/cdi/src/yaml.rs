//! YAML as JSON: what a specification needs of it, and no more.
//!
//! Aliases are refused: a few lines of them become gigabytes. So are tags, several documents, keys that are no strings,
//! and a key twice in one mapping.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

/// Deepest nesting. A specification has six levels.
const DEPTH_MAX: usize = 32;

/// What is being read: values, or the values of a mapping with the key that waits for its value.
enum Open {
    Sequence(Vec<Value>),
    Mapping(Map<String, Value>, Option<String>),
}

/// Reads one document.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let mut open: Vec<Open> = Vec::new();
    let mut document = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| error.to_string())?;
        let at = |words: &str| format!("line {}: {words}", span.start.line());
        let done = match event {
            Event::Scalar(_, _, _, Some(_)) | Event::SequenceStart(_, Some(_)) | Event::MappingStart(_, Some(_)) => {
                return Err(at("tags are not read"));
            }
            Event::Alias(_) => return Err(at("aliases are not read")),
            Event::Scalar(text, style, ..) => {
                if let Some(Open::Mapping(_, key @ None)) = open.last_mut() {
                    *key = Some(text.into_owned());
                    continue;
                }
                if style == ScalarStyle::Plain { plain(&text) } else { Value::String(text.into_owned()) }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() == DEPTH_MAX {
                    return Err(at("nested too deeply"));
                }
                if matches!(open.last(), Some(Open::Mapping(_, None))) {
                    return Err(at("a key is no string"));
                }
                open.push(match event {
                    Event::SequenceStart(..) => Open::Sequence(Vec::new()),
                    _ => Open::Mapping(Map::new(), None),
                });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::Sequence(values)) => Value::Array(values),
                Some(Open::Mapping(values, _)) => Value::Object(values),
                None => return Err(at("an end without a beginning")),
            },
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {
                continue;
            }
        };
        match open.last_mut() {
            Some(Open::Sequence(values)) => values.push(done),
            Some(Open::Mapping(values, key)) => {
                let key = key.take().unwrap_or_default();
                if values.insert(key.clone(), done).is_some() {
                    return Err(at(&format!("{key:?} is there twice")));
                }
            }
            None if document.is_none() => document = Some(done),
            None => return Err(at("a second document")),
        }
    }
    document.ok_or_else(|| "it is empty".to_owned())
}

/// A scalar without quotes, as Go's YAML reads it, for which specifications are written: a leading zero means octal.
fn plain(text: &str) -> Value {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let radix = |prefix: &str, radix| Some(i64::from_str_radix(digits.strip_prefix(prefix)?, radix).ok());
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let octal = digits.len() > 1 && digits.bytes().all(|b| b.is_ascii_digit());
    let magnitude = radix("0x", 16).or_else(|| radix("0o", 8)).or_else(|| octal.then(|| radix("0", 8)).flatten());
    let integer = match magnitude {
        Some(magnitude) => magnitude.map(|n| if text.starts_with('-') { -n } else { n }),
        None if digits.starts_with(|c: char| c.is_ascii_digit()) => text.parse().ok(),
        None => None,
    };
    let float = || {
        let number = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.');
        number.then(|| text.parse().ok().and_then(Number::from_f64)).flatten()
    };
    match integer {
        Some(integer) => Value::from(integer),
        None => float().map_or_else(|| Value::String(text.to_owned()), Value::Number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_specifications_are_written_in_is_read() {
        let text = "# a comment\n---\nkind: \"v.com/gpu\"\ndevices:\n- name: '0'\n  containerEdits:\n    deviceNodes:\n    \
                    - {path: /dev/x, major: 195, fileMode: 0666, permissions: rw}\n    env:\n    - A=b\n    - \"C=d e\"\n\
                    containerEdits:\n  hooks: []\n  text: |\n    two\n    lines\nnone:\nyes: true\nhex: -0x10\nfloat: 1.5\n";
        let expected = json!({
            "kind": "v.com/gpu",
            "devices": [{"name": "0", "containerEdits": {
                "deviceNodes": [{"path": "/dev/x", "major": 195, "fileMode": 0o666, "permissions": "rw"}],
                "env": ["A=b", "C=d e"],
            }}],
            "containerEdits": {"hooks": [], "text": "two\nlines\n"},
            "none": null, "yes": true, "hex": -16, "float": 1.5,
        });
        assert_eq!(parse(text).expect("a document"), expected);
        for (text, expected) in [("0", json!(0)), ("00x", json!("00x")), ("1.2.3", json!("1.2.3")), ("-", json!("-"))] {
            assert_eq!(plain(text), expected, "{text}");
        }
    }

    #[test]
    fn what_grows_or_has_two_meanings_is_refused() {
        for (text, words) in [
            ("a: &x [1]\nb: *x\n", "aliases"),
            ("a: !!str 1\n", "tags"),
            ("a: 1\na: 2\n", "twice"),
            ("--- 1\n--- 2\n", "second document"),
            ("[1]: 2\n", "no string"),
            ("", "empty"),
            ("a: [1\n", ""),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = parse(&"[".repeat(10_000)).expect_err("nested");
        assert!(error.contains("deep") || error.contains("recursion"), "{error}");
    }
}
