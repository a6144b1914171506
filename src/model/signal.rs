//! Signals by name, as images and the CRI write them.

/// Names without `SIG` of the signals 1 to 31 (signal(7), x86 and Arm).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT",
    "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// The number of `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAX-1`; in any case.
pub fn parse(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, sign: char| if rest.is_empty() { Some(0) } else { rest.strip_prefix(sign)?.parse::<u32>().ok() };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return RTMIN.checked_add(offset(rest, '+')?).filter(|n| *n <= RTMAX);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return RTMAX.checked_sub(offset(rest, '-')?).filter(|n| *n >= RTMIN);
    }
    match name {
        "CLD" => Some(17),
        "IOT" => Some(6),
        "POLL" => Some(29),
        _ => NAMES.iter().position(|known| *known == name).map(|index| index as u32 + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        let check = |text: &str, want: Option<u32>| assert_eq!(parse(text), want, "{text}");
        check("SIGTERM", Some(15));
        check("quit", Some(3));
        check("9", Some(9));
        check("SIGRTMIN", Some(34));
        check("SIGRTMIN+3", Some(37));
        check("RTMAX-14", Some(50));
        check("SIGPOLL", Some(29));
        for bad in ["", "0", "65", "SIGFOO", "SIGRTMIN+99", "SIGRTMAX+1", "SIGRTMIN3"] {
            check(bad, None);
        }
    }
}
