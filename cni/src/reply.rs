//! What goes to standard output: results in the form of the asked version, and errors.
//!
//! Source: CNI specification 1.1.0, sections "Success" and "Error"; the forms of older versions from their own texts.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_hostnet::link::Mac;
use serde::Serialize;

use crate::input::Version;

/// Error codes: 1 to 99 are the specification's, 100 and up are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureCode {
    /// 1: the configuration's version is not supported, or too old for the command.
    Version,
    /// 3: no such container.
    UnknownContainer,
    /// 4: a variable of the environment is missing or wrong; the message names it.
    Environment,
    /// 5: reading or writing failed.
    Io,
    /// 6: the configuration is not JSON.
    Decode,
    /// 7: the configuration is not valid.
    Config,
    /// 11: not now; try again.
    TryAgain,
    /// 50: no pod can be attached.
    NotAvailable,
    /// 51: no pod can be attached, and attached ones may lack connectivity.
    Limited,
    /// 100: the kernel refused.
    Kernel,
    /// 101: meshd refused, or answered what this version does not understand.
    Meshd,
    /// 102: CHECK found something missing.
    Missing,
}

impl FailureCode {
    fn number(self) -> u32 {
        match self {
            Self::Version => 1,
            Self::UnknownContainer => 3,
            Self::Environment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::Config => 7,
            Self::TryAgain => 11,
            Self::NotAvailable => 50,
            Self::Limited => 51,
            Self::Kernel => 100,
            Self::Meshd => 101,
            Self::Missing => 102,
        }
    }
}

/// The command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: FailureCode,
    /// What was tried, on what, what to do.
    pub(crate) message: String,
    /// More for people; may be empty.
    pub(crate) details: String,
}

impl Failure {
    /// A failure without details.
    pub(crate) fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// Says what was being done.
    pub(crate) fn while_doing(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Adds to the details.
    pub(crate) fn with_details(mut self, more: &str) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details.push_str(more);
        self
    }

    /// The error object; `version` as it was asked for, supported or not.
    pub(crate) fn to_json(&self, version: &str) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct ErrorObject<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        let object =
            ErrorObject { cni_version: version, code: self.code.number(), msg: &self.message, details: &self.details };
        serde_json::to_string(&object).expect("strings and a number always encode")
    }
}

/// What a refusal of the kernel is to the runtime.
impl From<mesh_hostnet::Error> for Failure {
    fn from(error: mesh_hostnet::Error) -> Self {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        Self::new(FailureCode::Kernel, format!("{error}{cause}"))
    }
}

/// An attached pod, for the result of ADD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) host_link: String,
    pub(crate) host_mac: Mac,
    pub(crate) pod_link: String,
    pub(crate) pod_mac: Mac,
    pub(crate) mtu: u32,
    /// Path of the pod's namespace.
    pub(crate) sandbox: String,
    /// Address and gateway, one of each family at most.
    pub(crate) addresses: Vec<(IpNet, IpAddr)>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResultObject<'a> {
    cni_version: &'a str,
    interfaces: [Interface<'a>; 2],
    ips: Vec<Ip>,
    routes: Vec<RouteObject>,
}

#[derive(Serialize)]
struct Interface<'a> {
    name: &'a str,
    mac: String,
    /// Known from 1.1.0 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<&'a str>,
}

#[derive(Serialize)]
struct Ip {
    /// Known before 1.0.0 only.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    address: IpNet,
    gateway: IpAddr,
    /// Place of the pod's link in `interfaces`.
    interface: u32,
}

#[derive(Serialize)]
struct RouteObject {
    dst: IpNet,
    gw: IpAddr,
}

impl Attached {
    /// The result of ADD in the form of `version`.
    pub(crate) fn to_json(&self, version: Version) -> String {
        let mtu = (version >= Version::V1_1_0).then_some(self.mtu);
        let family = |ip: IpAddr| if ip.is_ipv4() { "4" } else { "6" };
        let object = ResultObject {
            cni_version: version.as_str(),
            interfaces: [
                Interface { name: &self.host_link, mac: self.host_mac.to_string(), mtu, sandbox: None },
                Interface { name: &self.pod_link, mac: self.pod_mac.to_string(), mtu, sandbox: Some(&self.sandbox) },
            ],
            ips: (self.addresses.iter())
                .map(|(address, gateway)| Ip {
                    version: (version < Version::V1_0_0).then(|| family(*gateway)),
                    address: *address,
                    gateway: *gateway,
                    interface: 1,
                })
                .collect(),
            routes: self.addresses.iter().map(|(_, gw)| RouteObject { dst: default_prefix(*gw), gw: *gw }).collect(),
        };
        serde_json::to_string(&object).expect("plain values always encode")
    }
}

/// The prefix of everything, of one family.
pub(crate) fn default_prefix(family_of: IpAddr) -> IpNet {
    match family_of {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

/// The answer to VERSION, echoing what was asked in.
pub(crate) fn versions(asked: &str) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions<'a> {
        cni_version: &'a str,
        supported_versions: [&'a str; 4],
    }
    let object = Versions { cni_version: asked, supported_versions: Version::ALL.map(Version::as_str) };
    serde_json::to_string(&object).expect("strings always encode")
}
