//! The boot vCPU's thread, from before there is a vCPU until it enters the guest.

use super::{Aids, no_thread};
use crate::error::Error;
use crate::processor::Processor;
use crate::spin::spin_for;
use crate::standby::Wanted;
use crate::timeline::Phase;
use crate::vcpu::{self, Shared, VcpuThread};
use husk_arch::boot::BootState;
use husk_kvm::{Kvm, Passed, Vcpu, VcpuState};
use husk_sandbox::Kind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// What the vCPUs of a VM become.
#[derive(Clone, Copy)]
pub enum Origin<'a> {
    /// What the configuration wants.
    Configuration(&'a Wanted),
    /// What was saved, maybe on another host.
    Snapshot,
    /// What was saved on this one.
    ThisHost,
}

/// The boot vCPU's thread, which sets the vCPU up and waits to be told to go. Dropped instead, it ends.
pub(super) struct BootProcessor {
    made: Option<Sender<()>>,
    vcpu: Option<Sender<Vcpu>>,
    orders: Option<Sender<Order>>,
    thread: Option<VcpuThread>,
    /// What this host's KVM and the configuration make of processors.
    template: Receiver<Result<Arc<Processor>, Error>>,
    put_back: Receiver<Result<(), husk_kvm::Error>>,
}

/// What the boot vCPU's thread is told.
enum Order {
    PutBack(Box<VcpuState>, Passed),
    Go(Go),
}

/// What the boot vCPU's thread needs to enter the guest.
pub(super) struct Go {
    pub(super) shared: Arc<Shared>,
    /// The kernel's entry; None: where it was.
    pub(super) entry: Option<Box<BootState>>,
}

impl BootProcessor {
    pub(super) fn start(kvm: Arc<Kvm>, origin: Origin<'_>, aids: &Aids) -> Result<Self, Error> {
        let (made, is_made) = channel::<()>();
        let (give, given) = channel::<Vcpu>();
        let (say, template) = channel();
        let (say_back, put_back) = channel();
        let (orders, told) = channel::<Order>();
        let wanted = match origin {
            Origin::Configuration(wanted) => Some(wanted.clone()),
            Origin::Snapshot | Origin::ThisHost => None,
        };
        let is_of_this_host = matches!(origin, Origin::ThisHost);
        let aids = aids.clone();
        let body = move || {
            if recv_soon(&is_made).is_err() {
                return;
            }
            // KVM asks the processor for it, which takes as long as the main thread takes to the vCPU.
            let template = match &wanted {
                Some(wanted) => Processor::new(&kvm, wanted),
                None if is_of_this_host => Ok(Processor::unknown()),
                None => Processor::of_host(&kvm),
            };
            // The host's kernel compiles the filter: before the vCPU is there, not when the guest waits.
            aids.filters.confine(Kind::Vcpu);
            let Ok(mut vcpu) = recv_soon(&given) else {
                return;
            };
            let is_saved = wanted.is_none();
            let made = template.and_then(|template| {
                if !is_saved {
                    template.set_up(&vcpu, 0)?;
                }
                Ok(Arc::new(template))
            });
            aids.timeline.reach(Phase::VcpusReady);
            // A main thread that has failed meanwhile does not listen, and tells nobody to go.
            let _ = say.send(made);
            drop((kvm, say, wanted));
            loop {
                match recv_soon(&told) {
                    Ok(Order::PutBack(state, passed)) => {
                        drop(say_back.send(vcpu.restore(&state, &passed)));
                    }
                    Ok(Order::Go(Go { shared, entry })) => {
                        let ready = entry.map_or(Ok(()), |boot| set_entry(&vcpu, &boot));
                        return vcpu::enter(0, &mut vcpu, &shared, ready);
                    }
                    Err(_) => return,
                }
            }
        };
        let thread = VcpuThread::start(0, body).map_err(no_thread)?;
        Ok(Self {
            made: Some(made),
            vcpu: Some(give),
            orders: Some(orders),
            thread: Some(thread),
            template,
            put_back,
        })
    }

    /// KVM's VM is there: what would have disturbed it may begin.
    pub(super) fn vm_is_made(&self) {
        if let Some(sender) = &self.made {
            let _ = sender.send(());
        }
    }

    /// Give it the vCPU, bare.
    pub(super) fn furnish(&mut self, vcpu: Vcpu) {
        if let Some(sender) = self.vcpu.take() {
            // It listens: nothing else makes it end.
            let _ = sender.send(vcpu);
        }
    }

    /// Have the vCPU become what it was, if it was; [`BootProcessor::is_put_back`] tells whether it has.
    pub(super) fn put_back(&self, saved: Option<(VcpuState, Passed)>) {
        if let (Some(orders), Some((state, passed))) = (&self.orders, saved) {
            let _ = orders.send(Order::PutBack(Box::new(state), passed));
        }
    }

    pub(super) fn is_put_back(&self) -> Result<(), Error> {
        let failed = Error::State("the boot vCPU's thread failed");
        Ok(recv_soon(&self.put_back).map_err(|_| failed)??)
    }

    /// What the processors are, as soon as KVM has told and the boot vCPU is one. Once.
    pub(super) fn template(&self) -> Result<Arc<Processor>, Error> {
        let failed = Err(Error::State("the boot vCPU's thread failed"));
        recv_soon(&self.template).unwrap_or(failed)
    }

    pub(super) fn go(mut self, go: Go) -> Option<VcpuThread> {
        // It listens until this is dropped.
        let _ = self.orders.take()?.send(Order::Go(go));
        self.thread.take()
    }
}

impl Drop for BootProcessor {
    fn drop(&mut self) {
        self.made = None;
        self.vcpu = None;
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

/// Where the boot vCPU starts.
fn set_entry(vcpu: &Vcpu, boot: &BootState) -> Result<(), Error> {
    let mut sregs = vcpu.sregs()?;
    boot.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&boot.regs)?;
    Ok(())
}

/// How long threads that start a VM together wait for each other without sleep.
const MOMENT: Duration = Duration::from_millis(1);

/// Receive what is about to come.
pub(super) fn recv_soon<T>(receiver: &Receiver<T>) -> Result<T, RecvError> {
    match spin_for(receiver, MOMENT) {
        Err(RecvTimeoutError::Timeout) => receiver.recv(),
        received => received.map_err(|_| RecvError),
    }
}
