use super::*;
use crate::sample;

#[test]
fn quantiles_are_those_of_the_books() {
    // R: quantile(1:10, c(.5, .9, .99)).
    let ten: Vec<u64> = (1..=10).collect();
    assert_eq!(quantile(&ten, 0.5), 5.5);
    assert!((quantile(&ten, 0.9) - 9.1).abs() < 1e-12);
    assert!((quantile(&ten, 0.99) - 9.91).abs() < 1e-12);
    // The worked example of linear interpolation between closest ranks in many a text: 29.
    assert!((quantile(&[15, 20, 35, 40, 50], 0.4) - 29.0).abs() < 1e-12);
    assert_eq!(quantile(&[1, 2, 3, 4], 0.75), 3.25);
    assert_eq!((quantile(&ten, 0.0), quantile(&ten, 1.0)), (1.0, 10.0));
    assert_eq!(quantile(&[7], 0.99), 7.0);
    assert!(quantile(&[], 0.5).is_nan());
    assert_eq!(median(&[9, 1, 5]), 5.0);
    assert_eq!(median(&[9, 1, 5, 6]), 5.5);
    assert_eq!(median(&[u64::MAX, u64::MAX]), u64::MAX as f64);
}

/// B. Efron, Bootstrap methods (1979), gives how often the median of a draw of 13 is the kth of them.
#[test]
fn draws_are_distributed_as_efron_computed() {
    let thirteen: Vec<u64> = (1..=13).rev().collect();
    let mut sample = Sample::new(&thirteen);
    let mut rng = Rng::with_seed(3);
    let (mut seen, rounds) = ([0u32; 14], 200_000);
    for _ in 0..rounds {
        seen[sample.draw(&mut rng) as usize] += 1;
    }
    for (k, p) in [
        (2, 0.0015),
        (3, 0.0142),
        (4, 0.0550),
        (5, 0.1242),
        (6, 0.1936),
        (7, 0.2230),
    ] {
        for k in [k, 14 - k] {
            let share = f64::from(seen[k]) / f64::from(rounds);
            assert!((share - p).abs() < 0.004, "{k}: {share}, {p}");
        }
    }
    // The 3rd and all below have 1.57 %. Of the 2.5 % outside, half are left for a sample of 13, so it is the 3rd to the 11th.
    let interval = summarize(&thirteen).unwrap().interval;
    assert_eq!((interval.low, interval.high), (3.0, 11.0));
}

#[test]
fn the_same_runs_yield_the_same_interval() {
    let runs = sample::noisy(&mut Rng::with_seed(4), 50e6, 30);
    assert_eq!(summarize(&runs), summarize(&runs));
    let other = sample::noisy(&mut Rng::with_seed(5), 50e6, 30);
    assert_eq!(
        contrast(&runs, &other, false, Level::P95),
        contrast(&runs, &other, false, Level::P95)
    );
    assert!(summarize(&[]).is_none());
}

/// The measure of the method: how often a 95 % interval holds the truth.
fn coverage(runs: usize, trials: u64, round: u64) -> (u32, u32) {
    let truth = sample::NOISE_MEDIAN * 50e6;
    let sample = |seed| {
        let mut values = sample::noisy(&mut Rng::with_seed(seed), 50e6, runs);
        values
            .iter_mut()
            .for_each(|value| *value = (*value + round / 2) / round * round);
        values
    };
    let (mut medians, mut ratios) = (0, 0);
    for trial in 0..trials {
        let (before, after) = (sample(1000 + 2 * trial), sample(1001 + 2 * trial));
        let interval = summarize(&before).unwrap().interval;
        // Ties: the rounded truth may lie just beside.
        let truth = (truth / round as f64).round() * round as f64;
        medians += u32::from(interval.contains(truth));
        ratios += u32::from(
            contrast(&before, &after, false, Level::P95)
                .ratio_interval
                .contains(1.0),
        );
    }
    (medians, ratios)
}

#[test]
fn intervals_hold_the_truth_as_often_as_they_say() {
    // Nominal are 380 of 400, with a standard deviation of 4.4. Of 4000, it was 3812 and 3848 with 30 runs, 3823 and 3856 with 10.
    for (runs, round) in [(30, 1), (10, 1), (ENOUGH, 1), (30, 500_000)] {
        let (medians, ratios) = coverage(runs, 400, round);
        println!("{runs} runs, to {round} ns: median {medians}, ratio {ratios} of 400");
        assert!(
            medians >= 367 && ratios >= 367,
            "{runs}, {round}: {medians} {ratios}"
        );
        // Rounded to half a millisecond, a hundredth of the whole, nearly all are ties, and intervals need be wider.
        assert!(
            round > 1 || (medians < 398 && ratios < 398),
            "{runs}: {medians} {ratios}"
        );
    }
}

#[test]
fn few_runs_claim_little() {
    for runs in 2..ENOUGH {
        let (medians, ratios) = coverage(runs, 500, 1);
        println!("{runs} runs: median {medians}, ratio {ratios} of 500");
        assert!(
            medians >= 455 && ratios >= 475,
            "{runs}: {medians} {ratios}"
        );
    }
    let one = summarize(&[5]).unwrap();
    assert_eq!(
        (one.median, one.interval.low, one.interval.high),
        (5.0, 0.0, f64::INFINITY)
    );
    let both = contrast(&[5], &[9], false, Level::P95);
    assert_eq!(
        (both.ratio_interval.low, both.ratio_interval.high),
        (0.0, f64::INFINITY)
    );
}

#[test]
fn without_noise_there_is_no_doubt() {
    let same = [41_000_007; 30];
    let summary = summarize(&same).unwrap();
    assert_eq!(
        (summary.interval.low, summary.interval.high),
        (summary.median, summary.median)
    );
    let contrast = contrast(&same, &[41_000_008; 30], false, Level::P99);
    assert_eq!(contrast.ratio_interval.low, contrast.ratio_interval.high);
    assert!(contrast.ratio_interval.low > 1.0);
    assert_eq!(contrast.delta_interval.low, 1.0);
    let none = super::contrast(&[0; 8], &[0; 8], false, Level::P95);
    assert_eq!(
        (
            none.ratio,
            none.ratio_interval.low,
            none.ratio_interval.high
        ),
        (1.0, 1.0, 1.0)
    );
    let infinite = super::contrast(&[0; 8], &[5; 8], false, Level::P95);
    assert_eq!((infinite.ratio, infinite.delta()), (f64::INFINITY, 5.0));
}

#[test]
fn pairs_cancel_what_both_met() {
    let mut rng = Rng::with_seed(6);
    // The machine slows down by a third while it is measured.
    let drift = |n: usize| 1.0 + n as f64 / 90.0;
    let series = |rng: &mut Rng, base: f64| -> Vec<u64> {
        (0..30)
            .map(|n| (base * drift(n) * (1.0 + 0.001 * rng.f64())) as u64)
            .collect()
    };
    let (before, after) = (series(&mut rng, 50e6), series(&mut rng, 51.5e6));
    let paired = contrast(&before, &after, true, Level::P95);
    let unpaired = contrast(&before, &after, false, Level::P95);
    assert!(unpaired.ratio_interval.contains(1.0), "{unpaired:?}");
    assert!(
        paired.ratio_interval.low > 1.025 && paired.ratio_interval.high < 1.035,
        "{paired:?}"
    );
}
