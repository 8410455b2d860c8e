//! Packets that are counted, and bytes that are checked: threads inside namespaces, no tools from outside.

mod ping;
mod stream;
mod tcp;

pub use ping::{Echo, ping};
pub use stream::{Counts, Stream};
pub use tcp::{BulkServer, BulkTransfer, HttpServer, http_get};
