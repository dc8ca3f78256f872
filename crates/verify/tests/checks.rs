//! Each check against a real checkpoint that was changed to break it.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use prost::Message;
use serde_json::{Value, json};
use stasis_checkpoint::Member;
use stasis_criu_image::messages;
use stasis_verify::check::check;
use stasis_verify::{Grant, Host, Members, Plan, Reason, Refusal};

/// Sizes of the memory of the recorded dump of a container.
const PAGES: [u64; 5] = [73728, 73728, 69632, 69632, 65536];

/// A recorded checkpoint of a container with the default confinement, and the request that it was made by.
#[derive(Clone)]
struct Case {
    files: BTreeMap<String, Vec<u8>>,
    spec: Value,
    host: Host,
}

impl Case {
    fn recorded() -> Case {
        let crates = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(crates.join("criu-image/tests/data/container")).unwrap() {
            let entry = entry.unwrap();
            let name = format!("checkpoint/{}", entry.file_name().to_str().unwrap());
            files.insert(name, fs::read(entry.path()).unwrap());
        }
        let descriptors = br#"["/dev/null","pipe:[4119030]","pipe:[4119031]"]"#;
        files.insert("checkpoint/descriptors.json".to_owned(), descriptors.to_vec());
        for name in ["spec.dump", "config.dump"] {
            files.insert(name.to_owned(), fs::read(crates.join("verify/tests/data").join(name)).unwrap());
        }
        let spec = serde_json::from_slice(&files["spec.dump"]).unwrap();
        // What the kernel of the recording did not have.
        let absent = [
            "/proc/asound",
            "/proc/kcore",
            "/proc/latency_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/proc/timer_stats",
            "/sys/devices/virtual/powercap",
            "/proc/sysrq-trigger",
        ];
        Case { files, spec, host: Host { limits: Vec::new(), absent: absent.map(str::to_owned).into() } }
    }

    fn verify(&self) -> Result<Plan, Refusal> {
        let mut members = Members::default();
        for (name, content) in &self.files {
            members.add(&Member::parse(name).unwrap(), content.len() as u64, content.as_slice())?;
        }
        for (at, size) in PAGES.iter().enumerate() {
            let name = format!("checkpoint/pages-{}.img", at + 1);
            members.add(&Member::parse(&name).unwrap(), *size, std::io::empty())?;
        }
        check(&members.finish()?, Some(&Grant::of_spec(&self.spec, &self.host).unwrap()))
    }

    /// Changes an entry of an image.
    fn edit<M: Message + Default>(&mut self, name: &str, entry: usize, change: impl FnOnce(&mut M)) {
        let content = self.files.get_mut(&format!("checkpoint/{name}")).unwrap();
        let mut at = if name == "inventory.img" { 4 } else { 8 };
        let length = |content: &[u8], at: usize| u32::from_le_bytes(content[at..at + 4].try_into().unwrap()) as usize;
        for _ in 0..entry {
            at += 4 + length(content, at);
        }
        let end = at + 4 + length(content, at);
        let mut message = M::decode(&content[at + 4..end]).unwrap();
        change(&mut message);
        let new = message.encode_to_vec();
        let mut framed = u32::try_from(new.len()).unwrap().to_le_bytes().to_vec();
        framed.extend(new);
        content.splice(at..end, framed);
    }

    /// Changes the mount at a place.
    fn mount(&mut self, place: &str, change: impl FnOnce(&mut messages::MntEntry)) {
        let content = &self.files["checkpoint/mountpoints-12.img"];
        let mut at = 8;
        for entry in 0.. {
            let length = u32::from_le_bytes(content[at..at + 4].try_into().unwrap()) as usize;
            let mount = messages::MntEntry::decode(&content[at + 4..at + 4 + length]).unwrap();
            if mount.mountpoint == place {
                return self.edit("mountpoints-12.img", entry, change);
            }
            at += 4 + length;
        }
    }

