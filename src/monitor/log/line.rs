//! One line of a CRI log: `2026-11-23T10:00:00.123456789Z stdout F content` and a newline.
//!
//! The format is that of kubelet's log reader (`k8s.io/cri-client/pkg/logs`): a time in RFC 3339 with nanoseconds, the
//! stream's name, `F` for a line that is complete or `P` for a part that goes on in the stream's next line, and the
//! content. Everything before the content has one length here, so that lines can be found and counted in a buffer.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Bytes before a line's content.
pub const HEADER: usize = STAMP + 10;
/// Bytes of a time.
pub const STAMP: usize = 30;
/// Where in the header `F` or `P` stands.
const TAG: usize = HEADER - 2;

/// The stream that a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and everything from a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A time as text.
pub type Stamp = [u8; STAMP];

/// The time now.
pub fn now() -> Stamp {
    stamp(clock_gettime(ClockId::Realtime))
}

/// A time in UTC, with nine digits of a second.
pub fn stamp(time: Timespec) -> Stamp {
    let seconds = time.tv_sec.max(0);
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    let mut put = |at: usize, digits: usize, mut value: i64| {
        for place in (at..at + digits).rev() {
            text[place] = b'0' + (value % 10) as u8;
            value /= 10;
        }
    };
    put(0, 4, year);
    put(5, 2, month);
    put(8, 2, day);
    put(11, 2, second / 3600);
    put(14, 2, second / 60 % 60);
    put(17, 2, second % 60);
    put(20, 9, time.tv_nsec.clamp(0, 999_999_999));
    text
}

/// Year, month and day of a day since 1970 in the Gregorian calendar. The year is taken to begin in March, which puts the
/// leap day at its end; 400 of them have 146097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Appends a line whose content is `head` and `tail` together; neither has a newline.
pub fn push(out: &mut Vec<u8>, stamp: &Stamp, stream: Stream, full: bool, head: &[u8], tail: &[u8]) {
    let mut header = *b"0000-00-00T00:00:00.000000000Z stdout F ";
    header[..STAMP].copy_from_slice(stamp);
    if stream == Stream::Stderr {
        header[STAMP + 1..STAMP + 7].copy_from_slice(b"stderr");
    }
    if !full {
        header[TAG] = b'P';
    }
    out.extend_from_slice(&header);
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

/// How much a container had written to fill these lines: bytes (the newline of a full line is its own), and lines.
pub fn measure(lines: &[u8]) -> (u64, u64) {
    lines.split_inclusive(|&b| b == b'\n').fold((0, 0), |(bytes, count), line| {
        let content = line.len().saturating_sub(HEADER + 1) + usize::from(line.get(TAG) == Some(&b'F'));
        (bytes + content as u64, count + 1)
    })
}

/// Whether text begins with a whole header, so that a newline at its end makes it a line.
pub fn has_header(text: &[u8]) -> bool {
    text.len() >= HEADER
        && text[..STAMP].ends_with(b"Z")
        && matches!(&text[STAMP..HEADER], b" stdout F " | b" stdout P " | b" stderr F " | b" stderr P ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let check = |tv_sec: i64, tv_nsec: i64, want: &str| {
            assert_eq!(std::str::from_utf8(&stamp(Timespec { tv_sec, tv_nsec })).unwrap(), want);
        };
        check(0, 0, "1970-01-01T00:00:00.000000000Z");
        check(951_782_399, 1, "2000-02-28T23:59:59.000000001Z");
        check(951_782_400, 0, "2000-02-29T00:00:00.000000000Z");
        check(951_868_800, 0, "2000-03-01T00:00:00.000000000Z");
        check(1_795_428_000, 123_456_789, "2026-11-23T10:00:00.123456789Z");
        check(4_107_542_399, 999_999_999, "2100-02-28T23:59:59.999999999Z");
        check(4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z");
        check(-5, -5, "1970-01-01T00:00:00.000000000Z");
    }

    #[test]
    fn lines_have_the_format_and_are_measured() {
        let mut out = Vec::new();
        let time = stamp(Timespec { tv_sec: 0, tv_nsec: 7 });
        push(&mut out, &time, Stream::Stdout, true, b"he", b"llo");
        push(&mut out, &time, Stream::Stderr, false, b"", b"part");
        push(&mut out, &time, Stream::Stdout, true, b"", b"");
        let want = "1970-01-01T00:00:00.000000007Z stdout F hello\n\
                    1970-01-01T00:00:00.000000007Z stderr P part\n\
                    1970-01-01T00:00:00.000000007Z stdout F \n";
        assert_eq!(std::str::from_utf8(&out).unwrap(), want);
        assert_eq!(measure(&out), (6 + 4 + 1, 3));
        assert!(has_header(&out));
        assert!(!has_header(&out[1..]) && !has_header(&out[..HEADER - 1]));
    }
}
