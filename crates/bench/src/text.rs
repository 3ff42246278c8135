//! Reports and comparisons for a terminal and the log of a CI job.

use crate::Report;
use crate::compare::Comparison;
use crate::show::plain;
use crate::tables::{self, Row, Series, Table};

/// How many initcalls are listed.
const INITCALLS: usize = 10;

/// A table of phases for each subject, what was counted, its slowest initcalls, and why runs failed.
pub fn summary(report: &Report) -> String {
    let host = &report.host;
    let about = format!(
        "{}, {} CPUs, Linux {}, husk {}",
        host.cpu, host.cpus, host.kernel, host.husk
    );
    let mut text = plain(&about);
    text.push('\n');
    text += report.clock.note();
    text += report.note();
    for subject in &report.subjects {
        let series = Series::new(plain(&subject.name), report.clock, subject);
        text += &format!("\n{}: {}\n", series.name, series.runs());
        let mut phases = series.phases();
        // On paper these are a table of their own.
        phases.columns.push("step".into());
        for (row, point) in phases.rows.iter_mut().zip(&series.points) {
            row.cells.push(crate::show::ms(point.step));
        }
        table(&mut text, &phases);
        table(&mut text, &series.counts());
        table(&mut text, &series.initcalls(0, INITCALLS, 1));
        for failed in series.failures() {
            text += &format!("  {}\n", failed.0);
            for line in &failed.1.console {
                text += &format!("  | {}\n", plain(line));
            }
        }
    }
    text
}

/// What a comparison comes to, the steps that moved, and the initcalls.
pub fn comparison(comparison: &Comparison) -> String {
    let mut text = format!(
        "{}\n  {}\n",
        tables::sentence(comparison),
        tables::figures(comparison)
    );
    if comparison.moved.is_empty() {
        text += "  no step between phases moved for sure\n";
    }
    table(&mut text, &tables::moved(comparison));
    table(&mut text, &tables::moved_initcalls(comparison));
    text
}

/// Names to the left, numbers to the right, notes behind. Nothing of a table without rows.
fn table(text: &mut String, table: &Table) {
    if table.rows.is_empty() {
        return;
    }
    if !table.caption.is_empty() {
        *text += &format!("  {}\n", table.caption);
    }
    let wide = |text: &str| text.chars().count();
    let (name, cells) = table.columns.split_at(1);
    let head = Row {
        name: name.concat(),
        cells: cells.to_vec(),
        ..Row::default()
    };
    let rows = || std::iter::once(&head).chain(&table.rows);
    let name = rows().map(|row| wide(&row.name)).max().unwrap_or(0);
    let mut widths = vec![0; cells.len()];
    for row in rows() {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = (*width).max(wide(cell));
        }
    }
    for row in rows() {
        *text += &format!("{} {:name$}", if row.key { '>' } else { ' ' }, row.name);
        for (cell, &width) in row.cells.iter().zip(&widths) {
            *text += &format!("  {cell:>width$}");
        }
        *text += &format!("  {}", row.note);
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
}

#[cfg(test)]
mod tests;