    fn credentials(&mut self, change: impl FnOnce(&mut messages::CredsEntry)) {
        self.edit("core-8.img", 0, |core: &mut messages::CoreEntry| {
            change(core.thread_core.as_mut().unwrap().creds.as_mut().unwrap());
        });
    }

    fn file(&mut self, change: impl FnOnce(&mut messages::FileEntry)) {
        self.edit("files.img", 0, change);
    }

    fn add_image(&mut self, name: &str, kind: u32, message: &impl Message) {
        let bytes = message.encode_to_vec();
        let mut content = 0x5456_4319u32.to_le_bytes().to_vec();
        content.extend(kind.to_le_bytes());
        content.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        content.extend(bytes);
        self.files.insert(format!("checkpoint/{name}"), content);
    }
}

#[track_caller]
fn refused(reason: Reason, change: impl FnOnce(&mut Case)) {
    let mut case = Case::recorded();
    change(&mut case);
    let refusal = case.verify().expect_err("it was accepted");
    assert_eq!(refusal.reason, reason, "{refusal}");
}

#[test]
fn a_checkpoint_fits_the_request_that_it_was_made_by() {
    let plan = Case::recorded().verify().unwrap();
    assert_eq!((plan.processes, plan.memory), (5, PAGES.iter().sum()));
    assert_eq!(plan.threads.len(), 5);
    assert!(plan.threads.iter().all(|thread| thread.seccomp == 2 && thread.filters == 1));
    assert_eq!(plan.descriptors[0], (1, vec![0, 1, 2, 5, 7, 10]));
}

