//! The checks of an archive's content against a grant, in the order of the design.

mod files;
mod host;
mod mounts;
mod namespaces;
mod privilege;

use crate::error::Refusal;
use crate::grant::Grant;
use crate::members::Contents;
use crate::plan::plan;
use stasis_shim_api::plan::Plan;

/// Checks an archive's content against a grant; without one, against what its own specification would grant, which finds
/// everything but what the request decides.
///
/// # Errors
/// The first thing that is refused.
pub fn check(contents: &Contents, grant: Option<&Grant>) -> Result<Plan, Refusal> {
    let own;
    let grant = match grant {
        Some(grant) => grant,
        None => {
            own = contents.own_grant()?;
            &own
        }
    };
    let images = &contents.images;
    mounts::check(images, grant)?;
    privilege::check(images, grant)?;
    namespaces::check(images, grant)?;
    namespaces::check_cgroups(images, grant)?;
    files::check(contents, grant)?;
    host::check(images, grant)?;
    Ok(plan(images))
}
