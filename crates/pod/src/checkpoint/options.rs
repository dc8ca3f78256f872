//! What may be asked of a checkpoint, by name: one list for the configuration of a handler, the annotations of a pod, the
//! command line and CRI's option maps.
//!
//! The list is closed. A name that is not on it, or that the one who asks may not set, is an error that says so; nothing is
//! ever handed on to CRIU as text.

use std::collections::{BTreeMap, HashMap};

use stasis_checkpoint::Profile;
use stasis_shim_api::{Compression, CriuOptions};

use crate::error::{Error, Kind, Result};

/// Annotations of a pod with this prefix set options of the checkpoints of its containers.
pub const ANNOTATION_PREFIX: &str = "checkpoint.stasis/";

/// zstd's levels: the negative ones are the fast ones.
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
/// What zstd is asked for if nothing is said: memory of programs shrinks to two thirds, at 0.6 GB/s on two threads.
const ZSTD_LEVEL: i32 = -3;
/// More threads than this only take the processors away from the containers.
const THREADS_MAX: u32 = 16;
/// Threads that compress if nothing is said.
const THREADS: u32 = 1;

/// All options, and what each is for.
pub const OPTIONS: [(&str, &str); 20] = [
    ("leave-running", "the container goes on running (true)"),
    ("file-locks", "keep file locks (true)"),
    ("tcp-established", "keep established TCP connections (false)"),
    ("tcp-close", "close TCP connections in the checkpoint (false)"),
    ("skip-in-flight", "leave out connections that are not accepted yet (false)"),
    ("link-remap", "link deleted but open files back into their directories (false)"),
    ("shell-job", "allow a terminal or session from outside the container (false)"),
    ("ext-unix-sk", "allow unix sockets that lead outside the container (false)"),
    ("ghost-limit", "largest deleted but open file that is kept, in bytes (CRIU's: 1048576)"),
    ("ignore-mounts", "mounts left out of the dump, by their paths in the container, with commas (none)"),
    ("include-volumes", "mounts whose content goes into the archive, likewise (none)"),
    ("include-dev-shm", "the content of the pod's /dev/shm goes into the archive (true)"),
    ("include-log", "the container's log goes into the archive (true)"),
    ("keep-criu-log", "keep CRIU's log of a dump that failed (true)"),
    ("compression", "none, zstd or lz4 (none)"),
    ("compression-level", "zstd's level, -7 to 19 (-3)"),
    ("compression-threads", "threads that compress, 0 to 16 (1)"),
    ("image", "reference of an image to make beside the archive (none)"),
    ("record-cgroups", "record control groups of version 1, which other runtimes need; 7 ms of freeze (false)"),
    ("profile", "for whose readers the archive is: containerd or cri-o (containerd)"),
];

/// What a handler's configuration says of checkpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckpointPolicy {
    /// Options of every checkpoint, `NAME` or `NAME=VALUE`.
    pub defaults: Vec<String>,
    /// Names that pods may set by annotations.
    pub pod_options: Vec<String>,
    /// Largest `ghost-limit` that a pod may set, in bytes.
    pub pod_ghost_limit_max: u64,
    /// How the reference of a pod's `image` must begin, so that pods do not take each other's names; pods may set none if
    /// this is empty.
    pub pod_image_prefix: String,
}

/// The options of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) leave_running: bool,
    pub(crate) criu: CriuOptions,
    pub(crate) volumes: Vec<String>,
    pub(crate) dev_shm: bool,
    pub(crate) log: bool,
    pub(crate) keep_criu_log: bool,
    pub(crate) profile: Profile,
    pub(crate) image: Option<String>,
    codec: Codec,
    level: i32,
    threads: u32,
}

/// How archives are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    None,
    Zstd,
    Lz4,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            leave_running: true,
            criu: CriuOptions::default(),
            volumes: Vec::new(),
            dev_shm: true,
            log: true,
            keep_criu_log: true,
            profile: Profile::default(),
            image: None,
            codec: Codec::None,
            level: ZSTD_LEVEL,
            threads: THREADS,
        }
    }
}

impl CheckpointPolicy {
    /// Complains of a name or value that a configuration may not have.
    ///
    /// # Errors
    /// In words that name it.
    pub fn check(&self) -> std::result::Result<(), String> {
        Settings::default().set_all(&self.defaults).map_err(|error| error.to_string())?;
        match self.pod_options.iter().find(|name| !is_known(name)) {
            Some(name) => Err(unknown(name).to_string()),
            None => Ok(()),
        }
    }
}

impl Settings {
    /// Puts together what the handler's configuration, the pod's annotations and the caller say; the last one wins.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown name or a wrong value, `PermissionDenied` for what pods may not set.
    pub(crate) fn resolve(
        policy: &CheckpointPolicy,
        annotations: &HashMap<String, String>,
        asked: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut settings = Self::default();
        settings.set_all(&policy.defaults)?;
        let mut of_pod: Vec<_> = annotations.iter().collect();
        of_pod.sort();
        for (key, value) in of_pod {
            if let Some(name) = key.strip_prefix(ANNOTATION_PREFIX) {
                allow_pod(policy, name, value)?;
                settings.set(name, value).map_err(|error| error.context(format_args!("annotation {key}")))?;
            }
        }
        for (name, value) in asked {
            settings.set(name, value)?;
        }
        settings.check()
    }

