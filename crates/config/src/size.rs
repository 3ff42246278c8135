use crate::Error;

/// Parse a memory size such as `512M`, `2G`, `1T` or `512` (MiB) into MiB.
///
/// Units are binary; `MiB`, `MB` and `M` mean the same, in either case. Fractions of a MiB are refused.
pub fn parse_mib(text: &str) -> Result<u64, Error> {
    let wrong = || Error::Size(text.to_owned());
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = text.get(digits.len()..).ok_or_else(wrong)?;
    let unit = unit.to_ascii_lowercase();
    let (multiply, divide) = match unit.as_str() {
        "k" | "kb" | "kib" => (1, 1024),
        "" | "m" | "mb" | "mib" => (1, 1),
        "g" | "gb" | "gib" => (1024, 1),
        "t" | "tb" | "tib" => (1024 * 1024, 1),
        _ => return Err(wrong()),
    };
    if !number.is_multiple_of(divide) {
        return Err(wrong());
    }
    (number / divide).checked_mul(multiply).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, mib) in [
            ("512", 512),
            ("512M", 512),
            ("512MiB", 512),
            ("512mb", 512),
            ("2G", 2048),
            ("1t", 1 << 20),
            ("4096K", 4),
            ("0", 0),
        ] {
            assert_eq!(parse_mib(text).unwrap(), mib, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "1 G",
            "1X",
            "1023K",
            "18446744073709551615G",
            "9e9",
            "1GG",
            "0x10",
            "512b",
            "512ib",
        ] {
            assert!(parse_mib(text).is_err(), "{text}");
        }
    }
}
