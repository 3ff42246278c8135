use super::*;
use crate::compare::{compare_pairs, reports};
use crate::sample::{self, STEPS, steps_with};
use crate::{Clock, Failed, Initcall, Phase, Run};

const STYLE: &str = include_str!("style.css");

fn whole() -> String {
    let (before, after) = (
        sample::report(1, &STEPS),
        sample::report(5, &steps_with(Phase::HandsOver, 1.3)),
    );
    let comparisons = reports(&before, &after, 0.05).unwrap();
    render(&[("before", &before), ("after", &after)], &comparisons)
}

/// Checks that what is opened is closed, in order, and that attributes are quoted. The names of all elements.
fn elements(page: &str) -> Vec<String> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    for tag in page.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("a tag ends");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "</{name}>");
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap().to_owned();
        all.push(name.clone());
        assert!(!tag.contains("='") && !tag.contains("= "), "{tag}");
        let void = tag.ends_with('/') || ["!doctype", "meta", "br"].contains(&&name[..]);
        if !void {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
    all
}

#[test]
fn everything_is_there_once_for_each_subject() {
    let page = whole();
    let all = elements(&page);
    for part in [
        "<html lang=en>",
        "width=device-width",
        "<title>slower: Boot time of husk</title>",
        "slower by 1",
        "more than the 5\u{a0}% allowed",
        "Distribution",
        "Where the time goes",
        "Slowest initcalls",
        "Exits, pages and bytes",
        "Failed runs",
        "How it was measured",
        "first console byte → hands over",
        "AMD EPYC 7B13",
        "husk run --kernel vmlinuz",
        "no mark within 10 s",
        "(reached: first console byte)",
        "1\u{202f}620",
        "returned -19",
        "virtio_blk_init [virtio_blk]",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // A picture says in words what it shows: two strips, two stacks, and the interval.
    assert_eq!(page.matches("role=img height=").count(), 5);
    assert!(page.contains("aria-label=\"30 runs from ") && page.contains("aria-label=\"exec 0.9"));
    assert_eq!(
        page.matches("<circle cx=").count() + page.matches("<path ").count(),
        60
    );
    assert!(all.iter().all(|name| {
        !["script", "img", "link", "a", "iframe", "object", "form"].contains(&&name[..])
    }));
    // Nothing is loaded.
    assert!(
        ["src=", "href=", "url(", "@import", "http:", "https:"]
            .iter()
            .all(|load| !page.replace("src=x onerror", "").contains(load))
    );
}

#[test]
fn foreign_text_cannot_leave_its_place() {
    let evil = "\"><script>x</script>'</style>--><!-- ]]>&amp;\u{0}\u{202e}";
    let mut report = sample::report(1, &STEPS);
    report.created = evil.into();
    report.host.cpu = evil.into();
    report.host.kernel = evil.into();
    report.host.husk = evil.into();
    let subject = &mut report.subjects[0];
    subject.name = evil.into();
    subject.command = vec![evil.into()];
    subject.initcalls = vec![Initcall {
        name: evil.into(),
        us: u64::MAX,
        returned: i64::MIN,
    }];
    subject.counts.as_mut().unwrap().by_phase[0].exits =
        [(evil.into(), u64::MAX), ("b".into(), u64::MAX)].into();
    subject.runs[1].failed = Some(Failed {
        reason: evil.into(),
        console: vec![evil.into()],
    });
    let mut other = report.clone();
    other.subjects[0].initcalls[0].us = 1;
    let comparisons = reports(&report, &other, 0.05).unwrap();
    let page = render(&[(evil, &report), (evil, &other)], &comparisons);
    let all = elements(&page);
    assert!(
        !all.iter()
            .any(|name| name == "script" || name.starts_with("!--")),
        "{all:?}"
    );
    assert!(!page.contains(['\0', '\u{202e}']));
    let escaped =
        "&quot;&gt;&lt;script&gt;x&lt;/script&gt;'&lt;/style&gt;--&gt;&lt;!-- ]]&gt;&amp;amp;··";
    assert!(
        page.matches(escaped).count() > 20,
        "{}",
        page.matches(escaped).count()
    );
}

#[test]
fn reports_of_little_are_rendered_too() {
    let empty = Report::new(Clock::Virtual, sample::host());
    elements(&render(&[], &[]));
    let page = render(&[("now", &empty)], &[]);
    elements(&page);
    assert!(page.contains("The clock is virtual"));
    let mut report = empty.clone();
    report.interrupted = true;
    for runs in [0, 1, 2] {
        report.subjects = vec![
            sample::subject("a", 1, runs, &STEPS[..2]),
            sample::subject("b", 2, runs, &[]),
        ];
        let page = render(&[("now", &report)], &[]);
        elements(&page);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert!(page.contains("Interrupted"));
    }
    report.subjects = vec![
        sample::subject("a", 1, 1, &STEPS),
        sample::subject("b", 2, 1, &STEPS),
    ];
    let [a, b] = &report.subjects[..] else {
        unreachable!()
    };
    let pairs = compare_pairs(a, b, 0.0).unwrap();
    let page = render(&[("now", &report)], &[pairs]);
    elements(&page);
    assert!(
        page.contains("b against a: too noisy")
            && page.contains("virtual ms")
            && page.contains("unknown")
    );
}

/// Extremes of time, and more than fits.
#[test]
fn extremes_are_drawn_within_bounds() {
    let mut report = sample::report(1, &STEPS);
    for time in [0, 1, u64::MAX] {
        let run = Run {
            phases: [(Phase::Mark, time)].into(),
            failed: None,
        };
        report.subjects[0].runs = vec![run; 9];
        let page = render(
            &[("now", &report)],
            &reports(&report, &report, 0.05).unwrap(),
        );
        elements(&page);
        assert!(!page.contains("NaN") && !page.contains("inf%"), "{time}");
    }
    let mut many = sample::subject("many", 1, 3000, &STEPS[..1]);
    many.runs[5].phases.insert(Phase::Exec, 1_000_000_000);
    many.initcalls = (0..20_000)
        .map(|n| Initcall {
            name: format!("f{n}"),
            us: 20_000 - n,
            returned: 0,
        })
        .collect();
    report.subjects = vec![many];
    let page = render(&[("now", &report)], &[]);
    elements(&page);
    assert!(page.len() < 200_000, "{}", page.len());
}

#[test]
fn outliers_become_arrowheads() {
    let mut report = sample::report(1, &STEPS);
    report.subjects[0].runs[9]
        .phases
        .insert(Phase::Mark, 900_000_000);
    let page = render(&[("now", &report)], &[]);
    assert_eq!(page.matches("<path ").count(), 1);
    assert!(page.contains("<title>900.0 ms</title>"));
}

/// The variables of the style sheet; `dark`: of its second block.
fn colour(name: &str, dark: bool) -> [f64; 3] {
    let block = STYLE
        .split("@media(prefers-color-scheme:dark)")
        .nth(usize::from(dark))
        .unwrap();
    let (_, value) = block
        .split_once(&format!("--{name}:#"))
        .unwrap_or_else(|| panic!("{name}"));
    [0, 2, 4].map(|at| f64::from(u8::from_str_radix(&value[at..at + 2], 16).unwrap()) / 255.0)
}

/// As WCAG 2 defines it.
fn luminance(colour: [f64; 3]) -> f64 {
    let linear = |part: f64| {
        if part <= 0.04045 {
            part / 12.92
        } else {
            ((part + 0.055) / 1.055).powf(2.4)
        }
    };
    let [r, g, b] = colour.map(linear);
    0.2126 * r + 0.7152 * g + 0.0722 * b
}

#[test]
fn colours_have_the_contrast_that_wcag_asks_for() {
    for dark in [false, true] {
        let contrast = |a: &str, b: &str| {
            let (a, b) = (luminance(colour(a, dark)), luminance(colour(b, dark)));
            (a.max(b) + 0.05) / (a.min(b) + 0.05)
        };
        for text in ["ink", "dim", "bad", "good", "warn", "blue"] {
            for ground in ["bg", "panel"] {
                assert!(
                    contrast(text, ground) >= 4.5,
                    "{text} on {ground}, dark {dark}: {}",
                    contrast(text, ground)
                );
            }
        }
        for phase in Phase::ALL.map(Phase::key) {
            assert!(
                contrast(phase, "bg") >= 3.0,
                "{phase}, dark {dark}: {}",
                contrast(phase, "bg")
            );
        }
    }
}

#[test]
fn phases_have_the_names_of_the_file() {
    for phase in Phase::ALL {
        assert_eq!(serde_json::to_value(phase).unwrap(), phase.key());
    }
}
