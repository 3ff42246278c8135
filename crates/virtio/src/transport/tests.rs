//! The transports with a device that sends back what it is sent.

use crate::testing::{Driver, Subject, check_device};
use crate::{ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, F_RING_RESET, VirtioDevice};

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
