//! The transports with a device that sends back what it is sent.

use crate::testing::{Driver, Mmio, Subject, check_device, memory};
use crate::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, DeviceThread, F_RING_RESET,
    VirtioDevice,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Two queues that echo.
struct Echo {
    config: std::sync::Arc<ConfigSpace>,
    queues: Vec<Option<ActiveQueue>>,
    chain: Chain,
}

impl Echo {
    fn boxed() -> Box<dyn VirtioDevice> {
        Box::new(Self {
            config: ConfigSpace::new(b"echo!".to_vec()),
            queues: vec![None, None],
            chain: Chain::default(),
        })
    }
}

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            features: 1 << 5 | F_RING_RESET,
            queue_sizes: vec![256, 64],
            config: self.config.clone(),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config.set(offset as usize, data);
    }

    fn start(&mut self, _features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        for queue in queues {
            let index = usize::from(queue.index());
            self.queues[index] = Some(queue);
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.queues.iter_mut().filter_map(Option::take).collect()
    }

    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queues[usize::from(index)] else {
            return Ok(());
        };
        let mut echo = || loop {
            queue.disable_kicks()?;
            while queue.pop(&mut self.chain)? {
                let mem = queue.memory().clone();
                let mut data = vec![0; self.chain.readable_length().min(1 << 16) as usize];
                let length = self.chain.read(&mem, 0, &mut data)?;
                let written = self.chain.write(&mem, 0, &data[..length])?;
                queue.add_used(self.chain.head, written as u32)?;
            }
            queue.flush()?;
            if !queue.enable_kicks()? {
                return Ok(());
            }
        };
        echo().map_err(|e| DeviceError::Queue(index, e))
    }

    fn reset_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        self.queues[usize::from(index)].take()
    }

    fn enable_queue(&mut self, queue: ActiveQueue) -> Result<(), DeviceError> {
        let index = usize::from(queue.index());
        self.queues[index] = Some(queue);
        Ok(())
    }
}

fn use_echo(driver: &mut Driver) {
    for queue in 0..2 {
        for turn in 0..40u8 {
            let answer = driver.request(queue, &[&[turn, 1], &[2; 3000]], &[100, 4000]);
            assert_eq!(answer[..3], [turn, 1, 2]);
            assert_eq!(answer.len(), 3002);
        }
    }
}

#[test]
fn every_transport_drives_a_device() {
    check_device(&Subject {
        memory: crate::testing::memory,
        make: &Echo::boxed,
        use_it: &use_echo,
        use_again: None,
        eager: &[0, 1],
    });
}

/// A device that the host does not let start while `refuses` is not 0, and that counts how often it has not.
struct Unready {
    config: Arc<ConfigSpace>,
    refuses: Arc<AtomicU32>,
    not_started: Arc<AtomicU32>,
}

impl VirtioDevice for Unready {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            features: 0,
            queue_sizes: vec![16],
            config: self.config.clone(),
        }
    }
    fn start(&mut self, _features: u64, _queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        match self.refuses.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(DeviceError::Driver("came too early")),
        }
    }
    fn not_started(&mut self) {
        self.not_started.fetch_add(1, Ordering::SeqCst);
    }
    fn stop(&mut self) -> Vec<ActiveQueue> {
        Vec::new()
    }
    fn queue_ready(&mut self, _index: u16) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_device_learns_that_it_was_to_start_and_has_not() {
    let (refuses, not_started) = (Arc::new(AtomicU32::new(1)), Arc::default());
    let device = Unready {
        config: ConfigSpace::new(Vec::new()),
        refuses: Arc::clone(&refuses),
        not_started: Arc::clone(&not_started),
    };
    let thread = Arc::new(DeviceThread::start("unready", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(Box::new(device), &thread, &mem));
    let mut driver = Driver::new(registers, mem);
    driver.set_up(u64::MAX, 16);
    driver.registers.set_status(15);
    assert_eq!(driver.registers.status(), 15 | 0x40);
    assert_eq!(not_started.load(Ordering::SeqCst), 1);
    refuses.store(0, Ordering::SeqCst);
    driver.start_badly();
    assert_eq!(not_started.load(Ordering::SeqCst), 2);
    driver.start(u64::MAX, 16);
    assert_eq!(not_started.load(Ordering::SeqCst), 2);
}
