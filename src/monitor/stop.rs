//! How a container is stopped: one polite signal, a deadline, then SIGKILL until it is gone. Pure: it has no clock and sends
//! nothing.
//!
//! ```text
//!   begin ──▶ waiting ──deadline──▶ killing ──▶ killing ──▶ … until init is reaped
//!               │  ▲                   20 ms, 40 ms, … 2 s apart
//!               └──┘ again: the earlier deadline holds
//! ```
//! The polite signal is sent once however often a stop is asked for, and nothing undoes a stop that has begun.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// A stop under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// When SIGKILL is sent: first, or next.
    next: Instant,
    /// The pause after that, once killing has begun.
    pause: Option<Duration>,
}

/// What is to be done at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    Wait,
    /// Send init the signal that was asked for.
    Signal,
    /// Kill everything in the container.
    Kill,
}

impl Stop {
    /// Begins a stop. No grace: SIGKILL at once.
    pub fn begin(grace: Duration, now: Instant) -> (Self, Act) {
        let mut stop = Self { next: after(now, grace), pause: None };
        match stop.due(now) {
            Act::Kill => (stop, Act::Kill),
            Act::Wait | Act::Signal => (stop, Act::Signal),
        }
    }

    /// Somebody else asks for a stop too, with a grace period from now on.
    pub fn again(&mut self, grace: Duration, now: Instant) -> Act {
        if self.pause.is_none() {
            self.next = self.next.min(after(now, grace));
        }
        self.due(now)
    }

    /// What the time makes necessary.
    pub fn due(&mut self, now: Instant) -> Act {
        if now < self.next {
            return Act::Wait;
        }
        let pause = self.pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LAST_PAUSE));
        self.pause = Some(pause);
        self.next = now + pause;
        Act::Kill
    }

    /// Killing once was not enough.
    pub fn kills_again(&self) -> bool {
        self.pause.is_some_and(|pause| pause > FIRST_PAUSE)
    }

    /// When to ask again.
    pub fn next(&self) -> Instant {
        self.next
    }
}

/// A grace period may be any number that fits a message; a year is as good as for ever.
fn after(now: Instant, grace: Duration) -> Instant {
    now + grace.min(Duration::from_secs(366 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Stops asked for at times (ms) with grace (ms), and what is done when, until `end`.
    fn check(asked: &[(u64, u64)], end: u64, want: &[(u64, Act)]) {
        let start = Instant::now();
        let (mut stop, act) = Stop::begin(ms(asked[0].1), start + ms(asked[0].0));
        let mut done = vec![(asked[0].0, act)];
        let mut rest = &asked[1..];
        loop {
            let next = (stop.next() - start).as_millis() as u64;
            let now = rest.first().map_or(next, |(at, _)| next.min(*at));
            if now > end {
                break;
            }
            let act = match rest.split_first() {
                Some(((at, grace), tail)) if *at == now => {
                    rest = tail;
                    stop.again(ms(*grace), start + ms(now))
                }
                _ => stop.due(start + ms(now)),
            };
            done.push((now, act));
        }
        done.retain(|(_, act)| *act != Act::Wait);
        assert_eq!(done, want, "{asked:?}");
    }

    #[test]
    fn a_signal_then_kills_further_and_further_apart() {
        use Act::{Kill, Signal};
        check(&[(0, 1000)], 999, &[(0, Signal)]);
        check(&[(0, 1000)], 1150, &[(0, Signal), (1000, Kill), (1020, Kill), (1060, Kill), (1140, Kill)]);
        check(&[(5, 0)], 30, &[(5, Kill), (25, Kill)]);
        let start = Instant::now();
        let (mut stop, _) = Stop::begin(ms(0), start);
        for _ in 0..20 {
            let now = stop.next();
            stop.due(now);
            assert!(stop.next() - now <= LAST_PAUSE);
        }
        assert_eq!(stop.pause, Some(LAST_PAUSE));
    }

    #[test]
    fn another_call_only_shortens_the_deadline() {
        use Act::{Kill, Signal};
        check(&[(0, 1000), (100, 200)], 310, &[(0, Signal), (300, Kill)]);
        check(&[(0, 1000), (100, 5000)], 1010, &[(0, Signal), (1000, Kill)]);
        check(&[(0, 1000), (100, 0)], 110, &[(0, Signal), (100, Kill)]);
        check(&[(0, 1000), (100, 5000), (200, 300)], 510, &[(0, Signal), (500, Kill)]);
        // A stop during the killing changes nothing.
        check(&[(0, 0), (10, 0)], 61, &[(0, Kill), (20, Kill), (60, Kill)]);
    }

    #[test]
    fn any_grace_fits() {
        let (stop, act) = Stop::begin(Duration::from_millis(u64::MAX), Instant::now());
        assert_eq!(act, Act::Signal);
        assert!(stop.next() > Instant::now() + Duration::from_secs(3600));
    }
}
