//! The server: one thread, an event loop, hyper.

use crate::parse::{Call, Refused, parse};
use bytes::Bytes;
use http_body_util::channel::{Channel, Sender as BodySender};
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use husk_config::{Answer, Event, SnapshotType, VmmRequest};
use husk_metrics::METRICS;
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;
use tokio::time::timeout;

/// Clients at a time. Each may hold some tens of KiB; more are turned away, so that they cannot take the host's memory or
/// all of the process's descriptors.
const MOST_CONNECTIONS: usize = 1200;
/// Connections that the kernel holds until they are taken.
const BACKLOG_PAUSE: Duration = Duration::from_millis(50);
/// How long a client may take until a request's head is complete. A connection that is kept for later counts as well.
const IDLE: Duration = Duration::from_secs(300);
/// How long it may then take for the body.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a head, and of what is read ahead.
const MOST_HEAD: usize = 16 << 10;
/// Events that a watcher may be behind; one that is more is let go.
const MOST_BEHIND: usize = 256;

/// Why a request failed, for the client to read.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// What was wrong, and what to do.
    pub message: String,
    /// It was too large (413 instead of 400).
    pub too_large: bool,
}

/// What came of a request.
pub type Outcome = Result<Answer, Refusal>;
/// Takes what came of a request, from any thread.
pub type Reply = Box<dyn FnOnce(Outcome) + Send>;
/// Takes a request that was understood. Called on the server's thread: it must pass the request on and return.
pub type Handler = Box<dyn Fn(VmmRequest, Reply) + Send>;

/// How a server is to be.
pub struct Settings {
    /// Largest body of a request, in bytes.
    pub max_body: usize,
    /// Called on the server's thread before it reads anything.
    pub prepare: Box<dyn FnOnce() + Send>,
}

/// A server that runs. Dropped, it ends at once.
pub struct Server {
    /// Dropped before it was used, it ends the thread.
    listener: Option<std::sync::mpsc::Sender<UnixListener>>,
    events: mpsc::UnboundedSender<Event>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Get ready, on a thread of its own, to serve what [`Server::listen`] will give it: so that who has a socket to make
    /// need not wait for the thread.
    pub fn start(settings: Settings, handler: Handler) -> std::io::Result<Self> {
        let (listener, given) = channel::<UnixListener>();
        let (events, to_tell) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(false);
        // Here, so that nobody has to wait for the thread.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let body = move || {
            (settings.prepare)();
            let Ok(listener) = given.recv() else {
                return;
            };
            let state = Rc::new(State {
                handler,
                max_body: settings.max_body,
                watchers: RefCell::default(),
                open: Cell::new(0),
                stopped: stopped.clone(),
            });
            LocalSet::new().block_on(&runtime, serve(listener, state, to_tell, stopped));
        };
        let thread = std::thread::Builder::new()
            .name("api".into())
            .stack_size(256 << 10)
            .spawn(body)?;
        Ok(Self {
            listener: Some(listener),
            events,
            stop,
            thread: Some(thread),
        })
    }

    /// Serve `listener`. Once.
    pub fn listen(&mut self, listener: UnixListener) -> std::io::Result<()> {
        listener.set_nonblocking(true)?;
        if let Some(give) = self.listener.take() {
            // The thread waits for it.
            let _ = give.send(listener);
        }
        Ok(())
    }

    /// Tells all who watch what happens. Never blocks.
    pub fn watcher(&self) -> Arc<dyn Fn(Event) + Send + Sync> {
        let events = self.events.clone();
        Arc::new(move |event| {
            let _ = events.send(event);
        })
    }

    /// End, but let answers and events that are on their way arrive, for as long as `patience` lasts.
    pub fn stop(mut self, patience: Duration) {
        let _ = self.stop.send(true);
        let Some(thread) = self.thread.take() else {
            return;
        };
        let (gone, is_gone) = channel::<()>();
        let waiting = std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || {
                let _ = thread.join();
                drop(gone);
            });
        if waiting.is_ok() && is_gone.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            log::debug!("a client of the API does not take its answer");
        }
    }
}

