//! The one thread that owns the [`Directory`]: whatever is to be read or changed is brought to it as a closure.
//!
//! The store blocks on the disk, so this thread has a runtime of its own and nobody else waits on its disk by accident.

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::directory::Directory;

type Work = Box<dyn FnOnce(&mut Directory) + Send>;

/// Requests that wait for the thread; a full queue makes the askers wait, so that sockets push back. A few hundred bytes
/// each.
const QUEUE: usize = 1_024;

/// The thread ended: the process is about to.
#[derive(Debug, thiserror::Error)]
#[error("the keyserver is stopping")]
pub(crate) struct Stopped;

/// Brings work to the thread.
#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Work>);

impl Writer {
    /// Starts the thread. It ends when the last handle is dropped, with everything brought to it done.
    pub(crate) fn start(directory: Directory) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let body = move || runtime.block_on(run(directory, receiver));
        std::thread::Builder::new().name("writer".into()).spawn(body)?;
        Ok(Self(sender))
    }

    /// Does `work` there and gives its result.
    ///
    /// # Cancel safety
    /// Once queued the work is done, though nobody hears of it.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Directory) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (answer, result) = oneshot::channel();
        let work: Work = Box::new(move |directory| {
            // Nobody waits any more: the work is done all the same.
            let _ = answer.send(work(directory));
        });
        self.0.send(work).await.map_err(|_| Stopped)?;
        result.await.map_err(|_| Stopped)
    }

    /// Waits until the thread has ended, which it does only by a panic while a handle is there.
    pub(crate) async fn ended(&self) {
        self.0.closed().await;
    }
}

/// Brings work on behalf of somebody, whom the audit log names.
#[derive(Clone)]
pub(crate) struct Operator {
    writer: Writer,
    actor: String,
}

impl Operator {
    /// For `actor`.
    pub(crate) fn new(writer: Writer, actor: String) -> Self {
        Self { writer, actor }
    }

    /// As [`Writer::call`].
    ///
    /// # Cancel safety
    /// Once queued the work is done, though nobody hears of it.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Directory) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let actor = self.actor.clone();
        let done = self.writer.call(move |directory| {
            directory.set_actor(Some(actor));
            let result = work(directory);
            directory.set_actor(None);
            result
        });
        done.await
    }
}

async fn run(mut directory: Directory, mut queue: mpsc::Receiver<Work>) {
    loop {
        let tick = Instant::from_std(directory.next_tick());
        tokio::select! {
            biased;
            () = sleep_until(tick) => {}
            work = queue.recv() => match work {
                Some(work) => work(&mut directory),
                None => return,
            },
        }
        directory.tick();
    }
}
