//! Who the first process runs as: CRI's user fields, the image's `User`, and the image's account files.
//!
//! The account files come out of an image, so they are a stranger's claim: they are parsed strictly, and a line that
//! is not well formed is as good as absent. A number in the request or in `User` is always that number, never the
//! name of an account: an image may well hold an account named `1000` with the ID 0.

use stasis_cri_api::runtime::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use super::error::{Result, SpecError};

/// Longest `/etc/passwd` or `/etc/group` that is read, in bytes. Real ones are a few KiB; a hostile image may hold
/// a gigabyte (CVE-2025-58183).
pub const ACCOUNT_FILE_MAX: usize = 1 << 20;

/// Most supplementary groups of a process: NGROUPS_MAX of the kernel (setgroups(2)).
const GROUPS_MAX: usize = 65536;

/// The image's user, in error texts.
const IMAGE_USER: &str = "image config.User";

/// User, group and supplementary groups of a process. The primary group is always among the supplementary ones, so
/// that dropping it does not get round a group's lack of permission (CVE-2022-36109).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

/// A decimal ID as it is written in account files and images: digits only, no sign, no leading zero, below
/// `u32::MAX`, which the kernel takes for "no change".
pub(super) fn parse_id(text: &str) -> Option<u32> {
    let canonical =
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if !canonical {
        return None;
    }
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn is_numeric(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// An ID that came as CRI's int64.
pub(super) fn id_of(field: &str, value: i64) -> Result<u32> {
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
        SpecError::invalid(field, format!("{value} is not an ID: give a number from 0 to {}", u32::MAX - 1))
    })
}

#[derive(Debug, PartialEq, Eq)]
struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

#[derive(Debug, PartialEq, Eq)]
struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn lines<'a>(file: &str, bytes: Option<&'a [u8]>) -> Result<impl Iterator<Item = &'a str> + use<'a>> {
    let bytes = bytes.unwrap_or_default();
    if bytes.len() > ACCOUNT_FILE_MAX {
        return Err(SpecError::invalid(
            "image",
            format!("{file} of the image is larger than {ACCOUNT_FILE_MAX} bytes"),
        ));
    }
    Ok(bytes.split(|b| *b == b'\n').filter_map(|line| std::str::from_utf8(line).ok()))
}

/// passwd(5): `name:password:UID:GID:GECOS:directory:shell`.
fn passwd_entry(line: &str) -> Option<PasswdEntry<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    match fields[..] {
        [name, _, uid, gid, _, _, _] if !name.is_empty() => {
            Some(PasswdEntry { name, uid: parse_id(uid)?, gid: parse_id(gid)? })
        }
        _ => None,
    }
}

/// group(5): `group_name:password:GID:user_list`.
fn group_entry(line: &str) -> Option<GroupEntry<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    match fields[..] {
        [name, _, gid, members] if !name.is_empty() => Some(GroupEntry { name, gid: parse_id(gid)?, members }),
        _ => None,
    }
}

/// The account files of an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct AccountFiles<'a> {
    pub(super) passwd: Option<&'a [u8]>,
    pub(super) group: Option<&'a [u8]>,
}