/// What all connections share.
struct State {
    handler: Handler,
    max_body: usize,
    watchers: RefCell<Vec<mpsc::Sender<Bytes>>>,
    open: Cell<usize>,
    stopped: watch::Receiver<bool>,
}

async fn serve(
    listener: UnixListener,
    state: Rc<State>,
    mut events: mpsc::UnboundedReceiver<Event>,
    mut stopped: watch::Receiver<bool>,
) {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(e) => return log::error!("the API socket cannot be watched: {e}"),
    };
    let telling = Rc::clone(&state);
    tokio::task::spawn_local(async move {
        while let Some(event) = events.recv().await {
            telling.tell(&event);
        }
        telling.watchers.borrow_mut().clear();
    });
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => state.take(stream),
                // Out of descriptors, most likely: some are free again soon.
                Err(e) => {
                    log::debug!("a client of the API cannot be taken: {e}");
                    tokio::time::sleep(BACKLOG_PAUSE).await;
                }
            },
            _ = stopped.changed() => break,
        }
    }
    drop(listener);
    // Events that were sent before are told by now or in the next turn; then watchers are let go, and connections end.
    tokio::task::yield_now().await;
    state.watchers.borrow_mut().clear();
    while state.open.get() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl State {
    fn take(self: &Rc<Self>, stream: tokio::net::UnixStream) {
        if self.open.get() >= MOST_CONNECTIONS {
            log::debug!("the API has {MOST_CONNECTIONS} clients, another one is turned away");
            return;
        }
        self.open.set(self.open.get() + 1);
        let state = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let own = Rc::clone(&state);
            let service = service_fn(move |request| answer(Rc::clone(&own), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE)
                .max_buf_size(MOST_HEAD)
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let mut stopped = state.stopped.clone();
            let result = tokio::select! {
                result = connection.as_mut() => result,
                _ = stopped.wait_for(|stop| *stop) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(e) = result {
                log::debug!("a client of the API: {e}");
            }
            state.open.set(state.open.get() - 1);
        });
    }

    /// Tell all who watch, and let go who does not listen.
    fn tell(&self, event: &Event) {
        let text = serde_json::to_string(event).unwrap_or_default();
        let text = Bytes::from(format!("data: {text}\n\n"));
        self.watchers
            .borrow_mut()
            .retain(|watcher| watcher.try_send(text.clone()).is_ok());
    }
}

type Body = Either<Full<Bytes>, Channel<Bytes, Infallible>>;

async fn answer(
    state: Rc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let method = request.method().as_str().to_owned();
    let path = request.uri().path().to_owned();
    husk_metrics::count_request(&method, &path);
    let body = match read_body(&state, request).await {
        Ok(body) => body,
        Err(response) => return Ok(counted(&method, &path, *response)),
    };
    // Now that it is here: how long a client takes to send it is not ours.
    let begun = Instant::now();
    let parsed = match parse(&method, &path, &body) {
        Ok(parsed) => parsed,
        Err(refused) => return Ok(counted(&method, &path, refuse(&refused))),
    };
    let mut response = match parsed.call {
        Call::OpenApi => json(StatusCode::OK, crate::openapi::DOCUMENT.into()),
        Call::Events => state.watch(),
        Call::Vmm(request) => {
            let latency = match &request {
                VmmRequest::Pause => Some(&METRICS.latencies_us.pause_vm),
                VmmRequest::Resume => Some(&METRICS.latencies_us.resume_vm),
                VmmRequest::CreateSnapshot(create) => Some(match create.snapshot_type {
                    SnapshotType::Full => &METRICS.latencies_us.full_create_snapshot,
                    SnapshotType::Diff => &METRICS.latencies_us.diff_create_snapshot,
                }),
                VmmRequest::LoadSnapshot(_) => Some(&METRICS.latencies_us.load_snapshot),
                _ => None,
            };
            let (tell, told) = oneshot::channel();
            let reply = Box::new(move |outcome| {
                // A client that has hung up does not want to know.
                let _ = tell.send(outcome);
            });
            (state.handler)(request, reply);
            match told.await {
                Ok(outcome) => {
                    if let Some(latency) = latency.filter(|_| outcome.is_ok()) {
                        latency.set(begun.elapsed());
                    }
                    respond(outcome)
                }
                Err(_) => fault(StatusCode::BAD_REQUEST, "The VM is ending."),
            }
        }
    };
    if let Some(message) = parsed.deprecated {
        log::warn!("{message}");
        let name = HeaderName::from_static("deprecation");
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static("true"));
        husk_metrics::count_deprecated_request();
    }
    Ok(counted(&method, &path, response))
}

