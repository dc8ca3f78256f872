//! The check that every promise of `docs/specification.md` has a number of its own and names a test or a benchmark that
//! exists.
//!
//! A promise begins with `- **NUMBER**`, and its text goes on to the next one or to a heading. It names its proof as
//! `Test: ` or `Benchmark: ` followed by names in backticks; a test's name is that of its function, with or without
//! the modules before it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::bench;
use crate::places::Places;

const PROMISE: &str = "- **";

/// Fails with all promises that nothing proves.
pub(crate) fn check(places: &Places) -> Result<()> {
    let path = places.repository.join("docs/specification.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut functions = BTreeSet::new();
    for part in ["crates", "tests", "xtask"] {
        collect_functions(&places.repository.join(part), &mut functions)?;
    }
    let faults = faults(&text, &functions);
    if !faults.is_empty() {
        bail!("{}:\n{}", path.display(), faults.join("\n"));
    }
    Ok(())
}

/// What is wrong with a specification, a line each.
fn faults(text: &str, functions: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut numbers = BTreeSet::new();
    for promise in promises(text) {
        let number = promise[PROMISE.len()..].split("**").next().unwrap_or("");
        if !numbers.insert(number.to_owned()) {
            faults.push(format!("{number} is given twice"));
        }
        let tests = names_after(&promise, &["Test:", "Tests:"]);
        let benchmarks = names_after(&promise, &["Benchmark:", "Benchmarks:"]);
        if tests.is_empty() && benchmarks.is_empty() {
            faults.push(format!("{number} names neither a test nor a benchmark"));
        }
        for test in tests {
            let function = test.rsplit("::").next().unwrap_or(&test);
            if !functions.contains(function) {
                faults.push(format!("{number} names the test {test}, which does not exist"));
            }
        }
        for benchmark in benchmarks.iter().filter(|name| !bench::NAMES.contains(&name.as_str())) {
            faults.push(format!("{number} names the benchmark {benchmark}, which does not exist"));
        }
    }
    faults
}

/// The promises' texts, each in one line.
fn promises(text: &str) -> Vec<String> {
    let mut promises: Vec<String> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with(PROMISE) {
            promises.push(line.to_owned());
            inside = true;
        } else if line.starts_with('#') || line.starts_with("- ") {
            inside = false;
        } else if let Some(promise) = promises.last_mut().filter(|_| inside) {
            promise.push(' ');
            promise.push_str(line.trim());
        }
    }
    promises
}

/// The names in backticks that follow one of the words, up to the end of the sentence.
fn names_after(promise: &str, words: &[&str]) -> Vec<String> {
    let Some(begin) = words.iter().find_map(|word| promise.find(word).map(|place| place + word.len())) else {
        return Vec::new();
    };
    let sentence = promise[begin..].split(". ").next().unwrap_or("");
    sentence.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Names of all functions in the Rust files below `dir`.
fn collect_functions(dir: &Path, functions: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect_functions(&path, functions)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let names = text.split("fn ").skip(1).filter_map(|rest| {
                let name: String = rest.chars().take_while(|char| char.is_alphanumeric() || *char == '_').collect();
                (!name.is_empty()).then_some(name)
            });
            functions.extend(names);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let functions = ["it_holds".to_owned()].into();
        assert_eq!(faults(text, &functions), expected);
    }

    #[test]
    fn a_promise_with_its_test_or_benchmark_is_fine() {
        check("# S\n- **S1** It holds.\n  Test: `stasis_pod::tests::it_holds`.\n", &[]);
        check("- **S1** It is quick. Benchmark: `lifecycle`.\n", &[]);
    }

    #[test]
    fn a_promise_without_proof_is_named() {
        check("- **S1** It holds.\n\n# Next\nTest: `it_holds`\n", &["S1 names neither a test nor a benchmark"]);
        check("- **S2** Test: `gone`.", &["S2 names the test gone, which does not exist"]);
        check("- **S3** Benchmark: `gone`.", &["S3 names the benchmark gone, which does not exist"]);
    }

    #[test]
    fn a_number_is_given_once() {
        let promise = "- **S1** It holds. Test: `it_holds`.\n";
        check(&promise.repeat(2), &["S1 is given twice"]);
    }
}
