//! `debug`: what a person needs who looks for a fault in the daemon.

use stasis_cri_api::stasis::DumpRequest;

use crate::cli::Debug;
use crate::client::Client;
use crate::failure::Result;
use crate::output::Output;

pub(crate) async fn run(client: &Client, output: Output, command: Debug) -> Result<()> {
    match command {
        Debug::Dump => dump(client, output).await,
    }
}

/// Prints the daemon's state; for people as JSON, too, as it has no fixed form.
async fn dump(client: &Client, output: Output) -> Result<()> {
    let mut admin = client.admin.clone();
    let json = client.call("dump the state of the daemon", admin.dump(DumpRequest {})).await?.json;
    let state: serde_json::Value = serde_json::from_str(&json).unwrap_or_default();
    output.item(&state, &format!("{state:#}\n"), "")
}
