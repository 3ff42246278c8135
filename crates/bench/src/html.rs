//! A report as one HTML file: it loads nothing, runs nothing, fits a phone, and follows the reader's choice of light or dark.
//!
//! All foreign text goes through [`esc`]. Should that ever fail, the page's own policy still forbids scripts and connections.

mod figures;

use crate::compare::{Change, Comparison, Verdict};
use crate::show::{count, ms, percent, plain, step};
use crate::stats::{Summary, median, summarize};
use crate::text::{names, range, sentence, signed};
use crate::{Clock, Phase, Report, Subject};
use figures::Scale;
use std::fmt::Write;

/// How many initcalls are shown at once, and how many at all.
const INITCALLS: (usize, usize) = (12, 300);
/// How many failed runs are shown.
const FAILED: usize = 50;

const HEAD: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
    "<meta name=\"generator\" content=\"husk bench boot\">\n<style>\n",
    include_str!("html/style.css"),
    "</style>\n<title>"
);

/// One subject of one report.
struct Series<'a> {
    name: String,
    clock: Clock,
    subject: &'a Subject,
    /// Its phases, what each took (the median), and the statistics from spawn to each.
    rows: Vec<(Phase, f64, Summary)>,
    /// When each good run reached the headline.
    times: Vec<u64>,
    headline: Option<(Phase, Summary)>,
}

/// Renders reports under their labels (`before` and `after`, say), and what comparing them came to.
pub fn render(reports: &[(&str, &Report)], comparisons: &[Comparison]) -> String {
    let all: Vec<Series> = reports
        .iter()
        .flat_map(|(label, report)| {
            report
                .subjects
                .iter()
                .map(move |subject| (label, report, subject))
        })
        .map(|(label, report, subject)| {
            let name = match (reports.len(), report.subjects.len()) {
                (1, _) => plain(&subject.name),
                (_, 1) => plain(label),
                _ => format!("{} · {}", plain(label), plain(&subject.name)),
            };
            series(name, report.clock, subject)
        })
        .collect();
    let mut out = String::from(HEAD);
    let title = title(reports);
    if let Some(first) = comparisons.first() {
        let _ = write!(out, "{}: ", first.verdict().label());
    }
    esc(&mut out, &title);
    out.push_str("</title>\n</head>\n<body>\n<header><h1>");
    esc(&mut out, &title);
    out.push_str("</h1><p class=\"dim\">");
    if let Some((_, report)) = reports.last() {
        esc(
            &mut out,
            &format!("{}, {}", report.created, report.host.cpu),
        );
        if report.clock == Clock::Virtual {
            out.push_str(
                "<br>The clock is virtual: it counts instructions, a million is a virtual ms.",
            );
        }
    }
    if reports.iter().any(|(_, report)| report.interrupted) {
        out.push_str("<br>Interrupted: there are fewer runs than were asked for.");
    }
    out.push_str("</p></header>\n<main>\n");
    comparisons.iter().for_each(|one| verdict(&mut out, one));
    cards(&mut out, &all);
    distribution(&mut out, &all);
    durations(&mut out, &all);
    phases(&mut out, &all);
    initcalls(&mut out, &all);
    counts(&mut out, &all);
    failed(&mut out, &all);
    measured(&mut out, reports);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// Text from outside, for a place between tags or between double quotes.
fn esc(out: &mut String, text: &str) {
    html_escape::encode_double_quoted_attribute_to_string(plain(text), out);
}

/// The phase's name in the style sheet, which is that of the file.
fn phase_key(phase: Phase) -> &'static str {
    match phase {
        Phase::Exec => "exec",
        Phase::VmReady => "vm_ready",
        Phase::KernelLoaded => "kernel_loaded",
        Phase::VcpuEntered => "vcpu_entered",
        Phase::FirstExit => "first_exit",
        Phase::FirstConsoleByte => "first_console_byte",
        Phase::HandsOver => "hands_over",
        Phase::Mark => "mark",
        Phase::Exit => "exit",
    }
}

