//! The grammar of durations and sizes, shared by the command line and the API.
//!
//! Durations are `^\d+(ms|s|m|h|d)?$`, a bare number meaning seconds. Sizes are `^\d+(mb|m|gb|g)?$` in either case, a
//! bare number meaning MB; they are kept as MiB, which is what a machine is given.

use std::time::Duration;

/// Longest duration accepted: a hundred years, so that no arithmetic on deadlines can overflow.
const MAX_SECONDS: u64 = 100 * 365 * 86_400;

/// Parses `90s`, `10m`, `1h`, `7d`, `250ms` or a bare number of seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_number(text)
        .ok_or_else(|| format!("'{text}' is not a duration; write a number and ms, s, m, h or d, such as 10m"))?;
    let scale_ms = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(format!("'{text}' has an unknown unit '{unit}'; use ms, s, m, h or d")),
    };
    match number.checked_mul(scale_ms) {
        Some(ms) if ms <= MAX_SECONDS * 1_000 => Ok(Duration::from_millis(ms)),
        _ => Err(format!("'{text}' is too long; the longest duration is 36500d")),
    }
}

/// Parses `512`, `512mb`, `4gb` into MiB. Zero is refused.
pub fn parse_size_mib(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (number, unit) = split_number(&lower)
        .ok_or_else(|| format!("'{text}' is not a size; write a number and mb or gb, such as 4gb"))?;
    let scale = match unit {
        "" | "m" | "mb" => 1,
        "g" | "gb" => 1_024,
        _ => return Err(format!("'{text}' has an unknown unit '{unit}'; use mb or gb")),
    };
    match number.checked_mul(scale) {
        Some(0) => Err(format!("'{text}' is zero; a size must be at least 1mb")),
        // 64 TiB: beyond any disk or memory a machine here is given, far below any overflow in bytes.
        Some(mib) if mib <= 64 << 20 => Ok(mib),
        _ => Err(format!("'{text}' is too large; the largest size is 65536gb")),
    }
}

/// `1h 5m`, `10m`, `45s`, `120ms`: at most two units, for people.
pub fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let pair = |a: u64, a_unit: &str, b: u64, b_unit: &str| {
        if b == 0 { format!("{a}{a_unit}") } else { format!("{a}{a_unit} {b}{b_unit}") }
    };
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3_600 => pair(seconds / 60, "m", seconds % 60, "s"),
        3_600..86_400 => pair(seconds / 3_600, "h", seconds % 3_600 / 60, "m"),
        _ => pair(seconds / 86_400, "d", seconds % 86_400 / 3_600, "h"),
    }
}

/// `0 B`, `512 B`, `4.0 KiB`, `1.3 GiB`, for people.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1_024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1_024.0;
    let mut unit = 0;
    while value >= 1_024.0 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn split_number(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    // Twelve digits are more than any unit needs, and leave room to multiply.
    if digits == 0 || digits > 12 {
        return None;
    }
    Some((text[..digits].parse().ok()?, &text[digits..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_follow_the_grammar() {
        for (text, ms) in [
            ("0", 0),
            ("90", 90_000),
            ("250ms", 250),
            ("45s", 45_000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in
            ["", "h", "1w", "1.5h", "-1s", "1 h", "1h30m", " 1h", "1H", "999999999999d", "99999999999999999999s", "١h"]
        {
            assert!(parse_duration(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn sizes_follow_the_grammar() {
        for (text, mib) in
            [("1", 1), ("512", 512), ("512mb", 512), ("512m", 512), ("4gb", 4_096), ("4g", 4_096), ("4GB", 4_096)]
        {
            assert_eq!(parse_size_mib(text), Ok(mib), "{text}");
        }
        for text in
            ["", "gb", "4tb", "4kb", "1.5gb", "-4gb", "4 gb", "0", "0gb", "999999999999gb", "99999999999999999999"]
        {
            assert!(parse_size_mib(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn people_read_short_forms() {
        let shown = |s| show_duration(Duration::from_secs(s));
        assert_eq!(
            [shown(0), shown(45), shown(600), shown(3_900), shown(90_000)],
            ["0ms", "45s", "10m", "1h 5m", "1d 1h"]
        );
        assert_eq!(show_bytes(512), "512 B");
        assert_eq!(show_bytes(4_096), "4.0 KiB");
        assert_eq!(show_bytes(1_400_000_000), "1.3 GiB");
    }
}
