//! What a specification must be, beyond its form. A sentence says what is wrong.

use std::collections::HashSet;
use std::path::Path;

use crate::spec::{Edits, Spec};

/// Versions of the specification that are read.
const VERSIONS: [&str; 7] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0"];

/// Points in a container's life at which hooks run: OCI runtime specification, `config.md`, "POSIX-platform Hooks".
pub(crate) const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Checks a specification.
pub(crate) fn spec(spec: &Spec) -> Result<(), String> {
    if !VERSIONS.contains(&spec.cdi_version.trim_start_matches('v')) {
        return Err(format!("cdiVersion {:?} is not one of {}", spec.cdi_version, VERSIONS.join(", ")));
    }
    if !is_kind(&spec.kind) {
        return Err(format!("kind {:?} is not vendor.example/class", spec.kind));
    }
    edits(&spec.container_edits).map_err(|error| format!("containerEdits: {error}"))?;
    let mut names = HashSet::new();
    for device in &spec.devices {
        if !is_device(&device.name) {
            return Err(format!("{:?} is not the name of a device", device.name));
        }
        if !names.insert(&device.name) {
            return Err(format!("device {:?} is there twice", device.name));
        }
        edits(&device.container_edits).map_err(|error| format!("device {:?}: {error}", device.name))?;
    }
    if spec.devices.is_empty() { Err("it has no devices".to_owned()) } else { Ok(()) }
}

/// `vendor.example/class=device` in its parts.
pub(crate) fn qualified(name: &str) -> Option<(&str, &str)> {
    name.split_once('=').filter(|(kind, device)| is_kind(kind) && is_device(device))
}

fn is_kind(kind: &str) -> bool {
    let starts = |part: &str| part.starts_with(|c: char| c.is_ascii_alphabetic());
    kind.split_once('/').is_some_and(|(vendor, class)| {
        starts(vendor) && starts(class) && is_word(vendor, "_-.") && is_word(class, "_-.")
    })
}

fn is_device(name: &str) -> bool {
    is_word(name, "_-.:")
}

/// Letters and digits, and the given punctuation between them.
fn is_word(text: &str, between: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    text.starts_with(ends) && text.ends_with(ends) && text.chars().all(|c| ends(c) || between.contains(c))
}

fn edits(edits: &Edits) -> Result<(), String> {
    if edits.intel_rdt.is_some() {
        return Err("intelRdt is not supported: remove it from the specification".to_owned());
    }
    if let Some(bad) =
        edits.env.iter().find(|e| e.contains('\0') || e.split_once('=').is_none_or(|(k, _)| k.is_empty()))
    {
        return Err(format!("env {bad:?} is not NAME=value"));
    }
    for node in &edits.device_nodes {
        absolute("deviceNodes", &node.path)?;
        if !node.host_path.is_empty() {
            absolute("deviceNodes", &node.host_path)?;
        }
        if !["", "b", "c", "u", "p"].contains(&node.kind.as_str()) {
            return Err(format!("device node {}: type {:?} is none of b, c, u, p", node.path, node.kind));
        }
        if !node.permissions.bytes().all(|b| b"rwm".contains(&b)) {
            return Err(format!("device node {}: permissions {:?} are not of r, w, m", node.path, node.permissions));
        }
    }
    for mount in &edits.mounts {
        absolute("mounts", &mount.container_path)?;
        if mount.host_path.is_empty() {
            return Err(format!("mount {}: hostPath is empty", mount.container_path));
        }
    }
    for hook in &edits.hooks {
        if !HOOKS.contains(&hook.hook_name.as_str()) {
            return Err(format!("hook {:?} is none of {}", hook.hook_name, HOOKS.join(", ")));
        }
        absolute("hooks", &hook.path)?;
    }
    Ok(())
}

fn absolute(field: &str, path: &str) -> Result<(), String> {
    if Path::new(path).is_absolute() && !path.contains('\0') {
        Ok(())
    } else {
        Err(format!("{field}: {path:?} is no absolute path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_specification() {
        for good in ["vendor.com/gpu=0", "a/b=c", "nvidia.com/gpu=all", "v.io/net_1-x=a:b.c-d_e", "k8s.io/a.b=1"] {
            assert!(qualified(good).is_some(), "{good}");
        }
        for bad in ["", "=", "a/b", "a/b=", "a=c", "/b=c", "a/=c", "1a/b=c", "a./b=c", "a/b=c/d", "a/b=-c", "a/b=c d"] {
            assert!(qualified(bad).is_none(), "{bad}");
        }
    }

    fn check(text: &str, words: &str) {
        let parsed: Spec = serde_json::from_str(text).expect("well-formed");
        match spec(&parsed) {
            Ok(()) => assert!(words.is_empty(), "{text}"),
            Err(error) => assert!(!words.is_empty() && error.contains(words), "{text}: {error}"),
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |edits: &str| {
            format!(r#"{{"cdiVersion":"0.7.0","kind":"a.b/c","devices":[{{"name":"x","containerEdits":{edits}}}]}}"#)
        };
        check(&with("{}"), "");
        check(&with(r#"{"env":["=x"]}"#), "NAME=value");
        check(&with(r#"{"deviceNodes":[{"path":"dev/x"}]}"#), "absolute");
        check(&with(r#"{"deviceNodes":[{"path":"/dev/x","type":"z"}]}"#), "type");
        check(&with(r#"{"deviceNodes":[{"path":"/dev/x","permissions":"rx"}]}"#), "permissions");
        check(&with(r#"{"mounts":[{"hostPath":"","containerPath":"/x"}]}"#), "hostPath");
        check(&with(r#"{"hooks":[{"hookName":"later","path":"/x"}]}"#), "later");
        check(&with(r#"{"intelRdt":{"closID":"a"}}"#), "intelRdt is not supported");
        check(r#"{"cdiVersion":"0.2.0","kind":"a.b/c","devices":[{"name":"x","containerEdits":{}}]}"#, "cdiVersion");
        check(r#"{"cdiVersion":"1.0.0","kind":"a.b","devices":[{"name":"x","containerEdits":{}}]}"#, "kind");
        check(r#"{"cdiVersion":"1.0.0","kind":"a.b/c","devices":[]}"#, "no devices");
    }
}
