//! The table of results: medians, ratio to the peer, the bar, and whether it is met.

use std::fmt;

use super::measure::Series;
use crate::node::Node;

/// What is asked of a measurement.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bar {
    /// At most this share of the peer's.
    Ratio(f64),
    /// At most this, whatever the peer's.
    AtMost(f64),
    /// At most this share of the peer's, and at most this.
    Both(f64, f64),
    /// Shown only.
    None,
}

/// All results; the first node is the peer, the second, if there is one, ours.
#[derive(Debug, Default)]
pub(super) struct Table {
    nodes: Vec<&'static str>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: String,
    bar: Bar,
    /// Median and 95th percentile a node.
    values: Vec<(f64, f64)>,
}

impl Table {
    /// Says which nodes are measured, for the heading.
    pub(super) fn of(&mut self, nodes: &[Node]) {
        self.nodes = nodes.iter().map(|node| node.runtime.name()).collect();
    }

    /// Adds a measured quantity and says it, so that a long run shows how far it is.
    pub(super) fn add(&mut self, what: &str, bar: Bar, series: &Series) {
        let values = series.iter().map(|values| (quantile(values, 0.5), quantile(values, 0.95))).collect();
        let row = Row { what: what.to_owned(), bar, values };
        eprintln!("measured: {row}");
        self.rows.push(row);
    }

    /// As [`Table::add`], for what must hold nearly always: the bar is that of the 99th percentile, which is shown first.
    pub(super) fn add_high(&mut self, what: &str, bar: Bar, series: &Series) {
        let values = series.iter().map(|values| (quantile(values, 0.99), quantile(values, 1.0))).collect();
        let row = Row { what: format!("{what} (p99, max)"), bar, values };
        eprintln!("measured: {row}");
        self.rows.push(row);
    }

    /// How many bars are not met.
    pub(super) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.met() == Some(false)).count()
    }
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        match self.values[..] {
            [(peer, _), (ours, _)] => Some(ours / peer),
            _ => None,
        }
    }

    fn met(&self) -> Option<bool> {
        let (ours, _) = self.values.get(1)?;
        match self.bar {
            Bar::Ratio(most) => Some(self.ratio()? <= most),
            Bar::AtMost(most) => Some(*ours <= most),
            Bar::Both(share, most) => Some(self.ratio()? <= share && *ours <= most),
            Bar::None => None,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:<42}", self.what)?;
        for (median, high) in &self.values {
            write!(formatter, " {median:>9.1} ({high:>7.1})")?;
        }
        if let Some(ratio) = self.ratio() {
            write!(formatter, " {ratio:>7.2}")?;
        }
        let bar = match self.bar {
            Bar::Ratio(most) => format!("ratio ≤ {most}"),
            Bar::AtMost(most) => format!("≤ {most}"),
            Bar::Both(share, most) => format!("ratio ≤ {share}, ≤ {most}"),
            Bar::None => String::new(),
        };
        write!(formatter, "  {bar:<12}")?;
        formatter.write_str(match self.met() {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "\n{:<42}", "median (95th percentile)")?;
        for node in &self.nodes {
            write!(formatter, " {node:>19}")?;
        }
        let ratio = if self.nodes.len() == 2 { "   ratio" } else { "" };
        writeln!(formatter, "{ratio}  bar")?;
        self.rows.iter().try_for_each(|row| writeln!(formatter, "{row}"))
    }
}

/// The value below which that share of the values lies; NaN of none.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = share * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => low + (high - low) * place.fract(),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let check = |values: &[f64], share, expected| assert_eq!(quantile(values, share), expected);
        check(&[3.0, 1.0, 2.0], 0.5, 2.0);
        check(&[1.0, 2.0, 3.0, 4.0], 0.5, 2.5);
        check(&[7.0], 0.95, 7.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn bars_compare_ours_with_the_peer_or_with_a_number() {
        let row = |bar| Row { what: String::new(), bar, values: vec![(100.0, 0.0), (60.0, 0.0)] };
        assert_eq!(row(Bar::Ratio(0.6)).met(), Some(true));
        assert_eq!(row(Bar::Ratio(0.5)).met(), Some(false));
        assert_eq!(row(Bar::AtMost(59.0)).met(), Some(false));
        assert_eq!(row(Bar::None).met(), None);
    }
}