fn series(name: String, clock: Clock, subject: &Subject) -> Series<'_> {
    let phases = subject.phases();
    let times = |phase: Phase| -> Vec<u64> {
        subject
            .good()
            .filter_map(|run| run.phases.get(&phase).copied())
            .collect()
    };
    let steps: Vec<Vec<u64>> = subject.good().map(|run| run.steps(&phases)).collect();
    let row = |(at, &phase): (usize, &Phase)| {
        let took: Vec<u64> = steps.iter().map(|steps| steps[at]).collect();
        Some((phase, median(&took), summarize(&times(phase))?))
    };
    let rows: Vec<_> = phases.iter().enumerate().filter_map(row).collect();
    let headline = subject.headline();
    Series {
        name,
        clock,
        subject,
        times: headline.map(times).unwrap_or_default(),
        headline: rows
            .iter()
            .find(|row| Some(row.0) == headline)
            .map(|row| (row.0, row.2)),
        rows,
    }
}

fn title(reports: &[(&str, &Report)]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for subject in reports.iter().flat_map(|(_, report)| &report.subjects) {
        if !names.contains(&subject.name.as_str()) {
            names.push(&subject.name);
        }
    }
    names.truncate(4);
    format!("Boot time of {}", names.join(", "))
}

fn section(out: &mut String, title: &str) {
    let _ = writeln!(out, "<h2>{title}</h2>");
}

/// A heading for each of several.
fn name(out: &mut String, all: &[Series], one: &Series) {
    if all.len() > 1 {
        out.push_str("<h3>");
        esc(out, &one.name);
        out.push_str("</h3>");
    }
}

