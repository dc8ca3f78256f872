//! Check 8: no thread is more than the request lets the container's processes become.
//!
//! CRIU takes users, capabilities, seccomp filters and limits from the images, whatever the OCI specification says.

use stasis_criu_image::{Credentials, ImageSet, Process, Thread};

use crate::error::{Reason, Refusal};
use crate::grant::{Grant, bit, limit_name, names};

/// Schedulers that do not yield: FIFO, RR, DEADLINE.
const REAL_TIME: [u32; 3] = [1, 2, 6];

pub(super) fn check(images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    for (process, thread) in images.threads() {
        let who = format!("thread {} of process {}", thread.tid, process.pid);
        check_identity(&who, &thread.credentials, grant)?;
        check_capabilities(&who, &thread.credentials, grant)?;
        check_confinement(&who, thread, images, grant)?;
    }
    for process in &images.processes {
        check_limits(process, grant)?;
    }
    Ok(())
}

fn check_identity(who: &str, is: &Credentials, grant: &Grant) -> Result<(), Refusal> {
    let user = &grant.user;
    if let Some(uid) = is.uids.iter().find(|uid| **uid != user.uid).filter(|_| !grant.may("SETUID")) {
        let why = format!("it is user {uid}, the request grants {} and no way to become another", user.uid);
        return Err(Refusal::new(Reason::UserWider, who, why));
    }
    if grant.may("SETGID") {
        return Ok(());
    }
    if let Some(gid) = is.gids.iter().find(|gid| **gid != user.gid) {
        let why = format!("it is of group {gid}, the request grants {} and no way into another", user.gid);
        return Err(Refusal::new(Reason::GroupWider, who, why));
    }
    match is.groups.iter().find(|group| **group != user.gid && !user.groups.contains(group)) {
        Some(group) => {
            Err(Refusal::new(Reason::GroupWider, who, format!("the request does not grant it group {group}")))
        }
        None => Ok(()),
    }
}

fn check_capabilities(who: &str, is: &Credentials, grant: &Grant) -> Result<(), Refusal> {
    let user = &grant.user;
    let sets = [
        ("bounding", is.bounding, user.bounding),
        ("permitted", is.permitted, user.permitted),
        ("effective", is.effective, user.permitted & is.permitted),
        ("inheritable", is.inheritable, user.permitted),
        ("ambient", is.ambient, user.permitted & is.permitted & is.inheritable),
    ];
    for (name, has, granted) in sets {
        // Nobody checks the ones above the last that the kernel has.
        let wider = has & !granted;
        if wider != 0 {
            let why = format!("its {name} capabilities are wider than the request's by {}", names(wider));
            return Err(Refusal::new(Reason::CapabilityWider, who, why));
        }
    }
    Ok(())
}

fn check_confinement(who: &str, thread: &Thread, images: &ImageSet, grant: &Grant) -> Result<(), Refusal> {
    let (is, user) = (&thread.credentials, &grant.user);
    if user.no_new_privileges && !is.no_new_privileges {
        return Err(Refusal::new(
            Reason::NewPrivileges,
            who,
            "the request forbids new privileges, the checkpoint does not",
        ));
    }
    if user.seccomp && !thread.seccomp_strict && images.filters_of(thread).is_empty() {
        return Err(Refusal::new(
            Reason::SeccompWider,
            who,
            "the request filters system calls, the checkpoint does not",
        ));
    }
    if is.label != user.label {
        let name = |label: &Option<String>| label.clone().unwrap_or_else(|| "none".to_owned());
        let why = format!("its security label is {}, the request's {}", name(&is.label), name(&user.label));
        return Err(Refusal::new(Reason::LabelDiffers, who, why));
    }
    if let Some(label) = &is.socket_label {
        return Err(Refusal::new(Reason::LabelDiffers, who, format!("its sockets have the label {label}")));
    }
    if REAL_TIME.contains(&thread.scheduler.0) && !grant.may("SYS_NICE") {
        return Err(Refusal::new(
            Reason::PriorityWider,
            who,
            "it has a scheduler of real time, which the request does not grant",
        ));
    }
    Ok(())
}

fn check_limits(process: &Process, grant: &Grant) -> Result<(), Refusal> {
    let Some(task) = &process.task else { return Ok(()) };
    let who = format!("process {}", process.pid);
    if bit("SYS_RESOURCE").is_some_and(|bit| grant.user.permitted & bit != 0) {
        return Ok(());
    }
    for (number, (soft, hard)) in task.limits.iter().enumerate() {
        let granted = grant.user.limits.get(number).copied().flatten().unwrap_or(u64::MAX);
        if *hard > granted || soft > hard {
            let (name, shown) =
                (limit_name(number), if *hard == u64::MAX { "unlimited".to_owned() } else { hard.to_string() });
            let why = format!("its limit {name} is {shown}, above the {granted} that the request and this host grant");
            return Err(Refusal::new(Reason::LimitWider, who, why));
        }
    }
    let (has, granted) = (task.oom_score_adj.unwrap_or_default(), grant.user.oom_score_adj.unwrap_or_default());
    if i64::from(has) < granted {
        let why = format!("its OOM score adjustment is {has}, below the request's {granted}");
        return Err(Refusal::new(Reason::PriorityWider, who, why));
    }
    Ok(())
}
