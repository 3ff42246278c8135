//! The HTML report in a real browser: light and dark, on a phone and on a desk, with a console that attacks its reader.

mod common;

use common::{STEPS, steps_with};
use husk_bench::{Clock, Phase, compare, html};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const STYLE: &str = include_str!("../src/html/style.css");
/// How much longer the step to [`Phase::HandsOver`] takes in the second report.
const SLOWER: f64 = 1.3;
const POLICY: &str = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n";
/// Taller than the page at any width.
const HEIGHT: u32 = 9000;

type Rgb = [u8; 3];

struct Browser {
    place: TempDir,
    page: PathBuf,
}

struct Picture {
    width: usize,
    pixels: Vec<Rgb>,
}

impl Browser {
    fn open(page: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("report.html");
        fs::write(&path, page).unwrap();
        Self { place, page: path }
    }

    /// Runs Chromium to its end; what it printed.
    fn run(&self, width: u32, dark: bool, action: &str) -> String {
        let (out, home) = (self.place.path().join("stdout"), self.place.path());
        let mut child = Command::new("chromium")
            // As root, in a container, there is no sandbox; the page is our own.
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--no-first-run",
                // Messages are delivered before the page counts as done.
                "--virtual-time-budget=2000",
            ])
            .arg(format!("--user-data-dir={}", home.join("profile").display()))
            .arg(format!("--window-size={width},{HEIGHT}"))
            .arg(format!("--blink-settings=preferredColorScheme={}", u8::from(!dark)))
            .args([action, &format!("file://{}", self.page.display())])
            .env("HOME", home)
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(home.join("stderr")).unwrap())
            .spawn()
            .expect("this test needs chromium, which cargo xtask test installs (apt-get install chromium)");
        let end = Instant::now() + Duration::from_secs(120);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > end => {
                    child.kill().unwrap();
                    panic!("chromium did not end")
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let said = fs::read_to_string(home.join("stderr")).unwrap_or_default();
        assert!(status.success(), "{said}");
        fs::read_to_string(out).unwrap()
    }

    fn picture(&self, width: u32, dark: bool) -> Picture {
        let file = self.place.path().join("picture.png");
        self.run(width, dark, &format!("--screenshot={}", file.display()));
        // HUSK_TEST_PICTURES is a directory to look at them.
        if let Some(keep) = std::env::var_os("HUSK_TEST_PICTURES") {
            let scheme = if dark { "dark" } else { "light" };
            fs::copy(
                &file,
                Path::new(&keep).join(format!("{width}-{scheme}.png")),
            )
            .unwrap();
        }
        let mut decoder = png::Decoder::new(std::io::BufReader::new(File::open(file).unwrap()));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        assert_eq!((info.width, info.height), (width, HEIGHT));
        let pixel = info.color_type.samples();
        Picture {
            width: width as usize,
            pixels: bytes
                .chunks_exact(pixel)
                .map(|pixel| [pixel[0], pixel[1], pixel[2]])
                .collect(),
        }
    }

    /// What `script`, an expression, comes to in the page.
    ///
    /// The page is in a frame, because a window of Chromium's is no narrower than 500 pixels.
    fn ask(&self, width: u32, dark: bool, script: &str) -> String {
        let page = fs::read_to_string(&self.page).unwrap();
        let scripted = page.replace(POLICY, "");
        assert_ne!(scripted, page);
        let tell = format!("<script>parent.postMessage(({script}), '*')</script></body>");
        let frame = format!(
            "<!doctype html><meta name=\"color-scheme\" content=\"light dark\"><title></title>\
             <script>onmessage = told => {{ document.title = told.data }}</script>\
             <iframe src=\"asked.html\" style=\"border:0;width:{width}px;height:{HEIGHT}px\"></iframe>"
        );
        let outer = Self::open(&frame);
        let asked = outer.page.with_file_name("asked.html");
        fs::write(asked, scripted.replace("</body>", &tell)).unwrap();
        let dom = outer.run(1400, dark, "--dump-dom");
        let (_, title) = dom.split_once("<title>").unwrap();
        title.split_once("</title>").unwrap().0.to_owned()
    }
}

impl Picture {
    fn rows(&self) -> impl Iterator<Item = &[Rgb]> {
        self.pixels.chunks_exact(self.width)
    }

    fn count(&self, colour: Rgb) -> usize {
        self.pixels.iter().filter(|pixel| **pixel == colour).count()
    }

    /// Of each stack of bars, from top to bottom, how wide each colour is in it.
    fn stacks(&self, colours: &[Rgb]) -> Vec<Vec<usize>> {
        let mut stacks: Vec<Vec<usize>> = Vec::new();
        let mut height = 0;
        for row in self.rows() {
            let widths: Vec<usize> = colours
                .iter()
                .map(|colour| row.iter().filter(|pixel| *pixel == colour).count())
                .collect();
            // A swatch is smaller.
            if widths.iter().filter(|width| **width > 14).count() < 3 {
                height = 0;
                continue;
            }
            height += 1;
            // Not at the edge, which may be smoothed.
            if height == 10 {
                stacks.push(widths);
            }
        }
        stacks
    }
}

