//! Lanes on cores of their own.

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use tracing::{debug, warn};

/// Keeps the calling thread on one core of those it may use: the one of this number, round and round.
pub(super) fn pin(lane: usize) {
    let this = Pid::from_raw(0);
    let pinned = sched_getaffinity(this).and_then(|allowed| {
        let cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false));
        let cores: Vec<usize> = cores.collect();
        let core = *cores.get(lane % cores.len().max(1)).ok_or(Errno::EINVAL)?;
        let mut only = CpuSet::new();
        only.set(core)?;
        sched_setaffinity(this, &only).map(|()| core)
    });
    match pinned {
        Ok(core) => debug!(lane, core, "lane pinned"),
        Err(error) => warn!(lane, %error, "lane cannot be pinned"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn each_lane_has_one_core_and_none_more_than_its_share() {
        let mut taken = std::collections::BTreeMap::<usize, usize>::new();
        let cores = std::thread::available_parallelism().unwrap().get();
        for lane in 0..2 * cores {
            let core = std::thread::spawn(move || {
                pin(lane);
                let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
                let cores: Vec<usize> = (0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap()).collect();
                assert_eq!(cores.len(), 1);
                cores[0]
            });
            *taken.entry(core.join().unwrap()).or_default() += 1;
        }
        assert!(taken.values().all(|lanes| *lanes == 2), "{taken:?}");
    }
}