#[test]
fn json_of_two_meanings_is_refused() {
    refused(Reason::JsonMalformed, |case| {
        drop(case.files.insert("config.dump".into(), br#"{"id":"a","id":"b"}"#.to_vec()))
    });
}

/// What CVE-2024-8676 did: mounts out of the archive.
#[test]
fn mounts_are_the_requests() {
    let mounts = |case: &mut Case| case.spec["mounts"].as_array_mut().unwrap().clone();
    refused(Reason::MountExtra, |case| {
        let kept: Vec<Value> = mounts(case).into_iter().filter(|mount| mount["destination"] != "/etc/hosts").collect();
        case.spec["mounts"] = kept.into();
    });
    refused(Reason::MountMissing, |case| {
        let mut mounts = mounts(case);
        mounts.push(json!({"destination": "/var/run/secrets", "type": "bind", "options": ["rbind", "ro"]}));
        case.spec["mounts"] = mounts.into();
    });
    refused(Reason::MountFlags, |case| {
        let mut mounts = mounts(case);
        mounts[6]["options"] = json!(["rbind", "ro"]);
        case.spec["mounts"] = mounts.into();
    });
    refused(Reason::MountFlags, |case| case.mount("/sys", |mount| (mount.flags, mount.sb_flags) = (0x20_000e, None)));
    refused(Reason::MountExternal, |case| {
        case.mount("/etc/hosts", |mount| mount.ext_key = Some("/etc/hostname".into()))
    });
    refused(Reason::MountExternal, |case| case.mount("/", |mount| mount.ext_key = Some("/etc/hosts".into())));
    refused(Reason::MountType, |case| case.mount("/etc/hosts", |mount| mount.ext_key = None));
    refused(Reason::MountType, |case| case.mount("/proc", |mount| mount.fstype = messages::Fstype::Tmpfs as u32));
    refused(Reason::MountTwice, |case| case.mount("/dev/mqueue", |mount| mount.mountpoint = "/proc".into()));
    refused(Reason::MountPropagation, |case| case.mount("/etc/hosts", |mount| mount.master_id = Some(7)));
    refused(Reason::MountExtra, |case| case.mount("/sys/firmware", |mount| mount.mountpoint = "/etc/../sys".into()));
}

#[test]
fn what_must_be_masked_is_masked() {
    refused(Reason::MountUnmasked, |case| assert!(case.host.absent.remove("/proc/kcore")));
    refused(Reason::MountUnmasked, |case| assert!(case.host.absent.remove("/proc/sysrq-trigger")));
    // Proc's own file in place of the mask.
    refused(Reason::MountExtra, |case| {
        case.mount("/proc/keys", |mount| {
            (mount.fstype, mount.root, mount.ext_key) = (messages::Fstype::Proc as u32, "/keys".into(), None);
            mount.flags = 0;
        })
    });
    refused(Reason::MountFlags, |case| case.mount("/sys/fs/cgroup/devices", |mount| mount.flags = 0));
}

#[test]
fn images_that_contradict_each_other_are_refused() {
    refused(Reason::ImageRefused, |case| drop(case.files.remove("checkpoint/core-9.img")));
    refused(Reason::ImageRefused, |case| {
        case.edit("pagemap-1.img", 2, |run: &mut messages::PagemapEntry| run.vaddr = 0)
    });
}

#[test]
fn users_and_groups_are_the_requests() {
    // Root with the default capabilities may become anybody; a user may not.
    let mut switched = Case::recorded();
    switched.credentials(|creds| (creds.uid, creds.gid) = (33, 33));
    switched.verify().unwrap();
    let user = |case: &mut Case| {
        case.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [0]});
        for pid in [1, 8, 9, 10, 11] {
            case.edit(&format!("core-{pid}.img"), 0, |core: &mut messages::CoreEntry| {
                let creds = core.thread_core.as_mut().unwrap().creds.as_mut().unwrap();
                *creds = messages::CredsEntry {
                    uid: 1000,
                    gid: 1000,
                    euid: 1000,
                    egid: 1000,
                    suid: 1000,
                    sgid: 1000,
                    fsuid: 1000,
                    fsgid: 1000,
                    cap_bnd: creds.cap_bnd.clone(),
                    groups: vec![0],
                    ..Default::default()
                };
            });
        }
    };
    let mut case = Case::recorded();
    user(&mut case);
    case.verify().unwrap();
    refused(Reason::UserWider, |case| {
        user(case);
        case.credentials(|creds| creds.suid = 0);
    });
    refused(Reason::GroupWider, |case| {
        user(case);
        case.credentials(|creds| creds.egid = 4);
    });
    refused(Reason::GroupWider, |case| {
        user(case);
        case.credentials(|creds| creds.groups.push(4));
    });
    // A user has none of root's capabilities, whatever the bounding set.
    refused(Reason::CapabilityWider, |case| {
        user(case);
        case.credentials(|creds| creds.cap_prm = vec![1, 0]);
    });
}

#[test]
fn capabilities_are_no_wider() {
    const SYS_ADMIN: u32 = 1 << 21;
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_eff[0] |= SYS_ADMIN));
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_prm[0] |= SYS_ADMIN));
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_bnd[0] |= SYS_ADMIN));
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_inh[0] |= SYS_ADMIN));
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_amb[0] |= 1));
    refused(Reason::CapabilityWider, |case| case.credentials(|creds| creds.cap_bnd[1] |= 1 << 31));
    refused(Reason::CapabilityWider, |case| case.spec["process"]["capabilities"]["bounding"] = json!(["CAP_CHOWN"]));
}

