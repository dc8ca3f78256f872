//! Where systemd puts the slices and scopes whose names it is given: systemd.slice(5), and the OCI runtimes' convention
//! `slice:prefix:name` for `cgroupsPath`. Pure functions; systemd itself is not asked.

use crate::error::{Error, Result};

/// The cgroup path of a slice: `a-b.slice` is `/a.slice/a-b.slice`; the root slice `-.slice` is `/`.
pub fn slice_path(slice: &str) -> Result<String> {
    let invalid = |reason| Error::InvalidPath { path: slice.chars().take(256).collect(), reason };
    let stem = slice.strip_suffix(".slice").ok_or_else(|| invalid("a slice's name ends in .slice"))?;
    if stem == "-" {
        return Ok("/".to_owned());
    }
    if stem.contains('/') || stem.split('-').any(str::is_empty) {
        return Err(invalid("a slice's name has no slash and no empty part between its dashes"));
    }
    let mut path = String::new();
    for (at, _) in stem.match_indices('-') {
        path.push_str(&format!("/{}.slice", &stem[..at]));
    }
    Ok(format!("{path}/{slice}"))
}

/// The cgroup path of the scope that a runtime makes for `cgroupsPath` = `slice:prefix:name`.
pub fn scope_path(slice: &str, prefix: &str, name: &str) -> Result<String> {
    let path = slice_path(if slice.is_empty() { "system.slice" } else { slice })?;
    let scope = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    Ok(format!("{}/{scope}", path.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_nest_by_their_dashes() {
        let pod = "kubepods-besteffort-pod1_2.slice";
        let expected = format!("/kubepods.slice/kubepods-besteffort.slice/{pod}");
        assert_eq!(slice_path(pod).unwrap(), expected);
        assert_eq!(slice_path("-.slice").unwrap(), "/");
        assert_eq!(scope_path(pod, "cri-stasis", "abc").unwrap(), format!("{expected}/cri-stasis-abc.scope"));
        assert_eq!(scope_path("", "", "abc").unwrap(), "/system.slice/abc.scope");
        for bad in ["kubepods", "a/b.slice", "a--b.slice", "-a.slice", ".slice"] {
            assert!(slice_path(bad).is_err(), "{bad}");
        }
    }
}
