//! Network namespaces: open, make, enter.
//!
//! A named namespace is a bind mount under `/run/netns`, as iproute2 makes it, so that `ip netns exec NAME` works on it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::DirBuilderExt, fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{prctl, signal::Signal},
};

use crate::{Error, Result};

/// Where iproute2 keeps named namespaces.
pub const NAMED_DIRECTORY: &str = "/run/netns";
const THREAD_SELF: &str = "/proc/thread-self/ns/net";

/// An open network namespace; it exists at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    name: String,
}

impl Netns {
    /// Opens a namespace by a path such as `/run/netns/x` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the path is not there, [`Error::Invalid`] if it is not a network namespace (a name under
    /// `/run/netns` whose mount is gone is an empty file).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| Error::from_io(named(&name), source))?;
        let netns = Self { file, name };
        netns.check_kind()?;
        Ok(netns)
    }

    /// Opens a namespace by its name under `/run/netns`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_named(name: &str) -> Result<Self> {
        Self::open(named_path(name)?)
    }

    /// The calling thread's namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if `/proc` is not mounted.
    pub fn current() -> Result<Self> {
        Self::open(THREAD_SELF)
    }

    /// Makes a namespace without a name: it ends with the last descriptor, process or link that holds it.
    ///
    /// # Errors
    /// [`Error::Permission`] without `CAP_SYS_ADMIN`.
    pub fn create() -> Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|errno| Error::from_errno("new network namespace", errno, None))?;
            Self::current()
        })
    }

    /// Makes a namespace and mounts it under `/run/netns/NAME`.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name is taken, [`Error::Permission`] without `CAP_SYS_ADMIN`.
    pub fn create_named(name: &str) -> Result<Self> {
        let path = named_path(name)?;
        prepare_directory()?;
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| Error::from_io(named(name), source))?;
        let made = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::from_errno(named(name), errno, None))?;
            mount(Some(THREAD_SELF), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|errno| Error::from_errno(named(name), errno, None))
        });
        match made.and_then(|()| Self::open(&path)) {
            Ok(netns) => Ok(netns),
            Err(error) => {
                let _ = delete_named(name);
                Err(error)
            }
        }
    }

    /// What it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The inode, which identifies a namespace while it lives.
    ///
    /// # Errors
    /// [`Error::Io`] if the descriptor cannot be examined.
    pub fn inode(&self) -> Result<u64> {
        let meta = self.file.metadata().map_err(|source| Error::from_io(named(&self.name), source))?;
        Ok(meta.ino())
    }

    /// A second descriptor of the same namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the process has no descriptors left.
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone().map_err(|source| Error::from_io(named(&self.name), source))?;
        Ok(Self { file, name: self.name.clone() })
    }

    /// Moves the calling *thread* into the namespace for good. Never do this on a runtime worker: use [`run`](Self::run).
    ///
    /// # Errors
    /// [`Error::Permission`] without `CAP_SYS_ADMIN`.
    pub fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::from_errno(named(&self.name), errno, None))
    }

    /// Runs `work` on a fresh thread inside the namespace and waits for it. A panic in `work` goes on in the caller.
    ///
    /// # Errors
    /// As [`enter`](Self::enter); then `work` has not run.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            self.enter()?;
            Ok(work())
        })
    }

    /// Makes `command` start its program inside this namespace, killed by the kernel when the *thread* that starts it ends.
    ///
    /// The namespace descriptor is duplicated into the command, so `self` may be dropped before it is spawned.
    ///
    /// # Errors
    /// As [`try_clone`](Self::try_clone).
    #[expect(unsafe_code, reason = "a hook between fork and exec")]
    pub fn attach_command(&self, command: &mut Command) -> Result<()> {
        let file = self.try_clone()?.file;
        let enter = move || -> io::Result<()> {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: the hook makes two system calls and neither allocates nor takes a lock.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }

    fn check_kind(&self) -> Result<()> {
        let target = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        let kind = fs::read_link(target).map_err(|source| Error::from_io(named(&self.name), source))?;
        let magic = nix::sys::statfs::fstatfs(&self.file)
            .map_err(|errno| Error::from_errno(named(&self.name), errno, None))?
            .filesystem_type();
        let is_namespace = magic == nix::sys::statfs::NSFS_MAGIC;
        // A bind mount shows its mount path instead of `net:[n]`; only an unmounted one tells its kind by name.
        let other_kind = kind.to_string_lossy().contains(":[") && !kind.to_string_lossy().starts_with("net:[");
        if is_namespace && !other_kind {
            return Ok(());
        }
        Err(Error::Invalid { object: named(&self.name), reason: "it is not a network namespace" })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Removes the name; the namespace itself ends when nothing else holds it. Already gone is success.
///
/// # Errors
/// [`Error::Permission`] without `CAP_SYS_ADMIN`.
pub fn delete_named(name: &str) -> Result<()> {
    let path = named_path(name)?;
    match umount2(&path, MntFlags::MNT_DETACH) {
        // EINVAL: a plain file left by a crash between its creation and the mount.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(Error::from_errno(named(name), errno, None)),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::from_io(named(name), error)),
        _ => Ok(()),
    }
}

/// The names under `/run/netns`, sorted.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read; an absent one is empty.
pub fn list_named() -> Result<Vec<String>> {
    let entries = match fs::read_dir(NAMED_DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::from_io(NAMED_DIRECTORY, error)),
    };
    let mut names: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// The path of a named namespace.
///
/// # Errors
/// [`Error::Invalid`] for a name that is empty or leads elsewhere.
pub fn named_path(name: &str) -> Result<PathBuf> {
    if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
        return Err(Error::Invalid { object: named(name), reason: "a name is one path component" });
    }
    Ok(Path::new(NAMED_DIRECTORY).join(name))
}

/// Makes `/run/netns` a shared mount, so that names made in one mount namespace are seen, and unmounted, in all.
fn prepare_directory() -> Result<()> {
    let failed = |errno| Error::from_errno(NAMED_DIRECTORY, errno, None);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(NAMED_DIRECTORY)
        .map_err(|source| Error::from_io(NAMED_DIRECTORY, source))?;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, NAMED_DIRECTORY, None::<&str>, flags, None::<&str>)
    };
    match share() {
        // Not a mount point yet: make it one.
        Err(Errno::EINVAL) => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(NAMED_DIRECTORY), NAMED_DIRECTORY, None::<&str>, flags, None::<&str>).map_err(failed)?;
            share().map_err(failed)
        }
        other => other.map_err(failed),
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)
            .map_err(|source| Error::from_io("thread for a network namespace", source))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn named(name: &str) -> String {
    format!("network namespace {name}")
}
