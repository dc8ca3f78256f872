//! `doctor`: what the daemon found of its engines.

use jiff::Timestamp;
use serde::Serialize;
use stasis_cri_api::stasis::finding::Level;
use stasis_cri_api::stasis::{DoctorRequest, Finding};

use super::Done;
use crate::client::Client;
use crate::output::{Output, Row};

/// Exit code where something is broken.
const BROKEN: u8 = 1;

/// A finding.
#[derive(Debug, Serialize)]
pub(crate) struct FindingRow {
    subject: String,
    level: &'static str,
    found: String,
    path: String,
    consequence: String,
}

impl From<Finding> for FindingRow {
    fn from(finding: Finding) -> Self {
        let level = match finding.level() {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        };
        let Finding { subject, found, path, consequence, .. } = finding;
        Self { subject, level, found, path, consequence }
    }
}

impl Row for FindingRow {
    const COLUMNS: &'static [&'static str] = &["SUBJECT", "LEVEL", "PATH", "FOUND"];

    fn id(&self) -> &str {
        &self.subject
    }

    fn lines(&self, _now: Timestamp) -> Vec<Vec<String>> {
        let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let finding = vec![self.subject.clone(), self.level.to_owned(), or_dash(&self.path), or_dash(&self.found)];
        let mut lines = vec![finding];
        if !self.consequence.is_empty() {
            lines.push(vec![String::new(), String::new(), self.consequence.clone()]);
        }
        lines
    }
}

pub(crate) async fn doctor(client: &Client, output: Output) -> Done {
    let mut admin = client.admin.clone();
    let findings = client.call("examine the node", admin.doctor(DoctorRequest {})).await?.findings;
    let broken = findings.iter().any(|f| f.level() == Level::Error);
    output.list(&findings.into_iter().map(FindingRow::from).collect::<Vec<_>>())?;
    Ok(if broken { BROKEN } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::tests::every_form;

    #[test]
    fn doctor() {
        let finding = |subject: &str, level: Level, found: &str, path: &str, consequence: &str| {
            FindingRow::from(Finding {
                subject: subject.into(),
                level: level.into(),
                found: found.into(),
                path: path.into(),
                consequence: consequence.into(),
            })
        };
        let rows = [
            finding("runc", Level::Ok, "1.3.6", "/usr/sbin/runc", ""),
            finding("criu", Level::Error, "", "", "no checkpoint and no restore: install criu 4.2.1 or later"),
            finding("apparmor", Level::Warning, "disabled", "", "profiles are refused"),
        ];
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("doctor", every_form(&rows));
        });
    }
}