fn table(out: &mut String, caption: &str, columns: &[&str]) {
    out.push_str("<div class=\"scroll\"><table>");
    if !caption.is_empty() {
        let _ = write!(out, "<caption>{caption}</caption>");
    }
    out.push_str("<thead><tr>");
    for column in columns {
        out.push_str("<th scope=\"col\">");
        esc(out, column);
        out.push_str("</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
}

fn cell(out: &mut String, text: &str) {
    let _ = write!(out, "<td>{text}</td>");
}

/// A change in its colour, and with its sign, because colour alone tells not everybody.
fn change(out: &mut String, delta: f64, ratio: Option<f64>) {
    let class = if delta > 0.0 { "up" } else { "down" };
    let _ = write!(out, "<td class=\"{class}\">{}", signed(delta));
    if let Some(ratio) = ratio {
        let _ = write!(out, "<small>{}</small>", percent(ratio));
    }
    out.push_str("</td></tr>\n");
}

const END_TABLE: &str = "</tbody></table></div>\n";

fn swatch(out: &mut String, phase: Phase) {
    let _ = write!(
        out,
        "<th scope=\"row\"><span class=\"swatch\" style=\"--p:var(--{})\"></span>{}",
        phase_key(phase),
        phase.label()
    );
}

/// A number stays with its unit.
fn unbroken(text: &str) -> String {
    text.replace(" %", "\u{a0}%")
}

fn verdict(out: &mut String, comparison: &Comparison) {
    let (class, sign) = match comparison.verdict() {
        Verdict::Slower => ("slower", "▲"),
        Verdict::Faster => ("faster", "▼"),
        Verdict::Same => ("same", "="),
        Verdict::TooNoisy => ("noisy", "?"),
    };
    let _ = write!(
        out,
        "<section class=\"verdict {class}\"><h2><span aria-hidden=\"true\">{sign} </span>"
    );
    esc(
        out,
        &format!("{}: {}", names(comparison), sentence(comparison)),
    );
    let contrast = &comparison.headline.contrast;
    let unit = comparison.clock.unit();
    let _ = writeln!(
        out,
        "</h2><p>Spawn to {}: {} → {} {unit}, {} <span class=\"dim\">(95 % interval {}; {} and {} runs{})</span></p>",
        comparison.headline.to.label(),
        ms(contrast.before),
        ms(contrast.after),
        unbroken(&percent(contrast.ratio)),
        unbroken(&range(contrast.ratio_interval, percent)),
        comparison.runs.0,
        comparison.runs.1,
        if comparison.paired { ", in pairs" } else { "" }
    );
    figures::interval(out, comparison);
    if comparison.moved.is_empty() {
        out.push_str("<p class=\"dim\">No step between phases moved for sure.</p>");
    } else {
        table(
            out,
            "Steps that moved, the largest first",
            &["from → to", "before", "after", &format!("change, {unit}")],
        );
        for Change {
            from, to, contrast, ..
        } in &comparison.moved
        {
            let _ = write!(out, "<tr><th scope=\"row\">{}</th>", step(*from, *to));
            cell(out, &ms(contrast.before));
            cell(out, &ms(contrast.after));
            change(out, contrast.delta(), Some(contrast.ratio));
        }
        out.push_str(END_TABLE);
    }
    if !comparison.initcalls.is_empty() {
        table(
            out,
            "Initcalls that moved, by one run of each",
            &["initcall", "before", "after", &format!("change, {unit}")],
        );
        for call in comparison.initcalls.iter().take(INITCALLS.0) {
            out.push_str("<tr><th scope=\"row\"><code>");
            esc(out, &call.name);
            out.push_str("</code></th>");
            for side in [call.before, call.after] {
                cell(out, &side.map_or("–".into(), |us| ms(us as f64 * 1e3)));
            }
            change(out, call.delta() as f64 * 1e3, None);
        }
        out.push_str(END_TABLE);
    }
    out.push_str("</section>\n");
}

fn cards(out: &mut String, all: &[Series]) {
    out.push_str("<div class=\"cards\">");
    for one in all {
        out.push_str("<div class=\"card\">");
        esc(out, &one.name);
        if let Some((phase, median)) = &one.headline {
            let unit = one.clock.unit();
            let _ = write!(
                out,
                "<b>{} <i>{unit}</i></b><small>median from spawn to {}<br>95 % interval {} {unit}</small>",
                ms(median.median),
                phase.label(),
                range(median.interval, ms)
            );
        }
        let _ = write!(out, "<small>{} runs", one.subject.good().count());
        if one.subject.failed() > 0 {
            let _ = write!(
                out,
                ", <span class=\"up\">{} failed</span>",
                one.subject.failed()
            );
        }
        out.push_str("</small></div>");
    }
    out.push_str("</div>\n");
}

/// The first of several is what the others are compared with, and drawn in grey.
fn class(all: &[Series], number: usize) -> &'static str {
    if all.len() > 1 && number == 0 {
        " class=\"was\""
    } else {
        ""
    }
}

fn distribution(out: &mut String, all: &[Series]) {
    let of_all: Vec<Summary> = all
        .iter()
        .filter_map(|one| one.headline.map(|(_, summary)| summary))
        .collect();
    if of_all.is_empty() {
        return;
    }
    section(out, "Distribution");
    let low = of_all
        .iter()
        .map(|one| one.min)
        .fold(f64::INFINITY, f64::min);
    // A few outliers shall not press all others into one line.
    let most = |one: &Summary| one.max.min(one.p90 + 3.0 * (one.p90 - one.min));
    let high = of_all.iter().map(most).fold(0.0, f64::max);
    let scale = Scale::around(low, high, 500.0);
    out.push_str("<figure><figcaption>Each dot is a run, from top to bottom in their order. The line is the median, the band its 95 % interval; an arrowhead is a run beyond the edge.</figcaption>\n");
    for (number, one) in all.iter().enumerate() {
        let Some((phase, summary)) = &one.headline else {
            continue;
        };
        let _ = write!(out, "<div{}><div class=\"row\"><b>", class(all, number));
        esc(out, &one.name);
        let _ = write!(
            out,
            "</b><span>to {}: {} – {} {}</span></div>",
            phase.label(),
            ms(summary.min),
            ms(summary.max),
            one.clock.unit()
        );
        figures::strip(out, scale, &one.times, summary, one.clock);
        out.push_str("</div>\n");
    }
    scale.axis(out);
    out.push_str("</figure>\n");
}

fn durations(out: &mut String, all: &[Series]) {
    let sum = |one: &Series| one.rows.iter().map(|row| row.1).sum::<f64>();
    let longest = all.iter().map(sum).fold(0.0, f64::max);
    if all.iter().all(|one| one.rows.is_empty()) {
        return;
    }
    section(out, "Where the time goes");
    let scale = Scale::to(longest);
    out.push_str("<figure><figcaption>The median of each step; medians need not add up to the median of the whole.</figcaption>\n");
    for one in all.iter().filter(|one| !one.rows.is_empty()) {
        out.push_str("<div class=\"row\"><b>");
        esc(out, &one.name);
        let _ = write!(
            out,
            "</b><span>{} {}</span></div>",
            ms(sum(one)),
            one.clock.unit()
        );
        let steps: Vec<(Phase, f64)> = one.rows.iter().map(|row| (row.0, row.1)).collect();
        figures::stack(out, scale, &steps, one.clock);
    }
    scale.axis(out);
    let names: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
    let mut columns = vec!["step up to"];
    columns.extend(&names);
    table(out, "", &columns);
    for phase in Phase::ALL {
        let step = |one: &Series| one.rows.iter().find(|row| row.0 == phase).map(|row| row.1);
        if all.iter().any(|one| step(one).is_some()) {
            out.push_str("<tr>");
            swatch(out, phase);
            out.push_str("</th>");
            all.iter()
                .for_each(|one| cell(out, &step(one).map_or("–".into(), ms)));
            out.push_str("</tr>\n");
        }
    }
    out.push_str(END_TABLE);
    out.push_str("</figure>\n");
}

fn phases(out: &mut String, all: &[Series]) {
    section(out, "Phases, from spawn");
    for one in all {
        name(out, all, one);
        if one.rows.is_empty() {
            out.push_str("<p class=\"dim\">There is no phase that all good runs reached.</p>");
            continue;
        }
        table(
            out,
            "",
            &[one.clock.unit(), "median", "95 % interval", "p90", "p99"],
        );
        for (phase, _, all) in &one.rows {
            let key = one.headline.is_some_and(|(headline, _)| headline == *phase);
            out.push_str(if key { "<tr class=\"key\">" } else { "<tr>" });
            swatch(out, *phase);
            out.push_str("</th>");
            let cells = [
                ms(all.median),
                range(all.interval, ms),
                ms(all.p90),
                ms(all.p99),
            ];
            cells.iter().for_each(|text| cell(out, text));
            out.push_str("</tr>\n");
        }
        out.push_str(END_TABLE);
    }
}

fn initcalls(out: &mut String, all: &[Series]) {
    if all.iter().all(|one| one.subject.initcalls.is_empty()) {
        return;
    }
    // One scale for all.
    let of_all = all.iter().flat_map(|one| &one.subject.initcalls);
    let slowest = of_all.map(|call| call.us).max().unwrap_or(1).max(1) as f64;
    section(out, "Slowest initcalls");
    out.push_str(
        "<p class=\"dim\">From one run with initcall_debug, which slows a kernel down.</p>",
    );
    for one in all {
        let calls = &one.subject.initcalls;
        if calls.is_empty() {
            continue;
        }
        name(out, all, one);
        let shown = calls.len().min(INITCALLS.1);
        let (first, rest) = calls[..shown].split_at(shown.min(INITCALLS.0));
        for (part, calls) in [first, rest].into_iter().enumerate() {
            if calls.is_empty() {
                continue;
            }
            if part == 1 {
                let _ = write!(out, "<details><summary>{} more</summary>", calls.len());
            }
            table(out, "", &["initcall", one.clock.unit()]);
            for call in calls {
                out.push_str("<tr><th scope=\"row\"><code>");
                esc(out, &call.name);
                out.push_str("</code>");
                if call.returned != 0 {
                    let _ = write!(
                        out,
                        " <span class=\"dim\">returned {}</span>",
                        call.returned
                    );
                }
                let share = call.us as f64 / slowest * 100.0;
                let _ = write!(
                    out,
                    "<i class=\"bar\" style=\"width:{share:.1}%\"></i></th>"
                );
                cell(out, &ms(call.us as f64 * 1e3));
                out.push_str("</tr>\n");
            }
            out.push_str(END_TABLE);
            if part == 1 {
                out.push_str("</details>");
            }
        }
    }
}

fn counts(out: &mut String, all: &[Series]) {
    if all.iter().all(|one| one.subject.counts.is_none()) {
        return;
    }
    section(out, "Exits, pages and bytes");
    out.push_str("<p class=\"dim\">From a run of its own, so that counting disturbed no time. Each row is what happened up to that phase since the one before.</p>");
    for one in all {
        let Some(counts) = &one.subject.counts else {
            continue;
        };
        name(out, all, one);
        table(out, "", &["up to", "exits", "pages touched", "KiB read"]);
        for row in &counts.by_phase {
            out.push_str("<tr>");
            swatch(out, row.phase);
            let mut reasons: Vec<(&String, &u64)> = row.exits.iter().collect();
            reasons.sort_by_key(|(_, times)| std::cmp::Reverse(**times));
            let shown: Vec<String> = reasons
                .iter()
                .take(6)
                .map(|(name, times)| format!("{name} {times}"))
                .collect();
            if !shown.is_empty() {
                out.push_str("<small>");
                esc(out, &shown.join(", "));
                out.push_str("</small>");
            }
            out.push_str("</th>");
            let exits = row
                .exits
                .values()
                .fold(0, |sum: u64, times| sum.saturating_add(*times));
            for number in [exits, row.pages_touched, row.bytes_read.div_ceil(1024)] {
                cell(out, &count(number));
            }
            out.push_str("</tr>\n");
        }
        out.push_str(END_TABLE);
    }
}

fn failed(out: &mut String, all: &[Series]) {
    if all.iter().all(|one| one.subject.failed() == 0) {
        return;
    }
    section(out, "Failed runs");
    for one in all.iter().filter(|one| one.subject.failed() > 0) {
        name(out, all, one);
        let runs = one.subject.runs.iter().enumerate();
        let failed = runs.filter_map(|(number, run)| Some((number + 1, run, run.failed.as_ref()?)));
        for (number, run, failed) in failed.take(FAILED) {
            let reached = run
                .phases
                .keys()
                .next_back()
                .map_or("nothing", |phase| phase.label());
            let _ = write!(out, "<details open><summary>Run {number}: ");
            esc(out, &failed.reason);
            let _ = write!(
                out,
                " <span class=\"dim\">(reached: {reached})</span></summary><pre>"
            );
            for line in &failed.console {
                esc(out, line);
                out.push('\n');
            }
            out.push_str("</pre></details>\n");
        }
    }
}

fn measured(out: &mut String, reports: &[(&str, &Report)]) {
    section(out, "How it was measured");
    for (label, report) in reports {
        if reports.len() > 1 {
            out.push_str("<h3>");
            esc(out, label);
            out.push_str("</h3>");
        }
        let host = &report.host;
        let entries = [
            ("Date", report.created.clone()),
            ("Clock", report.clock.label().into()),
            ("Processor", format!("{}, {} online", host.cpu, host.cpus)),
            ("Kernel", format!("Linux {}", host.kernel)),
            ("Version of Husk", host.husk.clone()),
        ];
        out.push_str("<dl>");
        for (term, text) in &entries {
            let _ = write!(out, "<dt>{term}</dt><dd>");
            esc(out, text);
            out.push_str("</dd>");
        }
        for subject in &report.subjects {
            out.push_str("<dt>Command");
            if report.subjects.len() > 1 {
                esc(out, &format!(" of {}", subject.name));
            }
            out.push_str("</dt><dd><code>");
            esc(out, &subject.command.join(" "));
            out.push_str("</code></dd>");
        }
        out.push_str("</dl>\n");
    }
    out.push_str("<p class=\"dim\">Percentiles interpolate between runs. Intervals are bootstrapped: 95 of 100 hold what they are intervals of.</p>\n");
}

#[cfg(test)]
mod tests;
