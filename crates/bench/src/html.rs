//! A report as one HTML file: it loads nothing, runs nothing, fits a phone, and follows the reader's choice of light or dark.
//!
//! All foreign text goes through [`esc`]. Should that ever fail, the page's own policy still forbids scripts and connections.

mod figures;

use crate::Report;
use crate::compare::{Comparison, Verdict};
use crate::show::{ms, plain, range};
use crate::tables::{self, Series, Table};
use figures::Scale;

/// How many initcalls are shown at once, and how many at all.
const INITCALLS: [usize; 3] = [0, 12, 300];
/// How many failed runs are shown.
const FAILED: usize = 50;

const HEAD: &str = concat!(
    "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=\"utf-8\">\n",
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
    "<meta name=\"generator\" content=\"husk bench boot\">\n<style>\n",
    include_str!("html/style.css"),
    "</style>\n<title>"
);

/// Renders reports under their labels (`before` and `after`, say), and what comparing them came to.
pub fn render(reports: &[(&str, &Report)], comparisons: &[Comparison]) -> String {
    let mut all: Vec<Series> = Vec::new();
    let mut title = String::new();
    for (label, report) in reports {
        for subject in &report.subjects {
            let name = match (reports.len(), report.subjects.len()) {
                (1, _) => plain(&subject.name),
                (_, 1) => plain(label),
                _ => plain(&format!("{label} · {}", subject.name)),
            };
            if all.iter().all(|one| one.subject.name != subject.name) {
                title += if title.is_empty() {
                    "Boot time of "
                } else {
                    ", "
                };
                title += &subject.name;
            }
            all.push(Series::new(name, report.clock, subject));
        }
    }
    let mut page = Page(HEAD.into());
    if let Some(first) = comparisons.first() {
        page.put(&[first.verdict().label(), ": "]);
    }
    page.esc(&title);
    page.put(&["</title>\n</head>\n<body>\n<header>"]);
    page.element("h1", &title);
    if let Some((_, report)) = reports.last() {
        page.element(
            "p class=dim",
            &format!("{}, {}", report.created, report.host.cpu),
        );
        for note in [report.clock.note(), report.note()] {
            page.element("p class=dim", note.trim_end());
        }
    }
    page.put(&["</header>\n<main>\n"]);
    comparisons.iter().for_each(|one| page.verdict(one));
    page.cards(&all);
    page.distribution(&all);
    page.durations(&all);
    page.section("Phases, from spawn", "");
    page.tables(&all, &|one| one.phases());
    page.initcalls(&all);
    if all.iter().any(|one| one.subject.counts.is_some()) {
        page.section(
            "Exits, pages and bytes",
            "From a run of its own, so that counting disturbed no time. Each row is what happened since the phase before.",
        );
        page.tables(&all, &|one| one.counts());
    }
    page.failed(&all);
    page.measured(reports);
    page.put(&["</main>\n</body>\n</html>\n"]);
    page.0
}

/// The page as far as it is written.
struct Page(String);

