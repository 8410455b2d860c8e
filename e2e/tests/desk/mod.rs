//! A mesh whose keyserver can grant nothing, and the machine without a network that its keys are on.
#![allow(dead_code, clippy::unwrap_used, reason = "shared by several tests")]

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use mesh_e2e::daemon::{Daemon, binary};
use mesh_e2e::mesh::{Mesh, MeshNode, SETTLE};
use mesh_e2e::wait;
use serde_json::Value;

/// A machine without a network: a folder with keys, and `meshctl`.
pub(crate) struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()? })
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Runs `meshctl` here; gives its stdout.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("meshctl")?);
        // Sockets that are not there: whatever asks one fails.
        command.args(["--admin-socket", &self.path("none"), "--socket", &self.path("none")]).args(args);
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "meshctl {args:?}: {}: {text}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Makes a key; gives its public half.
    pub(crate) fn key(&self, name: &str) -> Result<String> {
        let made: Value = serde_json::from_str(&self.run(&["--json", "signer", "new", &self.path(name)])?)?;
        Ok(made["key"].as_str().context("no key")?.to_owned())
    }

    /// The id of a key made here.
    pub(crate) fn id(&self, name: &str) -> Result<String> {
        let shown: Value = serde_json::from_str(&self.run(&["--json", "signer", "show", &self.path(name)])?)?;
        Ok(shown["id"].as_str().context("no id")?.to_owned())
    }

    /// Has each of these roots sign a proposal on its own; gives the files.
    pub(crate) fn sign_policy(&self, proposal: &str, roots: &[&str], mesh_id: &str) -> Result<Vec<String>> {
        let sign = |root: &&str| {
            let (key, out) = (self.path(root), format!("{proposal}.{root}"));
            self.run(&["policy", "sign", proposal, "--signer", &key, "--out", &out, "--mesh-id", mesh_id, "--yes"])?;
            Ok(out)
        };
        roots.iter().map(sign).collect()
    }
}

pub(crate) struct Strict {
    pub(crate) mesh: Mesh,
    pub(crate) desk: Desk,
    pub(crate) mesh_id: String,
}

impl Strict {
    /// A mesh of three roots, two of which sign, and one issuer; cluster east is the issuer's.
    pub(crate) fn new(name: &str) -> Result<Self> {
        Self::new_with(name, &[])
    }

    /// As [`Self::new`], with more arguments after `keyserver init --strict`.
    pub(crate) fn new_with(name: &str, more: &[&str]) -> Result<Self> {
        let desk = Desk::new()?;
        let roots: Vec<String> = (1..=3).map(|n| desk.key(&format!("root-{n}"))).collect::<Result<_>>()?;
        let issuer = desk.key("issuer-a")?;
        let mut mesh = Mesh::bare(name)?;
        let dir = mesh.keyserver_directory().display().to_string();
        let address = format!("{}:7443", mesh.keyserver_node().v4());
        let mut init =
            vec!["init", "--dir", &dir, "--strict", "--name", "lab", "--address", &address, "--threshold", "2"];
        roots.iter().for_each(|root| init.extend(["--root", root]));
        let revoker = desk.key("revoker")?;
        init.extend(["--issuer", &issuer, "--revoker", &revoker]);
        init.extend(more);
        mesh.keyserver_node().output(binary("keyserver")?, &init)?;

        // Nothing runs before its roots have signed.
        let config = mesh.keyserver_directory().join("keyserver.toml").display().to_string();
        let early = mesh.keyserver_node().output(binary("keyserver")?, &["run", "--config", &config]);
        ensure!(format!("{:#}", early.unwrap_err()).contains("--signed"), "it ran without a policy");
        let proposal = mesh.keyserver_directory().join("first-policy.txt");
        let first = desk.path("first");
        fs::copy(&proposal, &first)?;
        let one = desk.sign_first(&first, "root-1")?;
        let alone = mesh.keyserver_node().output(binary("keyserver")?, &["init", "--dir", &dir, "--signed", &one]);
        ensure!(format!("{:#}", alone.unwrap_err()).contains("2 needed"), "one of three roots was enough");
        let two = desk.sign_first(&first, "root-2")?;
        let made = ["init", "--dir", &dir, "--signed", &one, "--signed", &two, "--json"];
        let made: Value = serde_json::from_str(&mesh.keyserver_node().output(binary("keyserver")?, &made)?)?;
        let mesh_id = made["mesh_id"].as_str().context("no mesh id")?.to_owned();
        mesh.keep_admin_socket_here()?;
        mesh.start_keyserver()?;
        let mut strict = Self { mesh, desk, mesh_id };
        strict.change_policy("east", &["--add-cluster", "east=10.1.0.0/16"], &["root-1", "root-3"])?;
        Ok(strict)
    }