#[test]
fn confinement_is_no_weaker() {
    refused(Reason::NewPrivileges, |case| case.spec["process"]["noNewPrivileges"] = json!(true));
    refused(Reason::SeccompWider, |case| {
        case.edit("core-9.img", 0, |core: &mut messages::CoreEntry| {
            let thread = core.thread_core.as_mut().unwrap();
            (thread.seccomp_mode, thread.seccomp_filter) = (None, None);
        })
    });
    refused(Reason::LabelDiffers, |case| case.credentials(|creds| creds.lsm_profile = Some("unconfined".into())));
    refused(Reason::LabelDiffers, |case| case.spec["process"]["apparmorProfile"] = json!("default"));
    refused(Reason::LimitWider, |case| {
        case.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}]);
    });
    refused(Reason::LimitWider, |case| {
        case.host.limits = vec![u64::MAX; 16];
        case.host.limits[8] = 65536;
    });
    refused(Reason::PriorityWider, |case| case.spec["process"]["oomScoreAdj"] = json!(500));
    refused(Reason::PriorityWider, |case| {
        case.edit("core-1.img", 0, |core: &mut messages::CoreEntry| {
            core.thread_core.as_mut().unwrap().sched_policy = Some(1);
        })
    });
}

#[test]
fn namespaces_are_the_requests() {
    let ids = |change: fn(&mut messages::TaskKobjIdsEntry)| move |case: &mut Case| case.edit("ids-9.img", 0, change);
    refused(Reason::NamespaceDiffers, ids(|ids| ids.mnt_ns_id = Some(6)));
    refused(Reason::NamespaceDiffers, ids(|ids| ids.user_ns_id = Some(99)));
    refused(Reason::NamespaceDiffers, |case| {
        case.edit("inventory.img", 0, |inventory: &mut messages::InventoryEntry| {
            inventory.root_ids.as_mut().unwrap().pid_ns_id = Some(9);
        })
    });
    refused(Reason::NamespaceDescriptor, |case| {
        let entry = messages::FileEntry {
            r#type: messages::FdTypes::Ns.into(),
            id: 900,
            nsf: Some(messages::NsFileEntry { id: 900, ns_id: 1, ns_cflag: 0x2000_0000, flags: 0 }),
            ..Default::default()
        };
        let bytes = entry.encode_to_vec();
        let files = case.files.get_mut("checkpoint/files.img").unwrap();
        files.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        files.extend(bytes);
    });
}

#[test]
fn no_image_makes_objects_of_the_kernel() {
    refused(Reason::KernelObject, |case| {
        case.add_image("apparmor.img", 0x5942_3047, &messages::ApparmorEntry::default())
    });
    refused(Reason::KernelObject, |case| {
        case.add_image(
            "binfmt-misc.img",
            0x6734_3323,
            &messages::BinfmtMiscEntry { name: "x".into(), ..Default::default() },
        );
    });
    for name in ["iptables-2.img", "nftables-2.img", "route-2.img", "rule-2.img", "ifaddr-2.img"] {
        refused(Reason::NetworkConfiguration, |case| {
            drop(case.files.insert(format!("checkpoint/{name}"), b"*nat".to_vec()))
        });
    }
}

