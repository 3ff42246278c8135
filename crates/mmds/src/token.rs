//! Session tokens of version 2.
//!
//! A token says itself until when it is good, under a seal (HMAC-SHA256) whose key nobody but this VM's service has. So the
//! service remembers no token: a guest may ask for as many as it likes, none of them pushes out another, and all are forgotten
//! with the key when the VM ends.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Least and most seconds that a token may be good for.
pub const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;

const CONTENT: usize = 16;
const SEAL: usize = 20;
const TOKEN: usize = CONTENT + SEAL;

/// The maker and judge of tokens.
pub struct Tokens {
    key: [u8; 32],
    /// Times in tokens are milliseconds since then.
    epoch: Instant,
    /// Tokens issued, which makes each unlike all others.
    count: AtomicU64,
}

impl Tokens {
    /// With a new random key.
    pub fn new(now: Instant) -> std::io::Result<Self> {
        let mut key = [0; 32];
        crate::fill_random(&mut key)?;
        Ok(Self {
            key,
            epoch: now,
            count: AtomicU64::new(0),
        })
    }

    /// A new token that is good for `seconds`; None when that is not in [`TTL`].
    pub fn issue(&self, seconds: u32, now: Instant) -> Option<String> {
        if !TTL.contains(&seconds) {
            return None;
        }
        let expiry = self.since_epoch(now + Duration::from_secs(seconds.into()));
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let mut content = [0; CONTENT];
        let (first, second) = content.split_at_mut(8);
        first.copy_from_slice(&expiry.to_le_bytes());
        second.copy_from_slice(&count.to_le_bytes());
        let seal = self.mac(&content)?.finalize().into_bytes();
        Some(hex(content.iter().chain(seal.iter().take(SEAL))))
    }

    /// Whether `token` came from here and is good still.
    pub fn is_valid(&self, token: &[u8], now: Instant) -> bool {
        let Some(bytes) = from_hex(token) else {
            return false;
        };
        let (content, seal) = bytes.split_at(CONTENT);
        // In constant time: how much of a guess was right does not show.
        let genuine = self
            .mac(content)
            .is_some_and(|mac| mac.verify_truncated_left(seal).is_ok());
        let expiry = content.first_chunk().map_or(0, |e| u64::from_le_bytes(*e));
        genuine && self.since_epoch(now) < expiry
    }

    fn mac(&self, content: &[u8]) -> Option<Hmac<Sha256>> {
        // HMAC takes keys of any length.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).ok()?;
        mac.update(content);
        Some(mac)
    }

    fn since_epoch(&self, time: Instant) -> u64 {
        let passed = time.saturating_duration_since(self.epoch).as_millis();
        u64::try_from(passed).unwrap_or(u64::MAX)
    }
}

fn hex<'a>(bytes: impl Iterator<Item = &'a u8>) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16);
    bytes
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .flatten()
        .collect()
}

fn from_hex(text: &[u8]) -> Option<[u8; TOKEN]> {
    let (pairs, []) = text.as_chunks::<2>() else {
        return None;
    };
    if pairs.len() != TOKEN {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16).map(|value| value as u8);
    let mut bytes = [0; TOKEN];
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(high)? << 4 | digit(low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_time_and_not_longer() {
        let start = Instant::now();
        let tokens = Tokens::new(start).unwrap();
        let later = start + Duration::from_millis(1500);
        let token = tokens.issue(60, later).unwrap();
        let good = |time| tokens.is_valid(token.as_bytes(), time);
        assert!(good(later));
        assert!(good(later + Duration::from_millis(59_999)));
        assert!(!good(later + Duration::from_secs(60)));
        assert!(!good(later + Duration::from_secs(100_000)));
        for (seconds, allowed) in [(0, false), (1, true), (21_600, true), (21_601, false)] {
            assert_eq!(tokens.issue(seconds, start).is_some(), allowed, "{seconds}");
        }
        assert!(tokens.issue(u32::MAX, start).is_none());
    }

    #[test]
    fn a_token_cannot_be_made_up_or_changed_or_brought_along() {
        let now = Instant::now();
        let tokens = Tokens::new(now).unwrap();
        let token = tokens.issue(60, now).unwrap();
        assert_ne!(token, tokens.issue(60, now).unwrap());
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(&changed, now), "digit {at}");
        }
        for bad in ["", "0", "zz", &token[1..], &format!("{token}00")] {
            assert!(!tokens.is_valid(bad.as_bytes(), now), "{bad}");
        }
        assert!(!tokens.is_valid(&[0xff; 2 * TOKEN], now));
        // Another VM's.
        assert!(!Tokens::new(now).unwrap().is_valid(token.as_bytes(), now));
    }
}