impl Page {
    /// Appends HTML.
    fn put(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.0.push_str(part));
    }

    /// Appends text from outside, for a place between tags or between double quotes. A percentage stays with its unit.
    fn esc(&mut self, text: &str) {
        html_escape::encode_double_quoted_attribute_to_string(
            plain(text).replace(" %", "\u{a0}%"),
            &mut self.0,
        );
    }

    /// Appends an element with text from outside; nothing if that is empty. `tag` may have attributes.
    fn element(&mut self, tag: &str, text: &str) {
        if !text.is_empty() {
            self.put(&["<", tag, ">"]);
            self.esc(text);
            let (name, _) = tag.split_once(' ').unwrap_or((tag, ""));
            self.put(&["</", name, ">"]);
        }
    }

    fn section(&mut self, title: &str, about: &str) {
        self.element("h2", title);
        self.element("p class=dim", about);
    }

    /// A heading for each of several.
    fn name(&mut self, all: usize, name: &str) {
        if all > 1 {
            self.element("h3", name);
        }
    }

    /// What is drawn of a series is headed by its name and a figure.
    fn row(&mut self, one: &Series, figure: &str) {
        self.put(&["<div class=row>"]);
        self.element("b", &one.name);
        self.element("span", &format!("{figure} {}", one.clock.unit()));
        self.put(&["</div>"]);
    }

    fn tables(&mut self, all: &[Series], of: &dyn Fn(&Series) -> Table) {
        for one in all {
            let table = of(one);
            if !table.rows.is_empty() {
                self.name(all.len(), &one.name);
                self.table(&table);
            }
        }
    }

    fn table(&mut self, table: &Table) {
        if table.rows.is_empty() {
            return;
        }
        self.put(&[
            "<div class=scroll><table",
            if table.code { " class=code" } else { "" },
            ">",
        ]);
        self.element("caption", &table.caption);
        self.put(&["<thead><tr>"]);
        for column in &table.columns {
            self.element("th scope=col", column);
        }
        self.put(&["</tr></thead><tbody>\n"]);
        for row in &table.rows {
            self.put(&[
                "<tr",
                if row.key { " class=key" } else { "" },
                "><th scope=row>",
            ]);
            if let Some(phase) = row.phase {
                self.put(&[
                    "<i class=swatch style=\"--p:var(--",
                    phase.key(),
                    ")\"></i>",
                ]);
            }
            self.esc(&row.name);
            if row.change == 0 {
                self.element("small", &row.note);
            }
            if row.share > 0.0 {
                self.put(&[
                    "<i class=bar style=\"width:",
                    &figures::place(row.share * 100.0),
                    "\"></i>",
                ]);
            }
            self.put(&["</th>"]);
            for (at, cell) in row.cells.iter().enumerate() {
                // A change has its colour and its sign, because colour alone tells not everybody.
                let change = row.change != 0 && at + 1 == row.cells.len();
                self.put(&[
                    "<td",
                    [">", " class=up>", " class=down>"]
                        [usize::from(change) + usize::from(change && row.change < 0)],
                ]);
                self.esc(if cell.is_empty() { "–" } else { cell });
                if change {
                    self.element("small", &row.note);
                }
                self.put(&["</td>"]);
            }
            self.put(&["</tr>\n"]);
        }
        self.put(&["</tbody></table></div>\n"]);
    }

    fn verdict(&mut self, comparison: &Comparison) {
        let (class, sign) = match comparison.verdict() {
            Verdict::Slower => ("slower", "▲"),
            Verdict::Faster => ("faster", "▼"),
            Verdict::Same => ("same", "="),
            Verdict::TooNoisy => ("noisy", "?"),
        };
        self.put(&[
            "<section class=\"verdict ",
            class,
            "\"><h2><span aria-hidden=true>",
            sign,
            " </span>",
        ]);
        self.esc(&tables::sentence(comparison));
        self.put(&["</h2>"]);
        self.element("p", &tables::figures(comparison));
        figures::interval(self, comparison);
        if comparison.moved.is_empty() {
            self.element("p class=dim", "No step between phases moved for sure.");
        }
        self.table(&tables::moved(comparison));
        self.table(&tables::moved_initcalls(comparison));
        self.put(&["</section>\n"]);
    }

    fn cards(&mut self, all: &[Series]) {
        self.put(&["<div class=cards>"]);
        for one in all {
            self.put(&["<div class=card>"]);
            self.esc(&one.name);
            if let Some(point) = one.headline() {
                let unit = one.clock.unit();
                self.put(&["<b>", &ms(point.all.median), " <i>", unit, "</i></b>"]);
                let interval = range(point.all.interval, ms);
                self.element(
                    "small",
                    &format!("median from spawn to {}", point.phase.label()),
                );
                self.element("small", &format!("95 % interval {interval} {unit}"));
            }
            self.element("small", &one.runs());
            self.put(&["</div>"]);
        }
        self.put(&["</div>\n"]);
    }

    fn distribution(&mut self, all: &[Series]) {
        let (mut low, mut high) = (f64::INFINITY, 0.0);
        for point in all.iter().filter_map(Series::headline) {
            let all = &point.all;
            low = all.min.min(low);
            // A few outliers shall not press all others into one line.
            high = all.max.min(all.p90 + 3.0 * (all.p90 - all.min)).max(high);
        }
        if low > high {
            return;
        }
        let scale = Scale::around(low, high, 500.0);
        self.section(
            "Distribution",
            "Each dot is a run, from top to bottom in their order. The line is the median, the band its 95 % interval; an arrowhead is a run beyond the edge.",
        );
        for (number, one) in all.iter().enumerate() {
            let Some(point) = one.headline() else {
                continue;
            };
            // The first of several is what the others are compared with, and grey.
            self.put(&[
                "<div",
                if number == 0 && all.len() > 1 {
                    " class=was>"
                } else {
                    ">"
                },
            ]);
            let (min, max) = (ms(point.all.min), ms(point.all.max));
            self.row(one, &format!("to {}: {min} – {max}", point.phase.label()));
            figures::strip(self, scale, &one.times, &point.all, one.clock);
            self.put(&["</div>\n"]);
        }
        scale.axis(self);
    }

    fn durations(&mut self, all: &[Series]) {
        let sum = |one: &Series| one.points.iter().map(|point| point.step).sum::<f64>();
        let longest = all.iter().map(sum).fold(0.0, f64::max);
        let scale = Scale::to(longest);
        self.section(
            "Where the time goes",
            "The median of each step; medians need not add up to the median of the whole.",
        );
        for one in all.iter().filter(|one| !one.points.is_empty()) {
            self.row(one, &ms(sum(one)));
            figures::stack(self, scale, one);
        }
        scale.axis(self);
        self.table(&tables::steps(all));
    }

    fn initcalls(&mut self, all: &[Series]) {
        // One scale for all.
        let of_all = all.iter().flat_map(|one| &one.subject.initcalls);
        let Some(slowest) = of_all.map(|call| call.us).max() else {
            return;
        };
        self.section(
            "Slowest initcalls",
            "From one run with initcall_debug, which slows a kernel down.",
        );
        let [from, to, end] = INITCALLS;
        for one in all {
            let (first, rest) = (
                one.initcalls(from, to, slowest),
                one.initcalls(to, end, slowest),
            );
            if !first.rows.is_empty() {
                self.name(all.len(), &one.name);
                self.table(&first);
            }
            if !rest.rows.is_empty() {
                self.put(&[
                    "<details><summary>",
                    &rest.rows.len().to_string(),
                    " more</summary>",
                ]);
                self.table(&rest);
                self.put(&["</details>"]);
            }
        }
    }

    fn failed(&mut self, all: &[Series]) {
        if all.iter().all(|one| one.subject.failed() == 0) {
            return;
        }
        self.section("Failed runs", "");
        for one in all {
            for (number, (said, failed)) in one.failures().iter().take(FAILED).enumerate() {
                if number == 0 {
                    self.name(all.len(), &one.name);
                }
                self.put(&["<details open>"]);
                self.element("summary", said);
                self.put(&["<pre>"]);
                for line in &failed.console {
                    self.esc(line);
                    self.put(&["\n"]);
                }
                self.put(&["</pre></details>\n"]);
            }
        }
    }

    fn measured(&mut self, reports: &[(&str, &Report)]) {
        self.section(
            "How it was measured",
            "Percentiles interpolate between runs. Intervals are bootstrapped: 95 of 100 hold what they are intervals of.",
        );
        for (label, report) in reports {
            self.name(reports.len(), label);
            let host = &report.host;
            let mut entries = vec![
                ("Date", report.created.clone()),
                ("Clock", report.clock.label().into()),
                ("Processor", format!("{}, {} online", host.cpu, host.cpus)),
                ("Kernel", format!("Linux {}", host.kernel)),
                ("Husk", format!("version {}", host.husk)),
            ];
            for subject in &report.subjects {
                entries.push((&subject.name, subject.command.join(" ")));
            }
            self.put(&["<dl>"]);
            for (term, text) in entries {
                self.element("dt", term);
                self.element("dd", &text);
            }
            self.put(&["</dl>\n"]);
        }
    }
}

#[cfg(test)]
mod tests;
