//! Kernel settings under `/proc/sys/net`, which the kernel shows per network namespace of the reading *thread*.
//!
//! For another namespace call these inside [`Netns::run`](crate::netns::Netns::run).

use std::{fs, path::PathBuf};

use crate::{Error, Result, link::check_name};

/// A setting, by its path below `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Whether this host forwards IPv4 packets (`net.ipv4.ip_forward`). Setting it resets the per-link settings.
    pub fn ipv4_forwarding() -> Self {
        Self("ipv4/ip_forward".into())
    }

    /// Whether this host forwards IPv6 packets (`net.ipv6.conf.all.forwarding`). Turning it on deletes default routes
    /// learned from router advertisements on links where `accept_ra` is not 2.
    pub fn ipv6_forwarding() -> Self {
        Self("ipv6/conf/all/forwarding".into())
    }

    /// An IPv4 setting of one link, or of `all` or `default`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names that lead elsewhere.
    pub fn ipv4_link(link: &str, name: &str) -> Result<Self> {
        Self::of_link("ipv4", link, name)
    }

    /// An IPv6 setting of one link, or of `all` or `default`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names that lead elsewhere.
    pub fn ipv6_link(link: &str, name: &str) -> Result<Self> {
        Self::of_link("ipv6", link, name)
    }

    /// Any other setting, such as `core/somaxconn`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a path that leads elsewhere.
    pub fn net(path: &str) -> Result<Self> {
        if path.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.contains('\0')) {
            return Err(Error::Invalid {
                object: format!("setting {path}"),
                reason: "it is not a path of plain names",
            });
        }
        Ok(Self(path.into()))
    }

    fn of_link(family: &str, link: &str, name: &str) -> Result<Self> {
        check_name(link)?;
        Self::net(&format!("{family}/conf/{link}/{name}"))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/proc/sys/net").join(&self.0)
    }

    fn object(&self) -> String {
        format!("setting net/{}", self.0)
    }
}

/// Reads a setting, without the line's end.
///
/// # Errors
/// [`Error::NotFound`] if the link is gone or the kernel lacks the setting (IPv6 switched off).
pub fn read(key: &Key) -> Result<String> {
    let text = fs::read_to_string(key.path()).map_err(|source| Error::from_io(key.object(), source))?;
    Ok(text.trim_end().to_owned())
}

/// Writes a setting.
///
/// # Errors
/// As [`read`]; [`Error::Io`] for a value the kernel refuses or a read-only `/proc/sys`.
pub fn write(key: &Key, value: &str) -> Result<()> {
    fs::write(key.path(), value).map_err(|source| Error::from_io(key.object(), source))
}

/// Writes a setting only if it differs, and tells whether it did. Works where `/proc/sys` is read-only but right.
///
/// # Errors
/// As [`write()`].
pub fn ensure(key: &Key, value: &str) -> Result<bool> {
    if read(key)? == value {
        return Ok(false);
    }
    write(key, value)?;
    Ok(true)
}