    /// How the archive is compressed.
    pub(crate) fn compression(&self) -> Compression {
        match self.codec {
            Codec::None => Compression::None,
            Codec::Zstd => Compression::Zstd { level: self.level, threads: self.threads },
            Codec::Lz4 => Compression::Lz4,
        }
    }

    fn set_all(&mut self, options: &[String]) -> Result<()> {
        options.iter().try_for_each(|option| {
            let (name, value) = split_option(option);
            self.set(name, value)
        })
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let on = || switch(name, value);
        match name {
            "leave-running" => self.leave_running = on()?,
            "file-locks" => self.criu.file_locks = on()?,
            "tcp-established" => self.criu.tcp_established = on()?,
            "tcp-close" => self.criu.tcp_close = on()?,
            "skip-in-flight" => self.criu.skip_in_flight = on()?,
            "link-remap" => self.criu.link_remap = on()?,
            "shell-job" => self.criu.shell_job = on()?,
            "ext-unix-sk" => self.criu.external_unix_sockets = on()?,
            "ghost-limit" => self.criu.ghost_limit = Some(number(name, value, 0..=u64::MAX)?),
            "record-cgroups" => self.criu.record_cgroups = on()?,
            "ignore-mounts" => self.criu.skip_mounts = paths(name, value)?,
            "include-volumes" => self.volumes = paths(name, value)?,
            "include-dev-shm" => self.dev_shm = on()?,
            "include-log" => self.log = on()?,
            "keep-criu-log" => self.keep_criu_log = on()?,
            "compression" => {
                self.codec = word(name, value, &[("none", Codec::None), ("zstd", Codec::Zstd), ("lz4", Codec::Lz4)])?;
            }
            "compression-level" => self.level = number(name, value, ZSTD_LEVELS)?,
            "compression-threads" => self.threads = number(name, value, 0..=THREADS_MAX)?,
            "image" => {
                stasis_image::check_new_reference(value)?;
                self.image = Some(value.to_owned());
            }
            "profile" => {
                let profiles = [("containerd", Profile::Containerd), ("cri-o", Profile::CriO)];
                self.profile = word(name, value, &profiles)?;
            }
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    /// Whether what is written can become an image.
    ///
    /// # Errors
    /// If layers of images cannot be compressed like that.
    pub(crate) fn check_for_image(&self) -> Result<()> {
        match self.codec {
            Codec::Lz4 => {
                Err(Error::invalid("compression=lz4 is for archives; an image's layer may have zstd, or none"))
            }
            Codec::None | Codec::Zstd => Ok(()),
        }
    }

    /// Options that exclude each other.
    fn check(self) -> Result<Self> {
        if self.image.is_some() {
            self.check_for_image()?;
        }
        if self.criu.tcp_established && self.criu.tcp_close {
            return Err(Error::invalid(
                "tcp-established and tcp-close exclude each other: connections are kept or closed",
            ));
        }
        Ok(self)
    }
}

/// `NAME=VALUE`; a name alone is switched on.
pub(crate) fn split_option(option: &str) -> (&str, &str) {
    option.split_once('=').unwrap_or((option, "true"))
}

fn is_known(name: &str) -> bool {
    OPTIONS.iter().any(|(known, _)| *known == name)
}

fn unknown(name: &str) -> Error {
    let known: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
    Error::invalid(format!("there is no checkpoint option {name:?}; there are: {}", known.join(", ")))
}

fn allow_pod(policy: &CheckpointPolicy, name: &str, value: &str) -> Result<()> {
    if !is_known(name) {
        return Err(unknown(name));
    }
    let refuse = |why: String| Err(Error::new(Kind::PermissionDenied, why));
    if !policy.pod_options.iter().any(|allowed| allowed == name) {
        return refuse(format!(
            "the pod's annotation {ANNOTATION_PREFIX}{name} is refused: its runtime handler lets pods set {:?} \
             (`checkpoint_pod_options`)",
            policy.pod_options
        ));
    }
    let prefix = &policy.pod_image_prefix;
    if name == "image" && (prefix.is_empty() || !value.starts_with(prefix.as_str())) {
        return refuse(format!(
            "the pod's annotation {ANNOTATION_PREFIX}image names {value:?}; its runtime handler takes references that \
             begin with {prefix:?} (`checkpoint_pod_image_prefix`; none if that is empty)"
        ));
    }
    let bytes = value.parse::<u64>().unwrap_or_default();
    if name == "ghost-limit" && bytes > policy.pod_ghost_limit_max {
        return refuse(format!(
            "the pod's annotation {ANNOTATION_PREFIX}{name} asks for {bytes} bytes; its runtime handler allows {} \
             (`checkpoint_pod_ghost_limit_max`)",
            policy.pod_ghost_limit_max
        ));
    }
    Ok(())
}

fn switch(name: &str, value: &str) -> Result<bool> {
    word(name, value, &[("true", true), ("false", false)])
}

fn word<T: Copy>(name: &str, value: &str, words: &[(&str, T)]) -> Result<T> {
    words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        Error::invalid(format!("checkpoint option {name}: {value:?} is not one of {}", words.join(", ")))
    })
}