    /// Proposes, has roots sign, imports.
    pub(crate) fn change_policy(&mut self, name: &str, changes: &[&str], roots: &[&str]) -> Result<Value> {
        let files = self.propose(name, changes, roots)?;
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        self.mesh.admin_json(&[&["policy", "import"], files.as_slice()].concat())
    }

    pub(crate) fn propose(&self, name: &str, changes: &[&str], roots: &[&str]) -> Result<Vec<String>> {
        let out = self.desk.path(name);
        self.mesh.admin(&[&["policy", "propose", "--out", &out], changes].concat())?;
        self.desk.sign_policy(&out, roots, &self.mesh_id)
    }

    /// A token made on the desk, by that issuer.
    pub(crate) fn token(&self, cluster: &str, issuer: &str, uses: &str) -> Result<String> {
        let file = self.desk.path("mesh");
        self.mesh.admin(&["policy", "show", "--out", &file])?;
        let key = self.desk.path(issuer);
        let create = ["token", "create", "--mesh", &file, "--signer", &key, "--cluster", cluster, "--uses", uses];
        Ok(self.desk.run(&create)?.trim().to_owned())
    }

    /// Carries what waits to the desk, and has the issuer sign it; gives the file.
    pub(crate) fn sign_grants(&self, issuer: &str, name: &str) -> Result<String> {
        let (pending, signed, key) = (self.desk.path("pending"), self.desk.path(name), self.desk.path(issuer));
        self.mesh.admin(&["grant", "list-pending", "--out", &pending])?;
        let sign = ["grant", "sign", &pending, "--signer", &key, "--out", &signed, "--mesh-id", &self.mesh_id, "--yes"];
        self.desk.run(&sign)?;
        Ok(signed)
    }

    pub(crate) fn grant(&self, issuer: &str) -> Result<()> {
        let signed = self.sign_grants(issuer, "signed")?;
        self.mesh.admin(&["grant", "import", &signed])?;
        Ok(())
    }

    pub(crate) fn wait_pending(&self, count: usize) -> Result<()> {
        wait::until(&format!("{count} nodes wait"), SETTLE, || {
            let pending = self.mesh.admin_json(&["grant", "list-pending"])?;
            let held = pending["pending"].as_array().map_or(0, Vec::len);
            ensure!(held == count, "{held} do");
            Ok(())
        })
    }

    pub(crate) fn policy_version(&self, node: &str) -> Result<u64> {
        self.mesh.node(node).status()?["policy_version"].as_u64().context("no version")
    }
}

impl Desk {
    pub(crate) fn sign_first(&self, file: &str, root: &str) -> Result<String> {
        let (key, out) = (self.path(root), format!("{file}.{root}"));
        self.run(&["policy", "sign", file, "--signer", &key, "--out", &out, "--yes"])?;
        Ok(out)
    }
}

/// Starts `meshd run` on a node that waits, without waiting until it is ready.
pub(crate) fn run_waiting(node: &mut MeshNode) -> Result<()> {
    let config = node.config().display().to_string();
    node.daemon = Some(Daemon::start(&node.node, "meshd", &["run", "--config", &config])?);
    Ok(())
}
