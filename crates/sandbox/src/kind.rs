//! Kinds of threads. The build script knows them too.

/// A kind of thread, with a filter of its own. ARCHITECTURE.md lists the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The main thread while a VM runs, when it builds no other; and the threads that it starts from then on.
    Main,
    /// The main thread when it may build a VM yet. Threads of that VM inherit this, and add their own.
    Builder,
    /// Answers requests over HTTP.
    Api,
    /// Runs a vCPU.
    Vcpu,
    /// Runs devices.
    Io,
    /// console-in, console-out and signals.
    Console,
    /// Registers doorbells.
    Doorbells,
}

impl Kind {
    /// All of them, in the order of their declaration.
    pub const ALL: [Kind; 7] = [
        Kind::Main,
        Kind::Builder,
        Kind::Api,
        Kind::Vcpu,
        Kind::Io,
        Kind::Console,
        Kind::Doorbells,
    ];

    /// What its filter is called in a file.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Main => "main",
            Kind::Builder => "builder",
            Kind::Api => "api",
            Kind::Vcpu => "vcpu",
            Kind::Io => "io",
            Kind::Console => "console",
            Kind::Doorbells => "doorbells",
        }
    }
}
