#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_protocol::line::MAX_LINE_BYTES;

use super::*;

/// Answers everything with `Done`.
struct Obliging;

impl Answers for Obliging {
    async fn answer(&self, _request: LocalRequest, replies: &mut Replies) -> io::Result<()> {
        replies.send(&LocalReply::Done).await
    }
}

/// A client of a served connection.
struct Client {
    stream: UnixStream,
    buffer: LineBuffer,
    server: tokio::task::JoinHandle<()>,
}

impl Client {
    fn of(uid: u32) -> Self {
        let (stream, served) = UnixStream::pair().unwrap();
        let server = tokio::spawn(async move { serve(served, Peer { uid, pid: None }, &Obliging).await });
        Self { stream, buffer: LineBuffer::default(), server }
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next reply, or `None` when the connection was closed.
    async fn reply(&mut self) -> Option<LocalReply> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(line) = self.buffer.next_line().unwrap() {
                return Some(line::decode(&line).unwrap());
            }
            let count = self.stream.read(&mut chunk).await.unwrap_or(0);
            if count == 0 {
                return None;
            }
            self.buffer.push(&chunk[..count]);
        }
    }

    async fn code(&mut self) -> LocalErrorCode {
        match self.reply().await {
            Some(LocalReply::Error(error)) => error.code,
            other => panic!("{other:?} is no error"),
        }
    }
}

#[tokio::test]
async fn who_is_not_root_may_look_and_not_touch() {
    let mut client = Client::of(1000);
    for (request, allowed) in [
        (&br#"{"request":"status"}"#[..], true),
        (br#"{"request":"down"}"#, false),
        (br#"{"request":"rotate","force":true}"#, false),
        (br#"{"request":"collect","valid":[]}"#, false),
        (br#"{"request":"peers"}"#, true),
    ] {
        client.send(&[request, b"\n"].concat()).await.unwrap();
        if allowed {
            assert_eq!(client.reply().await, Some(LocalReply::Done));
        } else {
            assert_eq!(client.code().await, LocalErrorCode::NotPermitted);
        }
    }
    let mut root = Client::of(0);
    root.send(b"{\"request\":\"down\"}\n").await.unwrap();
    assert_eq!(root.reply().await, Some(LocalReply::Done));
}

#[tokio::test]
async fn nonsense_is_answered_and_the_next_request_served() {
    let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
    let cases: [&[u8]; 6] = [b"\n", b"{}\n", b"\0\0\0\n", b"{\"request\":\"fly\"}\n", b"\xff\xfe\n", &deep];
    let mut client = Client::of(0);
    for case in cases {
        client.send(case).await.unwrap();
        assert_eq!(client.code().await, LocalErrorCode::BadRequest);
    }
    client.send(b"{\"request\":\"status\"}\n").await.unwrap();
    assert_eq!(client.reply().await, Some(LocalReply::Done));
}

#[tokio::test]
async fn an_endless_line_is_cut_and_the_connection_closed() {
    let mut client = Client::of(0);
    let chunk = vec![b'a'; 64 * 1024];
    let mut sent = 0;
    // The other end stops reading and hangs up: then writing fails.
    while client.send(&chunk).await.is_ok() {
        sent += chunk.len();
        assert!(sent < 4 * MAX_LINE_BYTES, "it reads on and on");
        if client.server.is_finished() {
            break;
        }
        tokio::task::yield_now().await;
    }
    client.server.await.unwrap();
}

#[tokio::test]
async fn half_a_request_and_goodbye_ends_the_connection() {
    let mut client = Client::of(0);
    client.send(b"{\"request\":").await.unwrap();
    drop(client.stream);
    client.server.await.unwrap();
}

#[tokio::test]
async fn silence_and_not_reading_have_deadlines() {
    let silent = Client::of(0);
    silent.server.await.unwrap();
    let mut deaf = Client::of(0);
    let many = b"{\"request\":\"status\"}\n".repeat(1000);
    // Never reads: replies fill the socket, then the deadline ends it, and with it the writing here.
    while deaf.send(&many).await.is_ok() {}
    deaf.server.await.unwrap();
}