impl<'a> AccountFiles<'a> {
    fn user(self, wanted: impl Fn(&PasswdEntry<'a>) -> bool) -> Result<Option<PasswdEntry<'a>>> {
        Ok(lines("/etc/passwd", self.passwd)?.filter_map(passwd_entry).find(wanted))
    }

    fn group_named(self, name: &str) -> Result<Option<u32>> {
        let mut entries = lines("/etc/group", self.group)?.filter_map(group_entry);
        Ok(entries.find(|g| g.name == name).map(|g| g.gid))
    }

    fn groups_of(self, user: &str) -> Result<Vec<u32>> {
        let entries = lines("/etc/group", self.group)?.filter_map(group_entry);
        Ok(entries.filter(|g| g.members.split(',').any(|m| m == user)).map(|g| g.gid).collect())
    }
}

/// What a request or an image says of a user, before the account files are asked.
enum Wanted<'a> {
    Id(u32),
    Name { field: &'static str, name: &'a str },
}

impl<'a> Wanted<'a> {
    /// A user of an image's `User`: a number or a name.
    fn of_image(text: &'a str) -> Result<Self> {
        match parse_id(text) {
            Some(uid) => Ok(Self::Id(uid)),
            None if is_numeric(text) => {
                Err(SpecError::invalid(IMAGE_USER, format!("{text:?} is not an ID from 0 to {}", u32::MAX - 1)))
            }
            None => Ok(Self::Name { field: IMAGE_USER, name: text }),
        }
    }
}

/// The account that the first process runs as.
pub(super) fn resolve(
    context: &LinuxContainerSecurityContext,
    image_user: &str,
    files: AccountFiles<'_>,
) -> Result<Account> {
    let (user, image_group) = wanted(context, image_user)?;
    let entry = match &user {
        Wanted::Id(uid) => files.user(|e| e.uid == *uid)?,
        Wanted::Name { field, name } => Some(
            files
                .user(|e| e.name == *name)?
                .ok_or_else(|| SpecError::invalid(*field, format!("no user {name:?} in /etc/passwd of the image")))?,
        ),
    };
    let uid = match user {
        Wanted::Id(uid) => uid,
        Wanted::Name { .. } => entry.as_ref().map_or(0, |e| e.uid),
    };
    let gid = match (&context.run_as_group, image_group) {
        (Some(group), _) => id_of("run_as_group", group.value)?,
        (None, Some(group)) => image_gid(group, files)?,
        (None, None) => entry.as_ref().map_or(0, |e| e.gid),
    };
    let groups = groups(context, gid, entry.as_ref().map(|e| e.name), files)?;
    Ok(Account { uid, gid, groups })
}

/// The user that counts, and the image's group if the user is the image's.
fn wanted<'a>(
    context: &'a LinuxContainerSecurityContext,
    image_user: &'a str,
) -> Result<(Wanted<'a>, Option<&'a str>)> {
    match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(_), name) if !name.is_empty() => {
            Err(SpecError::invalid("run_as_username", "set together with run_as_user: give only one of them"))
        }
        (Some(uid), _) => Ok((Wanted::Id(id_of("run_as_user", uid.value)?), None)),
        (None, name) if !name.is_empty() => Ok((Wanted::Name { field: "run_as_username", name }, None)),
        (None, _) if context.run_as_group.is_some() => {
            Err(SpecError::invalid("run_as_group", "set without run_as_user: give the user, too"))
        }
        (None, _) => match image_user.split_once(':') {
            None if image_user.is_empty() => Ok((Wanted::Id(0), None)),
            None => Ok((Wanted::of_image(image_user)?, None)),
            Some((user, group)) if !user.is_empty() && !group.is_empty() && !group.contains(':') => {
                Ok((Wanted::of_image(user)?, Some(group)))
            }
            Some(_) => Err(SpecError::invalid(IMAGE_USER, format!("{image_user:?} is neither user nor user:group"))),
        },
    }
}

fn image_gid(group: &str, files: AccountFiles<'_>) -> Result<u32> {
    if let Some(gid) = parse_id(group) {
        return Ok(gid);
    }
    let named = if is_numeric(group) { None } else { files.group_named(group)? };
    named.ok_or_else(|| SpecError::invalid(IMAGE_USER, format!("no group {group:?} in /etc/group of the image")))
}

