//! What labs of dead processes left behind, for the rare case that their guardian died with them.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mesh_hostnet::netns;

/// Directories hold the logs of a failure: they stay this long.
const KEEP_LOGS: Duration = Duration::from_secs(3600);

/// Removes namespaces and old directories whose process does not exist any more.
pub(super) fn remove(directory: &Path) {
    for name in netns::list_named().unwrap_or_default() {
        if is_dead(&name) {
            let _ = netns::delete_named(&name);
        }
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|meta| meta.modified()).map(|time| SystemTime::now().duration_since(time));
        let old = matches!(age, Ok(Ok(age)) if age > KEEP_LOGS);
        if old && entry.file_name().to_str().is_some_and(is_dead) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether `name` is a lab's, `mtPID-...`, and its process is gone.
fn is_dead(name: &str) -> bool {
    let number = name.strip_prefix("mt").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid.parse::<u32>());
    matches!(number, Some(Ok(pid)) if !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labs_of_the_dead_are_leftovers() {
        let own = std::process::id();
        assert!(!is_dead(&format!("mt{own}-0-x-a")));
        // Above the kernel's largest process id.
        assert!(is_dead("mt4194305-0-x-a"));
        for other in ["mt-0-x", "mesh4194305-0", "mtx-0", "mt4194305", "cni-1234"] {
            assert!(!is_dead(other), "{other}");
        }
    }
}