fn number<T>(name: &str, value: &str, range: std::ops::RangeInclusive<T>) -> Result<T>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    value.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
        Error::invalid(format!(
            "checkpoint option {name}: {value:?} is no number from {} to {}",
            range.start(),
            range.end()
        ))
    })
}

fn paths(name: &str, value: &str) -> Result<Vec<String>> {
    let paths: Vec<String> = value.split(',').filter(|path| !path.is_empty()).map(str::to_owned).collect();
    match paths.iter().find(|path| !path.starts_with('/')) {
        Some(path) => Err(Error::invalid(format!("checkpoint option {name}: {path:?} is no absolute path"))),
        None => Ok(paths),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(pod_options: &[&str]) -> CheckpointPolicy {
        CheckpointPolicy {
            defaults: vec!["ghost-limit=100".into()],
            pod_options: pod_options.iter().map(|name| (*name).to_owned()).collect(),
            pod_ghost_limit_max: 1 << 20,
            pod_image_prefix: "registry.local/checkpoints/".into(),
        }
    }

    fn resolve(policy: &CheckpointPolicy, pod: &[(&str, &str)], asked: &[(&str, &str)]) -> Result<Settings> {
        let pod = pod.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let asked = asked.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Settings::resolve(policy, &pod, &asked)
    }

    #[test]
    fn every_option_is_known_by_the_name_that_it_is_documented_with() {
        for (name, _) in OPTIONS {
            let values = ["true", "1", "none", "containerd", "/a,/b", "localhost/a:1"];
            let set = values.iter().filter(|value| Settings::default().set(name, value).is_ok()).count();
            assert!(set > 0, "{name}");
        }
    }

    #[test]
    fn the_caller_comes_before_the_pod_and_the_pod_before_the_configuration() {
        let policy = policy(&["ghost-limit", "file-locks"]);
        let of = |settings: Result<Settings>| settings.unwrap().criu.ghost_limit;
        assert_eq!(of(resolve(&policy, &[], &[])), Some(100));
        let pod = [("checkpoint.stasis/ghost-limit", "200"), ("other.stasis/ghost-limit", "x")];
        assert_eq!(of(resolve(&policy, &pod, &[])), Some(200));
        assert_eq!(of(resolve(&policy, &pod, &[("ghost-limit", "99999999")])), Some(99_999_999));
    }

    #[test]
    fn what_may_not_be_asked_is_refused_by_name() {
        let narrow = policy(&["file-locks", "ghost-limit"]);
        let check = |pod: &[(&str, &str)], asked: &[(&str, &str)], kind, words: &str| {
            let error = resolve(&narrow, pod, asked).unwrap_err();
            assert!(error.kind() == kind && error.to_string().contains(words), "{pod:?} {asked:?}: {error}");
        };
        let denied = Kind::PermissionDenied;
        check(&[("checkpoint.stasis/tcp-established", "true")], &[], denied, "checkpoint.stasis/tcp-established");
        check(&[("checkpoint.stasis/ghost-limit", "1048577")], &[], denied, "1048577");
        let with_image = policy(&["image"]);
        let image = |reference: &str| resolve(&with_image, &[("checkpoint.stasis/image", reference)], &[]);
        assert!(image("registry.local/checkpoints/a:1").unwrap().image.is_some());
        assert_eq!(image("docker.io/library/nginx:latest").unwrap_err().kind(), denied);
        let invalid = Kind::InvalidArgument;
        check(&[("checkpoint.stasis/config", "/etc/evil")], &[], invalid, "no checkpoint option \"config\"");
        check(&[("checkpoint.stasis/file-locks", "yes")], &[], invalid, "annotation checkpoint.stasis/file-locks");
        check(&[], &[("action-script", "/bin/sh")], invalid, "action-script");
        check(&[], &[("compression-level", "20")], invalid, "-7 to 19");
        check(&[], &[("compression", "lz4"), ("image", "localhost/a:1")], invalid, "is for archives");
        check(&[], &[("ignore-mounts", "data")], invalid, "no absolute path");
        check(&[], &[("tcp-established", "true"), ("tcp-close", "true")], invalid, "exclude");
    }

    #[test]
    fn a_configuration_is_checked_when_it_is_read() {
        policy(&["file-locks"]).check().unwrap();
        assert!(policy(&["org.criu.config"]).check().unwrap_err().contains("org.criu.config"));
        let defaults = vec!["tcp-established".to_owned(), "profile=podman".to_owned()];
        assert!(CheckpointPolicy { defaults, ..policy(&[]) }.check().unwrap_err().contains("podman"));
    }
}
