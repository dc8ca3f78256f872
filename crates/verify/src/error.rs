//! Why a checkpoint is refused, and what can go wrong besides.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The checks, by their number in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// 1: where the archive comes from, and whether restores are allowed.
    Provenance = 1,
    /// 2: the form of the archive.
    Form,
    /// 3: space.
    Space,
    /// 4: JSON members.
    Json,
    /// 5: the base image.
    BaseImage,
    /// 6: mounts.
    Mounts,
    /// 7: CRIU's images, each and together.
    Images,
    /// 8: users, capabilities, seccomp, labels, limits.
    Privilege,
    /// 9: namespaces and objects of the kernel.
    Namespaces,
    /// 10: control groups.
    Cgroups,
    /// 11: files.
    Files,
    /// 12: log and generated files.
    Logs,
    /// 13: whether this host can run it.
    Compatibility,
    /// 14: the writable layer.
    Layer,
    /// 15: what came up, against the plan.
    ReadBack,
}

macro_rules! reasons {
    ($($check:ident: $($name:ident $code:literal)*;)*) => {
        /// Why a checkpoint is refused; the names are stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[allow(missing_docs, reason = "the names say it, and the message does in full")]
        pub enum Reason {
            $($(#[serde(rename = $code)] $name,)*)*
        }

        impl Reason {
            /// The stable name.
            pub fn code(self) -> &'static str {
                match self { $($(Self::$name => $code,)*)* }
            }

            /// The check that found it.
            pub fn check(self) -> Check {
                match self { $($(Self::$name => Check::$check,)*)* }
            }
        }
    };
}

reasons! {
    Form: ArchiveForm "archive_form" VerifierLimits "verifier_limits";
    Json: JsonMalformed "json_malformed";
    Mounts: MountExtra "mount_extra" MountMissing "mount_missing" MountType "mount_type" MountFlags "mount_flags"
        MountTwice "mount_twice" MountUnmasked "mount_unmasked" MountExternal "mount_external"
        MountPropagation "mount_propagation";
    Images: ImageRefused "image_refused";
    Privilege: UserWider "user_wider" GroupWider "group_wider" CapabilityWider "capability_wider"
        NewPrivileges "new_privileges" SeccompWider "seccomp_wider" LabelDiffers "label_differs" LimitWider "limit_wider"
        PriorityWider "priority_wider";
    Namespaces: NamespaceDiffers "namespace_differs" NamespaceDescriptor "namespace_descriptor"
        KernelObject "kernel_object" NetworkConfiguration "network_configuration";
    Cgroups: CgroupProperties "cgroup_properties";
    Files: PathOutside "path_outside" FileExternal "file_external" GhostTooLarge "ghost_too_large"
        GhostDevice "ghost_device" LinkRemap "link_remap" UnixExternal "unix_external" TarRefused "tar_refused"
        DescriptorsMalformed "descriptors_malformed";
    Compatibility: Architecture "architecture" ImageVersion "image_version" MemoryLimit "memory_limit"
        ProcessLimit "process_limit" TcpEstablished "tcp_established" SecurityModule "security_module";
}

/// A checkpoint is not restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why, for programs.
    pub reason: Reason,
    /// The member, process, mount or file that it is about.
    pub object: String,
    /// Why, for people.
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, object: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason, object: object.into(), message: message.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, code) = (self.reason.check() as u8, self.reason.code());
        write!(f, "check {number}, {code}: {}: {}", self.object, self.message)
    }
}

/// What can go wrong with the verification itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be understood.
    #[error("the OCI specification of the request cannot be compared with a checkpoint: {0}")]
    Grant(String),
    /// The helper could not be run.
    #[error("the verifier {program} {why}")]
    Helper {
        /// Its program.
        program: String,
        /// What happened.
        why: String,
    },
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