fn colour(name: &str, dark: bool) -> Rgb {
    let block = STYLE
        .split("@media(prefers-color-scheme:dark)")
        .nth(usize::from(dark))
        .unwrap();
    let (_, value) = block.split_once(&format!("--{name}:#")).unwrap();
    [0, 2, 4].map(|at| u8::from_str_radix(&value[at..at + 2], 16).unwrap())
}

fn pages() -> (String, String) {
    let before = common::report(1, &STEPS);
    let after = common::report(5, &steps_with(Phase::HandsOver, SLOWER));
    let comparisons = compare::reports(&before, &after, 0.05).unwrap();
    let both = html::render(&[("before", &before), ("after", &after)], &comparisons);
    (html::render(&[("now", &before)], &[]), both)
}

#[test]
fn it_is_drawn_to_scale_in_light_and_in_dark() {
    let browser = Browser::open(&pages().1);
    for (width, dark) in [(360, false), (360, true), (1200, false), (1200, true)] {
        let picture = browser.picture(width, dark);
        let ground = colour("bg", dark);
        assert_eq!(picture.pixels[0], ground, "{width}, dark {dark}");
        // Most of it, and nothing of the other scheme's.
        assert!(picture.count(ground) * 10 > picture.pixels.len() * 7);
        assert_eq!(picture.count(colour("bg", !dark)), 0);
        assert!(picture.count(colour("ink", dark)) > 2000);
        assert!(
            picture.count(colour("bad", dark)) > 200,
            "the verdict's colour"
        );

        let phases =
            ["vm_ready", "first_console_byte", "hands_over", "mark"].map(|name| colour(name, dark));
        let stacks = picture.stacks(&phases);
        assert_eq!(stacks.len(), 2, "{stacks:?}");
        let nominal = [3.2, 14.0, 21.0, 9.0];
        // The longer one fills the width: 840 or 360 less 16 on both sides.
        let whole = 52.5 + 21.0 * (SLOWER - 1.0);
        let scale = f64::from(width.min(840) - 32) / whole;
        for (stack, slower) in stacks.iter().zip([1.0, SLOWER]) {
            for (at, (&pixels, nominal)) in stack.iter().zip(nominal).enumerate() {
                let nominal = if at == 2 { nominal * slower } else { nominal } * scale;
                let off = pixels as f64 - nominal;
                // Two per cent are the noise in the sample; two pixels are a gap and smoothed edges.
                assert!(
                    off.abs() < nominal * 0.03 + 2.5,
                    "{width}, dark {dark}, {at}: {pixels}, not {nominal}"
                );
            }
        }
    }
}

/// Two monitors whose runs took turns, of which one shows fewer phases, by the virtual clock.
fn turns() -> String {
    let mut report = common::report(1, &STEPS);
    report.clock = Clock::Virtual;
    let foreign = [STEPS[0], STEPS[5], STEPS[6], STEPS[7]];
    let mut other = common::subject("another-monitor", 9, 31, &foreign);
    other
        .command
        .push("--configuration=/a/long/path/without/a/place/to/break/it/configuration.json".into());
    other.runs[3].phases.insert(Phase::Mark, 190_000_000);
    report.subjects.push(other);
    let comparisons = compare::pairs(&report, 0.01).unwrap();
    html::render(&[("now", &report)], &comparisons)
}

/// What sticks out of the window, lists that scroll, and numbers of one drawing that lie over each other.
const MISFITS: &str = "[innerWidth, document.documentElement.scrollWidth, matchMedia('(prefers-color-scheme: dark)').matches, \
     [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length, \
     [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length, \
     [...document.querySelectorAll('svg')].filter(e => { \
        const boxes = [...e.querySelectorAll(':scope > text')].map(t => t.getBoundingClientRect()); \
        return boxes.some((a, n) => boxes.some((b, m) => \
            n < m && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)); \
     }).length].join(' ')";

#[test]
fn nothing_is_wider_than_a_phone() {
    let (one, both) = pages();
    for (page, width) in [(&one, 360), (&both, 360), (&turns(), 360), (&both, 1200)] {
        let answer = Browser::open(page).ask(width, true, MISFITS);
        assert_eq!(answer, format!("{width} {width} true 0 0 0"));
    }
}

#[test]
fn a_hostile_console_does_nothing() {
    let browser = Browser::open(&pages().1);
    // Without the page's policy, nothing but escaping stands in the way.
    let answer = browser.ask(
        1200,
        false,
        "[document.title, document.scripts.length, document.images.length, document.querySelectorAll('pre *').length, \
         document.querySelector('pre').textContent.includes(\"</pre><script>document.title='taken'<\\/script>\")].join('|')",
    );
    assert_eq!(answer, "slower: Boot time of husk|1|0|0|true");
    // And the policy alone would do: a script of the page's own does not run.
    let page = fs::read_to_string(&browser.page).unwrap();
    let scripted = page.replace("</body>", "<script>document.title='taken'</script></body>");
    let dom = Browser::open(&scripted).run(1200, false, "--dump-dom");
    assert!(dom.contains("<title>slower: Boot time of husk</title>"));
}