#[test]
fn no_control_group_is_written_to() {
    let property = |name: &str| messages::CgroupDirEntry {
        dir_name: "/".into(),
        children: vec![messages::CgroupDirEntry {
            dir_name: "a".into(),
            properties: vec![messages::CgroupPropEntry { name: name.into(), value: "a *:* rwm".into(), perms: None }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut case = Case::recorded();
    case.edit("cgroup.img", 0, |cgroup: &mut messages::CgroupEntry| {
        cgroup.controllers[0].dirs.push(property("devices.allow"))
    });
    assert_eq!(case.verify().unwrap_err().reason, Reason::CgroupProperties);
}

#[test]
fn files_are_the_containers_own() {
    let reg = |change: fn(&mut messages::RegFileEntry)| {
        move |case: &mut Case| case.file(|file| change(file.reg.as_mut().unwrap()))
    };
    refused(Reason::PathOutside, reg(|file| file.name = "/../etc/shadow".into()));
    refused(Reason::PathOutside, reg(|file| file.name = "etc/shadow".into()));
    refused(Reason::PathOutside, reg(|file| file.name = "/proc/4711/root/etc/shadow".into()));
    refused(Reason::FileExternal, reg(|file| file.ext = Some(true)));
    refused(Reason::GhostTooLarge, |case| {
        let ghost = case.files.get_mut("checkpoint/ghost-file-1.img").unwrap();
        ghost.extend(vec![0; 2 << 20]);
    });
    refused(Reason::GhostDevice, |case| {
        case.edit("ghost-file-1.img", 0, |ghost: &mut messages::GhostFileEntry| ghost.mode = 0o060_644);
    });
    refused(Reason::LinkRemap, |case| {
        case.edit("remap-fpath.img", 0, |remap: &mut messages::RemapFilePathEntry| {
            (remap.remap_type, remap.remap_id) = (Some(messages::RemapType::Linked.into()), 1);
        })
    });
    for bad in [r#"["a","b","c","d"]"#, r#"["pipe:[1]"]"#, r#"{"a":1}"#, r#"["extRootNetNS:x"]"#] {
        let bad = bad.as_bytes().to_vec();
        refused(Reason::DescriptorsMalformed, move |case| {
            drop(case.files.insert("checkpoint/descriptors.json".into(), bad))
        });
    }
}

/// An archive of a file system in memory, packed with one entry.
fn tarball(name: &str, kind: u8, link: &str, device: [u32; 2]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..136].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar  \0");
    for (at, number) in [(329, device[0]), (337, device[1])] {
        header[at..at + 8].copy_from_slice(format!("{number:07o}\0").as_bytes());
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&header).unwrap();
    packed.write_all(&[0; 1024]).unwrap();
    packed.finish().unwrap()
}

#[test]
fn archives_of_file_systems_in_memory_stay_inside() {
    let put = |content: Vec<u8>| {
        move |case: &mut Case| drop(case.files.insert("checkpoint/tmpfs-dev-53.tar.gz.img".into(), content))
    };
    let mut good = Case::recorded();
    put(tarball("./null", b'3', "", [1, 3]))(&mut good);
    good.verify().unwrap();
    for bad in [
        tarball("../etc/x", b'0', "", [0, 0]),
        tarball("/etc/x", b'0', "", [0, 0]),
        tarball("./x", b'1', "etc/shadow", [0, 0]),
        tarball("./disk", b'4', "", [8, 0]),
        tarball("./mem", b'3', "", [1, 1]),
        tarball("./x", b'M', "", [0, 0]),
        b"no archive".to_vec(),
    ] {
        refused(Reason::TarRefused, put(bad));
    }
    refused(Reason::TarRefused, |case| {
        drop(case.files.insert("checkpoint/tmpfs-dev-4711.tar.gz.img".into(), tarball("./x", b'0', "", [0, 0])));
    });
}

#[test]
fn what_this_host_cannot_run_is_told_before() {
    refused(Reason::ImageVersion, |case| {
        case.edit("inventory.img", 0, |inventory: &mut messages::InventoryEntry| inventory.img_version = 3)
    });
    refused(Reason::SecurityModule, |case| {
        case.edit("inventory.img", 0, |inventory: &mut messages::InventoryEntry| inventory.lsmtype = Some(2))
    });
    refused(Reason::MemoryLimit, |case| case.spec["linux"]["resources"]["memory"] = json!({"limit": 100_000}));
    refused(Reason::ProcessLimit, |case| case.spec["linux"]["resources"]["pids"] = json!({"limit": 6}));
    refused(Reason::Architecture, |case| {
        case.edit("core-1.img", 0, |core: &mut messages::CoreEntry| {
            core.mtype = messages::core_entry::March::S390.into()
        });
    });
}

#[test]
fn reasons_have_stable_names_of_their_own() {
    let codes =
        [Reason::MountExtra, Reason::CapabilityWider, Reason::SeccompWider, Reason::ImageRefused].map(Reason::code);
    assert_eq!(codes, ["mount_extra", "capability_wider", "seccomp_wider", "image_refused"]);
    assert_eq!(codes.into_iter().collect::<BTreeSet<_>>().len(), 4);
}
