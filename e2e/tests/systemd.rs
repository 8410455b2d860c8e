//! Two machines set up as the README says, each with a systemd of its own: the units in their sandboxes.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::machine::{self, Disk, Machine};
use mesh_e2e::{Lab, wait};

/// For what systemd and the daemons do within a second on a quiet machine.
const SOON: Duration = Duration::from_secs(30);
const SEAL: &str = "[Service]\nLoadCredentialEncrypted=mesh.seal:/etc/mesh.seal\n";
/// What a boot does to the network, as far as Mesh changed it.
const FRESH_NETWORK: &str = "
    for family in -4 -6; do
      ip $family rule flush
      ip $family rule add lookup main preference 32766
      ip $family route flush table 7100
    done
    nft flush ruleset
    ip link delete mesh0";

/// Two machines, on. Where this one cannot hold them the test is left out, by name; `make systemd` demands it.
fn machines(lab: &mut Lab) -> Result<[(Disk, Machine); 2]> {
    machine::possible()?;
    let mut boot = |name| -> Result<(Disk, Machine)> {
        let disk = Disk::new(&lab.node(name)?)?;
        let machine = disk.boot()?;
        Ok((disk, machine))
    };
    Ok([boot("near")?, boot("far")?])
}

#[test]
fn units_run_restart_guard_and_unseal() {
    let mut lab = Lab::new("units").unwrap();
    let [(_near_disk, near), (disk, far)] = match machines(&mut lab) {
        Ok(machines) => machines,
        Err(reason) if std::env::var_os("MESH_SYSTEMD").is_none() => {
            return eprintln!("SKIPPED: units below a systemd of their own: {reason:#}");
        }
        Err(reason) => panic!("no systemd of their own: {reason:#}"),
    };
    let result = set_up(&near, &far).and_then(|()| {
        killed_daemons_come_back(&near, &far)?;
        a_wrong_configuration_is_not_tried_again(&far)?;
        keys_are_sealed_to_the_machine(&near, &far)
    });
    for (machine, unit) in [(&near, "keyserver"), (&near, "meshd"), (&far, "meshd")] {
        if result.is_err() {
            eprintln!("== {} {unit}\n{}", machine.node().name(), machine.journal(unit).unwrap_or_default());
        }
    }
    result.and_then(|()| a_machine_that_boots_is_closed_until_meshd_runs(&near, far, &disk)).unwrap();
}

/// As in the README, by the same commands.
fn set_up(near: &Machine, far: &Machine) -> Result<()> {
    let address = near.node().v4();
    near.write("/usr/lib/sysusers.d/mesh.conf", mesh_configs::SYSUSERS)?;
    near.write("/etc/systemd/system/keyserver.service", mesh_configs::KEYSERVER_SERVICE)?;
    near.sh(&format!(
        "systemd-sysusers
         keyserver init --dir /etc/mesh-keyserver --name prod --address {address}:7443
         chown -R mesh-keyserver: /etc/mesh-keyserver
         systemctl enable --now keyserver
         meshctl cluster add onprem --pod-cidr 10.3.0.0/16 --node-prefix 24"
    ))?;
    let token = near.sh("meshctl token create --cluster onprem --uses 2 --ttl 1h 2>/dev/null")?;
    for machine in [near, far] {
        machine.write("/usr/lib/sysusers.d/mesh.conf", mesh_configs::SYSUSERS)?;
        machine.write("/etc/mesh/meshd.toml", mesh_configs::MESHD_TOML)?;
        machine.write("/etc/systemd/system/meshd.service", mesh_configs::MESHD_SERVICE)?;
        machine.write("/etc/systemd/system/mesh-guard.service", mesh_configs::MESH_GUARD_SERVICE)?;
        let name = machine.node().name();
        machine.sh(&format!(
            "systemd-sysusers
             meshd join --node-name {name} <<<'{}'
             systemctl enable --now mesh-guard meshd",
            token.trim()
        ))?;
        ensure!(state(machine, "meshd", "StatusText")? == "carrying packets");
        let tried = machine.journal("meshd")?;
        ensure!(tried.contains("tso4: right"), "offloads are tried in a network namespace, with more rights:\n{tried}");
    }
    answers(near, "far")?;
    let status = near.sh("meshctl status")?;
    let lanes = std::thread::available_parallelism()?.get().min(8);
    ensure!(
        status.contains(&format!("(fast), {lanes} lane")),
        "the sandbox lets the steering program through:\n{status}"
    );
    Ok(())
}