/// An answer that is counted if it is that a request has failed.
fn counted(method: &str, path: &str, response: Response<Body>) -> Response<Body> {
    if response.status().is_client_error() {
        husk_metrics::count_failed_request(method, path);
    }
    response
}

async fn read_body(
    state: &State,
    request: Request<Incoming>,
) -> Result<Bytes, Box<Response<Body>>> {
    let limit = state.max_body;
    let too_large = || {
        let text =
            format!("Request payload is larger than the limit of {limit} bytes allowed by server.");
        let mut response = fault(StatusCode::BAD_REQUEST, &text);
        // The rest of the body is not read.
        let close = HeaderValue::from_static("close");
        response
            .headers_mut()
            .insert(hyper::header::CONNECTION, close);
        Box::new(response)
    };
    let known = hyper::body::Body::size_hint(request.body()).lower();
    if known > limit as u64 {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), limit).collect();
    match timeout(PATIENCE, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => {
            let text = format!("The body of the request cannot be read: {e}.");
            Err(Box::new(fault(StatusCode::BAD_REQUEST, &text)))
        }
        Err(_) => {
            let text = "The body of the request did not come in time.";
            Err(Box::new(fault(StatusCode::BAD_REQUEST, text)))
        }
    }
}

impl State {
    fn watch(self: &Rc<Self>) -> Response<Body> {
        let (tell, mut told) = mpsc::channel::<Bytes>(MOST_BEHIND);
        self.watchers.borrow_mut().push(tell);
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
        tokio::task::spawn_local(async move {
            // A comment, so that the client has the head at once.
            let mut next = Some(Bytes::from_static(b": watching\n\n"));
            while let Some(text) = next {
                if send(&mut sender, text).await.is_err() {
                    return;
                }
                next = told.recv().await;
            }
        });
        let mut response = Response::new(Either::Right(body));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(
            hyper::header::CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        );
        response
    }
}

async fn send(sender: &mut BodySender<Bytes, Infallible>, text: Bytes) -> Result<(), ()> {
    sender.send(Frame::data(text)).await.map_err(drop)
}

fn respond(outcome: Outcome) -> Response<Body> {
    match outcome {
        Ok(Answer::Done) => {
            let mut response = Response::new(Either::Left(Full::default()));
            *response.status_mut() = StatusCode::NO_CONTENT;
            named(response)
        }
        Ok(Answer::Value(value)) => json(StatusCode::OK, value.to_string().into()),
        Ok(Answer::Text(text)) => {
            let mut response = json(StatusCode::OK, text.into());
            let kind = HeaderValue::from_static("text/plain; version=0.0.4");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(refusal) => fault(
            match refusal.too_large {
                true => StatusCode::PAYLOAD_TOO_LARGE,
                false => StatusCode::BAD_REQUEST,
            },
            &refusal.message,
        ),
    }
}

fn refuse(refused: &Refused) -> Response<Body> {
    fault(StatusCode::BAD_REQUEST, &refused.to_string())
}

fn fault(status: StatusCode, message: &str) -> Response<Body> {
    log::info!("the API refuses a request: {message}");
    let body = serde_json::json!({ "fault_message": message });
    json(status, body.to_string().into())
}

fn json(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(body)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    named(response)
}

fn named(mut response: Response<Body>) -> Response<Body> {
    let name = HeaderValue::from_static("Firecracker API");
    response.headers_mut().insert(SERVER, name);
    response
}
