//! What a lane waits for: its descriptors and a point in time.
//!
//! The timer of the kernel is set only when something is due earlier than it is: a lane's timers move with each packet,
//! nearly always to later, and a system call for each would cost more than waking once in a while for nothing.

use std::{io, os::fd::BorrowedFd, time::Duration};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::clock::Instant;

/// What may be done without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Ready {
    pub(super) bell: bool,
    pub(super) socket: bool,
    /// The socket's direct way.
    pub(super) direct: bool,
    pub(super) queue: bool,
}

impl Ready {
    pub(super) fn is_any(self) -> bool {
        self.bell || self.socket || self.direct || self.queue
    }
}

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Source {
    Bell,
    Socket,
    Direct,
    Queue,
    Timer,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Waiter {
    epoll: Epoll,
    timer: TimerFd,
    /// When the timer goes off.
    set: Option<Instant>,
}

impl Waiter {
    /// Waits for nothing yet.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?;
        epoll.add(&timer, event(Source::Timer))?;
        Ok(Self { epoll, timer, set: None })
    }

    /// Waits for this too from now on.
    ///
    /// # Errors
    ///
    /// If the system has no memory, or the user may watch no more descriptors.
    pub(super) fn watch(&self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self.epoll.add(fd, event(source)) {
            Err(Errno::EEXIST) => Ok(()),
            added => Ok(added?),
        }
    }

    /// Waits for it no more. To be called before it is closed: somebody else may have it open still.
    pub(super) fn forget(&self, fd: BorrowedFd<'_>) {
        // It may not be watched.
        let _ = self.epoll.delete(fd);
    }

    /// Waits until something is ready or `due` has come. Calling with a later `due` than last time may end early.
    pub(super) fn wait(&mut self, due: Option<Instant>) -> Ready {
        if let Some(due) = due
            && self.set.is_none_or(|set| due < set)
        {
            // Zero would switch it off.
            let at = TimeSpec::from(due.since_start().max(Duration::from_nanos(1)));
            self.set = self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME).ok().map(|()| due);
            if self.set.is_none() {
                return self.look();
            }
        }
        self.ready(EpollTimeout::NONE)
    }

    /// What is ready now.
    pub(super) fn look(&mut self) -> Ready {
        self.ready(EpollTimeout::ZERO)
    }

    fn ready(&mut self, timeout: EpollTimeout) -> Ready {
        let mut events = [EpollEvent::empty(); 5];
        // Interrupted: nothing is ready.
        let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
        let mut ready = Ready::default();
        for event in &events[..count] {
            match event.data() {
                source if source == Source::Bell as u64 => ready.bell = true,
                source if source == Source::Socket as u64 => ready.socket = true,
                source if source == Source::Direct as u64 => ready.direct = true,
                source if source == Source::Queue as u64 => ready.queue = true,
                _ => {
                    // It stays ready until it is read or set anew.
                    let _ = self.timer.unset();
                    self.set = None;
                }
            }
        }
        ready
    }
}

fn event(source: Source) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN, source as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::fd::AsFd;

    use nix::sys::eventfd::EventFd;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn it_waits_for_what_it_is_told_and_no_longer() {
        let (bell, queue) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let mut waiter = Waiter::new().unwrap();
        waiter.watch(Source::Bell, bell.as_fd()).unwrap();
        waiter.watch(Source::Queue, queue.as_fd()).unwrap();
        waiter.watch(Source::Queue, queue.as_fd()).unwrap();
        assert_eq!(waiter.look(), Ready::default());
        queue.write(1).unwrap();
        assert_eq!(waiter.wait(Some(Instant::now() + LONG)), Ready { queue: true, ..Ready::default() });
        bell.write(1).unwrap();
        assert_eq!(waiter.wait(None), Ready { queue: true, bell: true, ..Ready::default() });
        waiter.forget(queue.as_fd());
        waiter.forget(queue.as_fd());
        assert_eq!(waiter.look(), Ready { bell: true, ..Ready::default() });
    }

    #[test]
    fn time_comes_also_when_it_is_earlier_than_what_was_waited_for_before() {
        let mut waiter = Waiter::new().unwrap();
        let began = Instant::now();
        let bell = EventFd::new().unwrap();
        bell.write(1).unwrap();
        waiter.watch(Source::Bell, bell.as_fd()).unwrap();
        assert!(waiter.wait(Some(began + LONG)).bell);
        waiter.forget(bell.as_fd());
        for due in [began + Duration::from_millis(30), began + Duration::from_millis(20), began] {
            assert_eq!(waiter.wait(Some(due)), Ready::default());
            assert!(Instant::now() >= due);
        }
        assert!(Instant::now().since(began) < LONG);
    }

    #[test]
    fn a_timer_that_went_off_does_so_once() {
        let mut waiter = Waiter::new().unwrap();
        assert!(!waiter.wait(Some(Instant::now())).is_any());
        let bell = EventFd::new().unwrap();
        bell.write(1).unwrap();
        waiter.watch(Source::Bell, bell.as_fd()).unwrap();
        // Nothing is due: what woke it is the bell.
        assert!(waiter.wait(None).bell);
        assert_eq!(waiter.set, None);
    }
}
