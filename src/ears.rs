//! What hears signals and keys.

use crate::Failure;
use crate::session::{Event, OnSignal, send, trouble};
use husk_console::{Input, Terminal};
use husk_metrics::METRICS;
use husk_sandbox::{Filters, Kind};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Threads that listen, or will.
pub struct Ears {
    sender: Sender<Event>,
    input: Input,
    filters: Filters,
    signals: State,
}

enum State {
    /// Signals do what they do by themselves.
    Deaf,
    /// They are kept until somebody listens.
    Kept(Signals),
    /// A thread listens.
    Heard,
    /// They are handled elsewhere.
    NotOurs,
}

impl Ears {
    /// Nobody listens yet. What is heard goes to `sender`.
    pub fn new(sender: Sender<Event>, input: Input, filters: Filters, on_signal: OnSignal) -> Self {
        Self {
            sender,
            input,
            filters,
            signals: match on_signal {
                OnSignal::PressPowerButton => State::Deaf,
                OnSignal::AsFirecracker => State::NotOurs,
            },
        }
    }

    /// From now on signals are kept until they are listened to.
    pub fn hear_signals(&mut self) -> Result<(), Failure> {
        if let State::Deaf = self.signals {
            let mut stopping = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT];
            stopping.retain(|signal| !husk_console::is_ignored(*signal));
            self.signals = State::Kept(Signals::new(stopping).map_err(|e| trouble(&e))?);
        }
        Ok(())
    }

    /// Listen to signals, on a thread of its own.
    pub fn listen_to_signals(&mut self) -> Result<(), Failure> {
        self.hear_signals()?;
        let mut signals = match std::mem::replace(&mut self.signals, State::Heard) {
            State::Kept(signals) => signals,
            other => {
                self.signals = other;
                return Ok(());
            }
        };
        let (stops, filters) = (self.sender.clone(), self.filters.clone());
        let body = move || {
            filters.confine(Kind::Console);
            signals.forever().for_each(|signal| {
                if signal == SIGHUP {
                    METRICS.signals.sighup.set(1);
                }
                send(&stops, Event::Signal(signal));
            });
        };
        std::thread::Builder::new()
            .name("signals".into())
            .stack_size(64 << 10)
            .spawn(body)
            .map(drop)
            .map_err(|e| trouble(&e))
    }

    /// Start to listen to signals and to what is typed, on threads of their own; keep the result for as long.
    pub fn listen(mut self, terminal: Option<Arc<Terminal>>) -> Result<Input, Failure> {
        self.listen_to_signals()?;
        let (keys, filters) = (self.sender, self.filters);
        let pressed = move |key| send(&keys, Event::Key(key));
        let prepare = move || filters.confine(Kind::Console);
        self.input
            .start(std::io::stdin(), terminal, pressed, prepare)
            .map_err(|e| trouble(&e))?;
        Ok(self.input)
    }
}