fn killed_daemons_come_back(near: &Machine, far: &Machine) -> Result<()> {
    for (machine, unit) in [(far, "meshd"), (near, "keyserver")] {
        machine.sh(&format!("systemctl kill --signal KILL --kill-who main {unit}"))?;
        wait::until_true("started again", SOON, || {
            Ok(state(machine, unit, "NRestarts")? == "1" && state(machine, unit, "ActiveState")? == "active")
        })?;
    }
    answers(near, "far")?;
    answers(far, "near")
}

fn a_wrong_configuration_is_not_tried_again(far: &Machine) -> Result<()> {
    far.write("/etc/mesh/meshd.toml", "lanes = 3\n")?;
    ensure!(far.sh("systemctl restart meshd").is_err(), "it started");
    let said = far.journal("meshd")?;
    ensure!(said.contains("/etc/mesh/meshd.toml:1: unknown key `lanes`"), "{said}");
    ensure!(state(far, "meshd", "ActiveState")? == "failed", "systemd would try for ever");
    far.write("/etc/mesh/meshd.toml", mesh_configs::MESHD_TOML)?;
    far.sh("systemctl restart meshd")?;
    answers(far, "near")
}

/// As in docs/operating.md.
fn keys_are_sealed_to_the_machine(near: &Machine, far: &Machine) -> Result<()> {
    let seal = "head -c 32 /dev/urandom | systemd-creds encrypt --name=mesh.seal - /etc/mesh.seal 2>&1; systemctl daemon-reload";
    near.write("/etc/systemd/system/keyserver.service.d/seal.conf", SEAL)?;
    near.sh(&format!("{seal}; systemctl restart keyserver"))?;
    far.write("/etc/systemd/system/meshd.service.d/seal.conf", SEAL)?;
    far.sh(&format!("{seal}; systemctl restart meshd"))?;
    for (machine, files) in
        [(near, "/etc/mesh-keyserver/keys/{root,issuer,revoker,transport}"), (far, "/var/lib/mesh/{identity,keys}")]
    {
        let heads = machine.sh(&format!("for file in {files}; do head -n 1 $file; done"))?;
        ensure!(heads.lines().count() >= 2 && heads.lines().all(|line| line == "mesh sealed 1"), "{heads}");
    }
    ensure!(far.sh("meshctl status")?.contains("sealed on disk"));
    // Both start from sealed keys; a token is signed by the issuer's.
    near.sh("systemctl restart keyserver; meshctl token create --cluster onprem")?;
    far.sh("systemctl restart meshd; meshctl keys rotate --wait 30s")?;
    answers(near, "far")?;

    // Not in another's hands: neither without the unit, nor on a machine with another secret.
    far.sh("systemctl stop meshd; cd /var/lib/systemd; mv credential.secret away")?;
    let by_hand = far.run("meshd", &["run", "--config", "/etc/mesh/meshd.toml"])?;
    let said = String::from_utf8_lossy(&by_hand.stderr);
    ensure!(!by_hand.status.success() && said.contains("is sealed: start meshd by its unit"), "{said}");
    ensure!(far.sh("systemctl start meshd").is_err(), "it started on a machine that cannot open the credential");
    far.sh("systemctl stop meshd; cd /var/lib/systemd; mv away credential.secret; systemctl start meshd")?;
    answers(far, "near")
}

/// Nothing of the network outlives a machine's reboot; the disk does.
fn a_machine_that_boots_is_closed_until_meshd_runs(near: &Machine, far: Machine, disk: &Disk) -> Result<()> {
    let status: serde_json::Value = serde_json::from_str(&near.sh("meshctl status --json")?)?;
    let address = status["node"]["addresses"][0].as_str().context("no address")?.to_owned();
    far.sh("systemctl disable meshd; systemctl stop meshd; sync")?;
    let node = far.node().clone();
    drop(far);
    node.output("/bin/sh", &["-ec", FRESH_NETWORK])?;
    let route = node.output("/usr/sbin/ip", &["route", "get", &address])?;
    ensure!(route.contains("uplink"), "the network is not as after a boot: {route}");
    let far = disk.boot()?;
    // Nothing but the network waits for it.
    wait::until_true("the guard is done", SOON, || Ok(state(&far, "mesh-guard", "ActiveState")? == "active"))
        .with_context(|| far.journal("mesh-guard").unwrap_or_default())?;
    let route = far.run("ip", &["route", "get", &address])?;
    ensure!(!route.status.success(), "open: {}", String::from_utf8_lossy(&route.stdout));
    far.sh("systemctl start meshd")?;
    answers(&far, "near")
}

fn state(machine: &Machine, unit: &str, property: &str) -> Result<String> {
    Ok(machine.output("systemctl", &["show", "--value", "--property", property, unit])?.trim().to_owned())
}

fn answers(machine: &Machine, peer: &str) -> Result<()> {
    wait::until("an answer through the tunnel", SOON, || machine.sh(&format!("meshctl ping {peer}")).map(drop))
}
