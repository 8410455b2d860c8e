//! `meshctl signer`: keys of roots and issuers, where they are kept.

use std::path::PathBuf;

use super::Context;
use crate::output::Table;
use crate::signer::{self, Signer};

const HELP: &str = "\
Examples:
  meshctl signer new issuer.key
  meshctl signer show issuer.key";

const NEW_HELP: &str = "\
Keep the file on a machine that has no network, or on a stick; a copy of a root's key belongs in another safe.

Examples:
  meshctl signer new root-1.key

JSON: {\"key\": public key, \"id\"}";

const SHOW_HELP: &str = "\
SIGNER is the path of a key file, exec:COMMAND ARG.. for a program that signs, or pkcs11:.. for a key in a token.

The program reads one line of JSON from standard input and writes one line to standard output:
  {\"mesh-signer\":1,\"request\":\"public-key\"} -> {\"public_key\":\"BASE64\"}
  {\"mesh-signer\":1,\"request\":\"sign\",\"public_key\":\"BASE64\",\"message\":\"BASE64\"} -> {\"signature\":\"BASE64\"}

A token is named as in RFC 7512: pkcs11:token=T;object=O?module-path=/PATH/LIB.so&pin-source=file:/PATH; without a \
pin-source the PIN is taken from the variable MESH_SIGNER_PIN.

Examples:
  meshctl signer show issuer.key
  meshctl signer show exec:/usr/local/bin/mesh-sign

JSON: {\"key\": public key, \"id\"}";

/// Make and read keys that sign grants, tokens and policies
#[derive(Debug, clap::Subcommand)]
#[command(after_help = HELP)]
pub(crate) enum Verb {
    New(New),
    Show(Show),
}

/// Make a key in a new file, and print its public half
#[derive(Debug, clap::Args)]
#[command(after_help = NEW_HELP)]
pub(crate) struct New {
    /// File to make, mode 0600
    file: PathBuf,
}

/// Print the public half of a key
#[derive(Debug, clap::Args)]
#[command(after_help = SHOW_HELP)]
pub(crate) struct Show {
    /// Key file, exec:COMMAND or pkcs11:..
    signer: String,
}

pub(crate) fn run(verb: Verb, context: &Context) -> anyhow::Result<()> {
    let key = match verb {
        Verb::New(New { file }) => signer::make_key_file(&file)?.verify_key(),
        Verb::Show(Show { signer }) => Signer::open(&signer)?.public(),
    };
    context.show(&serde_json::json!({ "key": key, "id": key.id() }), || {
        let mut table = Table::fields();
        table.field("key", key);
        table.field("id", key.id());
        table.render()
    })
}
