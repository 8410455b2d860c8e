//! The command line.

use clap::{Parser, builder::NonEmptyStringValueParser};
use clap_complete::Shell;

/// A WireGuard device in userspace, for wg(8) and wg-quick(8).
///
/// Creates the TUN device IFACE and serves /var/run/wireguard/IFACE.sock until either is removed. Runs in the background
/// once both are there.
#[derive(Debug, Parser)]
#[command(name = "mesh-wg", version, max_term_width = 110)]
#[command(after_help = "Examples:\n  mesh-wg wg0 && wg setconf wg0 /etc/wireguard/wg0.conf && ip link set wg0 up\n  \
                        WG_QUICK_USERSPACE_IMPLEMENTATION=mesh-wg wg-quick up wg0\n\n\
                        Environment:\n  LOG_LEVEL              verbose, error (default), silent\n  \
                        WG_PROCESS_FOREGROUND  1: stay in the foreground\n\n\
                        Exit codes: 0 done, 1 failed, 2 usage.")]
pub(crate) struct Cli {
    /// Stay in the foreground
    #[arg(short, long)]
    pub(crate) foreground: bool,
    /// Name of the device
    #[arg(value_name = "IFACE", required_unless_present_any = ["man", "completion"])]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub(crate) iface: Option<String>,
    /// Print the manual page
    #[arg(long, hide = true)]
    pub(crate) man: bool,
    /// Print a completion script
    #[arg(long, hide = true, value_name = "SHELL")]
    pub(crate) completion: Option<Shell>,
}
