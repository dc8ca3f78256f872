//! YAML of JSON values: block style, keys in the order of the value, every doubtful string quoted.
//!
//! A serializer from a registry would be more code than this: a JSON string is a YAML string, so quoting is JSON's.
//! The maintained serializers of serde data either parse as well or bring a parser along.

use std::fmt::Write as _;

use serde_json::Value;

/// The document of a value, with a final line break.
pub(crate) fn document(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(&mut out, value, 0),
        Value::Array(list) if !list.is_empty() => block(&mut out, value, 0),
        scalar => {
            let _ = writeln!(out, "{}", flow(scalar));
        }
    }
    out
}

fn block(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let _ = write!(out, "{:indent$}{}:", "", string(key));
                child(out, value, indent + 2);
            }
        }
        Value::Array(list) => {
            for value in list {
                let _ = write!(out, "{:indent$}-", "");
                child(out, value, indent + 2);
            }
        }
        scalar => {
            let _ = writeln!(out, "{:indent$}{}", "", flow(scalar));
        }
    }
}

/// What follows `key:` or `-`. The first key of an object stands on the line of its `-`.
fn child(out: &mut String, value: &Value, indent: usize) {
    let nested = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => false,
    };
    if !nested {
        let _ = writeln!(out, " {}", flow(value));
    } else if out.ends_with('-') && value.is_object() {
        let start = out.len();
        block(out, value, indent);
        out.replace_range(start..start + indent, " ");
    } else {
        out.push('\n');
        block(out, value, indent);
    }
}

fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        other => other.to_string(),
    }
}

/// Plain where no reader can take it for anything but a string, else as JSON.
fn string(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-@+".contains(c))
        && !["y", "n", "yes", "no", "true", "false", "on", "off", "null"].contains(&text.to_ascii_lowercase().as_str());
    if plain { text.to_owned() } else { Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_shape() {
        // Keys in alphabetical order: whether a value keeps another one is serde_json's setting.
        let value = json!({
            "empty": [], "id": "abc", "labels": {"a b": "x", "no": "no"}, "map": {}, "none": null, "pinned": false,
            "ref": "docker.io/library/redis:7", "rows": [{"deep": {"x": [1, 2]}, "k": "v"}, [1, [2]], "multi\nline"],
            "size": 12, "tags": ["a", "1"],
        });
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("yaml", document(&value));
        });
    }

    #[test]
    fn doubtful_strings_are_quoted() {
        for text in
            ["", "yes", "NULL", "1.5", "0x1f", "- a", "a: b", "a #b", "#", "~", "a\tb", "ä", "'", "\"", ".inf", "1e3"]
        {
            assert_eq!(string(text), Value::from(text).to_string());
        }
        assert_eq!(document(&json!("plain")), "plain\n");
        assert_eq!(document(&json!([])), "[]\n");
    }
}
