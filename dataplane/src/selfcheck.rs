//! Whether the kernel's offloads do what they say: real trains, their bytes held against a slow model.
//!
//! Some kernels refuse super-packets that they said they take, some change bytes when they cut them. Found at run time, the
//! first costs a few packets and the second corrupts streams; so each kind is tried before a device carries anything, on two
//! scratch devices in a network namespace that nothing else uses:
//!
//! ```text
//! write a run ─> NEAR ─> kernel forwards ─> FAR without offloads ─> packets, cut by the kernel     tcp-, udp-coalesce
//!                                      └──> FAR with offloads ────> super-packets, cut by us       tso4, tso6, uso
//! socket ─────────────> kernel routes ───> FAR without offloads ─> datagrams, cut by the kernel    udp-segment
//! socket ─────────────> loopback ────────> socket                                                 udp-segment, udp-gro
//! ```
//!
//! The caller makes the namespace, and in it gives the devices what [`SelfCheck::links`] says; see [`SelfCheck::open`].

mod class;
mod datagrams;
mod forwarded;

use std::{collections::BTreeMap, fmt, io};

use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, poll};

use crate::{
    packet::offload::{Offload, Offloads},
    tun::{Device, DeviceOptions, Queue, Supers, TunQueue, Wanted},
};

pub use class::Class;

/// How long a packet may take through the kernel of a busy machine, in milliseconds.
const PATIENCE: u16 = 1_500;
/// How often a train is sent that does not come out whole: a queue may have been full.
const ATTEMPTS: usize = 2;
/// Looks at a queue for the packets of one train: far more than a train has packets.
const LOOKS: usize = 1_000;

/// What is wrong with a kind of offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The kernel refuses it.
    Refused,
    /// The bytes that came out were others than went in.
    Wrong {
        /// Which train.
        train: &'static str,
    },
    /// Less came out than went in.
    Lost {
        /// Which train.
        train: &'static str,
    },
    /// It cannot be tried, because the trains for it cannot be made.
    Untried,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("the kernel refuses it"),
            Self::Wrong { train } => write!(f, "the kernel changed the bytes of a train ({train})"),
            Self::Lost { train } => write!(f, "the kernel lost packets of a train ({train})"),
            Self::Untried => f.write_str("it could not be tried: what it needs is off"),
        }
    }
}

/// What was found: the kinds that are not to be used. All others came out right.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings(BTreeMap<Class, Fault>);

impl Findings {
    /// What is wrong with this kind, if anything.
    pub fn fault(&self, class: Class) -> Option<Fault> {
        self.0.get(&class).copied()
    }

    /// All faults.
    pub fn faults(&self) -> impl Iterator<Item = (Class, Fault)> + '_ {
        self.0.iter().map(|(class, fault)| (*class, *fault))
    }

    /// Tries a train, again if it got lost or was refused, as a busy machine may do, and notes what is wrong; true if nothing
    /// is. What comes out wrong once is wrong.
    fn try_train(&mut self, class: Class, mut attempt: impl FnMut() -> Result<(), Fault>) -> bool {
        let mut result = attempt();
        for _ in 1..ATTEMPTS {
            if !matches!(result, Err(Fault::Lost { .. } | Fault::Refused)) {
                break;
            }
            result = attempt();
        }
        self.note(class, result)
    }

    fn note(&mut self, class: Class, result: Result<(), Fault>) -> bool {
        if let Err(fault) = result {
            self.0.entry(class).or_insert(fault);
        }
        result.is_ok()
    }
}

/// One scratch device as the caller has to set it up: MTU 1500, up, with these addresses and routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchLink {
    /// Its name.
    pub name: &'static str,
    /// Its addresses; those of IPv6 to be usable at once.
    pub addresses: Vec<IpNet>,
    /// Prefixes routed through it.
    pub routes: Vec<IpNet>,
}

/// Two scratch devices to try offloads on. They vanish with it.
#[derive(Debug)]
pub struct SelfCheck {
    near: TunQueue,
    far: TunQueue,
}

/// Where the trains are written, and where they come out.
const NEAR: &str = "mesh-near";
const FAR: &str = "mesh-far";
/// Addresses: of the trains, as the model has them; of the device they come out of.
const SOURCE: [&str; 2] = ["10.1.0.1/32", "fd00::1/128"];
const DESTINATION: [&str; 2] = ["10.2.0.2/32", "fd00::2/128"];
const OWN: [&str; 2] = ["10.3.0.1/32", "fd00::3/128"];

impl SelfCheck {
    /// Opens the devices in the network namespace of the calling thread, which should have nothing else in it. Before
    /// [`run`](Self::run), the caller lets that namespace forward IPv4 and IPv6 and sets up the [`links`](Self::links) and
    /// the loopback link.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_NET_ADMIN`; what else the kernel says, as where it has no fast device at all.
    pub fn open() -> io::Result<Self> {
        let open = |name| -> io::Result<TunQueue> {
            let options = DeviceOptions { wanted: Wanted::Fast, ..DeviceOptions::default() };
            let device = Device::open_with(name, &options)?;
            device.set_persistent(false)?;
            device.into_queues().pop().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        };
        Ok(Self { near: open(NEAR)?, far: open(FAR)? })
    }

    /// What each device needs. Families that the kernel does not have may be left out.
    pub fn links() -> [ScratchLink; 2] {
        let nets = |texts: [&str; 2]| texts.iter().filter_map(|text| text.parse().ok()).collect();
        [
            ScratchLink { name: NEAR, addresses: Vec::new(), routes: nets(SOURCE) },
            ScratchLink { name: FAR, addresses: nets(OWN), routes: nets(DESTINATION) },
        ]
    }

    /// Tries every kind; takes milliseconds where all is well, and at most some seconds. Without IPv6 the kinds that exist
    /// for it alone count as refused. Call it on a thread in the namespace of the devices.
    pub fn run(mut self, has_v6: bool) -> Findings {
        let mut findings = Findings::default();
        self.try_runs(has_v6, &mut findings);
        self.try_supers(has_v6, &mut findings);
        datagrams::try_trains(&mut self, has_v6, &mut findings);
        findings
    }

    /// Switches the far device; false where the kernel does not do all of it.
    fn switch_far(&mut self, offloads: Offloads) -> bool {
        self.empty_far();
        self.far.set_offloads(offloads).is_ok_and(|came| came == offloads)
    }

    /// Forgets what the kernel said on its own account.
    fn empty_far(&mut self) {
        let mut supers = Supers::new(192 << 10, 64);
        while self.far.read(&mut supers, 64).is_ok_and(|count| count > 0) {
            supers.clear();
        }
    }

    /// Hands each packet that comes out of the far device to `take` until that says it has enough, or nothing comes any more.
    fn read_far(&mut self, mut take: impl FnMut(&mut [u8], usize, Offload) -> bool) {
        let mut supers = Supers::new(192 << 10, 64);
        for _ in 0..LOOKS {
            let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.far), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, PATIENCE), Ok(1..)) {
                return;
            }
            supers.clear();
            if self.far.read(&mut supers, 64).is_err() {
                return;
            }
            for n in 0..supers.len() {
                let Some((offload, buffer, len)) = supers.get_padded_mut(n) else { break };
                if take(buffer, len, offload) {
                    return;
                }
            }
        }
    }
}
