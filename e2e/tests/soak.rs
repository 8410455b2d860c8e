//! Mixed traffic for long, keys rotating all the while: no connection breaks, no byte changes, memory stays flat.
//!
//! `make soak` runs it for half an hour; the tests run a short form. `MESH_SOAK_SECONDS` says for how long.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::capture::new_marker;
use mesh_e2e::mesh::scenario;
use mesh_e2e::traffic::{BulkServer, BulkTransfer, Counts, Stream, ping};
use mesh_e2e::{Mesh, Pod, wait};

/// A rotation each minute, or three of them in a short run.
fn plan() -> (Duration, Duration) {
    let seconds = std::env::var("MESH_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    let total = Duration::from_secs(seconds);
    (total, Duration::from_secs(60).min(total / 3))
}

/// Datagrams that arrive in this order or not at all, of a size that fills packets and of one that does not.
struct Datagrams {
    small: Stream,
    large: Stream,
}

impl Datagrams {
    fn start(from: &Pod, to: &Pod) -> Result<Self> {
        let (marker, source, target) = (new_marker(), from.netns()?, to.netns()?);
        let forever = u64::MAX;
        Ok(Self {
            small: Stream::start(&source, &target, to.v4(), 1_000, forever, 64, marker)?,
            large: Stream::start(&source, &target, to.v6(), 500, forever, 1_200, marker)?,
        })
    }

    fn stop(self) -> Result<[Counts; 2]> {
        Ok([self.small.stop()?, self.large.stop()?])
    }
}

/// Memory of each daemon, in KiB.
fn resident(mesh: &Mesh) -> Result<Vec<u64>> {
    let of = |name: &str| mesh.node(name).daemon.as_ref().context("not running")?.resident_kib();
    ["east-1", "west-1"].into_iter().map(of).collect()
}

#[test]
fn mixed_traffic_under_rotation_breaks_nothing() {
    scenario("soak", &[("east-1", "east"), ("west-1", "west")], |mesh| {
        let (total, pause) = plan();
        let (a, b) = (mesh.pod("east-1", "a")?, mesh.pod("west-1", "a")?);
        let mut servers = Vec::new();
        let mut transfers = Vec::new();
        for (from, to, address) in [(&a, &b, b.v4()), (&b, &a, a.v4()), (&a, &b, b.v6()), (&b, &a, a.v6())] {
            let marker = new_marker();
            let server = BulkServer::start(&to.netns()?, address, marker)?;
            transfers.push(BulkTransfer::start(&from.netns()?, server.address(), u64::MAX, marker)?);
            servers.push(server);
        }
        let datagrams = Datagrams::start(&a, &b)?;
        wait::until_true("all carry data", Duration::from_secs(20), || {
            Ok(servers.iter().all(|server| server.received() > 1 << 20))
        })?;
        // What grows with traffic has grown after the first rotation; what grows on is a leak.
        let (start, mut rotations, mut settled) = (Instant::now(), 0, Vec::new());
        while start.elapsed() < total {
            mesh.admin(&["keys", "rotate", "--force", "--wait", "60s"])?;
            rotations += 1;
            let before: Vec<u64> = servers.iter().map(BulkServer::received).collect();
            wait::until_true("the time of this rotation passes", pause * 2, || {
                Ok(start.elapsed() >= (pause * rotations).min(total))
            })?;
            let echo = ping(&a.netns()?, b.v4(), 3, new_marker())?;
            let moved = servers.iter().zip(before).all(|(server, before)| server.received() > before);
            ensure!(moved && !echo.times.is_empty(), "a connection stood still in rotation {rotations}");
            if rotations == 2 {
                settled = resident(mesh)?;
            }
        }
        let after = resident(mesh)?;
        let counts = datagrams.stop()?;
        let mut bytes = 0;
        for (transfer, server) in transfers.into_iter().zip(servers) {
            let (sent, _) = transfer.stop().context("a connection was lost")?;
            let received = server.finish().context("bytes changed on the way, or a connection was lost")?;
            ensure!(sent == received, "{sent} bytes sent, {received} arrived");
            bytes += received;
        }
        println!(
            "{} s, {rotations} rotations: {} MB over four connections, all bytes right; datagrams {counts:?}; \
             memory {settled:?} KiB after two rotations, {after:?} KiB at the end",
            start.elapsed().as_secs(),
            bytes / 1_000_000
        );
        for counts in counts {
            ensure!(counts.duplicated == 0 && counts.received > 0, "{counts:?}");
            // Bulk transfers fill the queues that datagrams wait in; what is lost there is no fault of a rotation.
            ensure!(counts.lost() * 20 <= counts.sent, "{counts:?}");
        }
        for (settled, after) in settled.into_iter().zip(after) {
            ensure!(after <= settled + 4_096, "memory grew from {settled} to {after} KiB");
        }
        Ok(())
    });
}
