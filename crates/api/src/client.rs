//! The other end of the socket, for the command line.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;
use tokio::task::LocalSet;

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// The body, possibly empty.
    pub body: String,
}

impl Response {
    /// The request succeeded.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Why it failed, when the body says so.
    pub fn fault(&self) -> Option<String> {
        let body: serde_json::Value = serde_json::from_slice(self.body.as_bytes()).ok()?;
        Some(body.get("fault_message")?.as_str()?.to_owned())
    }
}

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error("cannot connect to the API socket {}; is the VM running, and is this its --api-sock?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a method or a path.
    #[error("{0:?} is no method, or {1:?} is no path; write for example GET /vm/config")]
    Request(String, String),
    /// It broke off.
    #[error("the API socket {} gave no answer", path.display())]
    Http {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: hyper::Error,
    },
    /// No event loop.
    #[error("the host refuses an event loop")]
    Host(#[source] std::io::Error),
}

/// Send a request and hand over what comes back, piece by piece as it comes, for as long as `take` wants more; an empty `body`
/// is none. The HTTP status.
pub fn stream(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    mut take: impl FnMut(&[u8]) -> bool,
) -> Result<u16, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(ClientError::Host)?;
    let http = |source| ClientError::Http {
        path: socket.into(),
        source,
    };
    let bad = || ClientError::Request(method.into(), path.into());
    let parsed = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).map_err(|_| bad())?;
    let mut request = Request::builder()
        .method(parsed)
        .uri(path)
        .header(HOST, "localhost")
        .header(ACCEPT, "*/*");
    if !body.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .map_err(|_| bad())?;
    LocalSet::new().block_on(&runtime, async {
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            path: socket.into(),
            source,
        })?;
        let io = TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io)
            .await
            .map_err(http)?;
        tokio::task::spawn_local(connection);
        let mut response = sender.send_request(request).await.map_err(http)?;
        let status = response.status().as_u16();
        while let Some(frame) = response.body_mut().frame().await {
            if let Some(data) = frame.map_err(http)?.data_ref()
                && !take(data)
            {
                break;
            }
        }
        Ok(status)
    })
}

/// Send a request and wait for the whole answer.
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
) -> Result<Response, ClientError> {
    let mut bytes = Vec::new();
    let status = stream(socket, method, path, body, |data| {
        bytes.extend_from_slice(data);
        true
    })?;
    Ok(Response {
        status,
        body: String::from_utf8_lossy(&bytes).into_owned(),
    })
}
