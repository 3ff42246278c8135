//! The API's socket: who serves it, and what becomes of its file.

use crate::Failure;
use crate::session::{Event, send, trouble};
use husk_sandbox::{Filters, Kind};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// How long answers that are on their way to clients of the API may take at the end.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// The API's socket, before it is made.
pub struct ApiSocket {
    pub path: PathBuf,
    /// Bytes that a request's body may have.
    pub max_body: usize,
    /// The socket's file goes when the process does.
    pub tidy: bool,
}

/// The API, served.
pub struct Api {
    server: husk_api::Server,
    /// The socket's file, if it is to be removed.
    remove: Option<PathBuf>,
}

impl ApiSocket {
    /// Make the socket's file, and serve on a thread of its own. Requests go to `sender`.
    pub fn serve(self, sender: &Sender<Event>, filters: &Filters) -> Result<Api, Failure> {
        let (sender, filters) = (sender.clone(), filters.clone());
        let handler = Box::new(move |request, reply| send(&sender, Event::Request(request, reply)));
        let settings = husk_api::Settings {
            max_body: self.max_body,
            prepare: Box::new(move || filters.confine(Kind::Api)),
        };
        let mut server = husk_api::Server::start(settings, handler).map_err(|e| trouble(&e))?;
        let listener = husk_api::bind(&self.path).map_err(|e| trouble(&e))?;
        server.listen(listener).map_err(|e| trouble(&e))?;
        Ok(Api {
            server,
            remove: self.tidy.then_some(self.path),
        })
    }
}

impl Api {
    /// Tells clients what happens to the VM.
    pub fn watcher(&self) -> husk_vmm::Watch {
        self.server.watcher()
    }

    /// Let answers that are on their way arrive, and remove the socket.
    pub fn stop(self) {
        // Before the end is told: who hears of it may use the path again.
        if let Some(path) = &self.remove
            && let Err(e) = std::fs::remove_file(path)
        {
            log::debug!("the API socket cannot be removed: {e}");
        }
        self.server.stop(LAST_ANSWERS);
    }
}

/// What a client is told of an error.
pub fn refusal(error: &husk_vmm::Error) -> husk_api::Refusal {
    husk_api::Refusal {
        message: husk_vmm::chain(error),
        too_large: error.is_too_large(),
    }
}

/// What a client is told that comes too late.
pub fn ending() -> husk_api::Refusal {
    husk_api::Refusal {
        message: "The VM is ending.".into(),
        too_large: false,
    }
}