/// The primary group, those of the image (policy Merge), those of the request; each once, in this order.
fn groups(
    context: &LinuxContainerSecurityContext,
    gid: u32,
    name: Option<&str>,
    files: AccountFiles<'_>,
) -> Result<Vec<u32>> {
    let policy = SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy).map_err(|_| {
        let reason = format!("{} is neither Merge nor Strict", context.supplemental_groups_policy);
        SpecError::invalid("supplemental_groups_policy", reason)
    })?;
    let mut all = vec![gid];
    if let (SupplementalGroupsPolicy::Merge, Some(name)) = (policy, name) {
        all.extend(files.groups_of(name)?);
    }
    for group in &context.supplemental_groups {
        all.push(id_of("supplemental_groups", *group)?);
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|g| seen.insert(*g));
    if all.len() > GROUPS_MAX {
        return Err(SpecError::invalid("supplemental_groups", format!("more than {GROUPS_MAX} groups")));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stasis_cri_api::runtime::Int64Value;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        redis:x:101:102:Redis:/var/lib/redis:/usr/sbin/nologin\n\
        1000:x:0:0:trap:/:/bin/sh\n\
        broken:x:7\n\
        wrap:x:4294967296:0::/:/bin/sh\n\
        minus:x:4294967295:0::/:/bin/sh\n\
        signed:x:+5:0::/:/bin/sh\n\
        \xff\xfe:x:9:9::/:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nredis:x:102:\ndisk:x:6:redis,root\nssl:x:110:redis\n";

    fn check(context: &LinuxContainerSecurityContext, image_user: &str) -> Result<Account> {
        resolve(context, image_user, AccountFiles { passwd: Some(PASSWD), group: Some(GROUP) })
    }

    fn image(user: &str) -> Result<Account> {
        check(&LinuxContainerSecurityContext::default(), user)
    }

    #[test]
    fn image_user_in_every_form() {
        let account = |uid, gid, groups: &[u32]| Account { uid, gid, groups: groups.to_vec() };
        assert_eq!(image("").unwrap(), account(0, 0, &[0, 6]));
        assert_eq!(image("redis").unwrap(), account(101, 102, &[102, 6, 110]));
        assert_eq!(image("101").unwrap(), account(101, 102, &[102, 6, 110]));
        assert_eq!(image("redis:disk").unwrap(), account(101, 6, &[6, 110]));
        assert_eq!(image("101:7").unwrap(), account(101, 7, &[7, 6, 110]));
        assert_eq!(image("4242").unwrap(), account(4242, 0, &[0]));
    }

    #[test]
    fn a_number_is_never_a_name() {
        assert_eq!(image("1000").unwrap().uid, 1000);
    }

    #[test]
    fn what_is_not_a_user_is_refused() {
        for user in [
            "wrap",
            "minus",
            "signed",
            "broken",
            "nobody",
            "4294967295",
            "4294967296",
            "18446744073709551616",
            "00",
            "-1",
            "+1",
            "1 ",
            " ",
            ":",
            "redis:",
            ":0",
            "redis:0:0",
            "redis:none",
            "redis:4294967295",
            "redis:01",
        ] {
            assert!(image(user).is_err(), "{user:?} became {:?}", image(user));
        }
    }

    #[test]
    fn request_goes_before_the_image() {
        let mut context =
            LinuxContainerSecurityContext { run_as_user: Some(Int64Value { value: 7 }), ..Default::default() };
        assert_eq!(check(&context, "redis:disk").unwrap(), Account { uid: 7, gid: 0, groups: vec![0] });
        context.run_as_group = Some(Int64Value { value: 8 });
        context.supplemental_groups = vec![9, 8, 9];
        assert_eq!(check(&context, "redis").unwrap(), Account { uid: 7, gid: 8, groups: vec![8, 9] });
        context.run_as_username = "redis".into();
        assert!(check(&context, "").is_err(), "both forms of the user at once");
        context.run_as_user = None;
        assert_eq!(check(&context, "").unwrap(), Account { uid: 101, gid: 8, groups: vec![8, 6, 110, 9] });
        context.run_as_username.clear();
        assert!(check(&context, "").is_err(), "group without user");
    }

    #[test]
    fn strict_policy_ignores_the_group_file() {
        let context = LinuxContainerSecurityContext {
            run_as_username: "redis".into(),
            supplemental_groups: vec![1234],
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..Default::default()
        };
        assert_eq!(check(&context, "").unwrap().groups, [102, 1234]);
    }

    #[test]
    fn huge_account_file_is_refused() {
        let huge = vec![b'\n'; ACCOUNT_FILE_MAX + 1];
        let files = AccountFiles { passwd: Some(&huge), group: None };
        assert!(resolve(&LinuxContainerSecurityContext::default(), "0", files).is_err());
    }

    proptest! {
        #[test]
        fn ids_round_trip_and_nothing_else_parses(id in any::<u64>()) {
            let text = id.to_string();
            let expected = u32::try_from(id).ok().filter(|i| *i != u32::MAX);
            prop_assert_eq!(parse_id(&text), expected);
            prop_assert_eq!(parse_id(&format!("0{text}")), None);
            prop_assert_eq!(parse_id(&format!("+{text}")), None);
            prop_assert_eq!(parse_id(&format!(" {text}")), None);
        }

        #[test]
        fn ids_of_the_request_are_never_wrapped(value in any::<i64>()) {
            match id_of("run_as_user", value) {
                Ok(id) => prop_assert_eq!(i64::from(id), value),
                Err(_) => prop_assert!(value < 0 || value >= i64::from(u32::MAX)),
            }
        }

        /// An image cannot make a user string mean an account that it does not spell.
        #[test]
        fn image_user_means_what_it_says(
            user in "[0-9a-z:+ -]{0,12}",
            passwd in any::<Vec<u8>>(),
            group in any::<Vec<u8>>(),
        ) {
            let files = AccountFiles { passwd: Some(&passwd), group: Some(&group) };
            if let Ok(account) = resolve(&LinuxContainerSecurityContext::default(), &user, files) {
                prop_assert_eq!(account.groups.first(), Some(&account.gid));
                let name = user.split(':').next().unwrap_or_default();
                if let Some(uid) = parse_id(name) {
                    prop_assert_eq!(account.uid, uid);
                } else if name.is_empty() {
                    prop_assert_eq!(account.uid, 0);
                } else {
                    prop_assert!(String::from_utf8_lossy(&passwd).contains(name));
                }
            }
        }
    }
}
