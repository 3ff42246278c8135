//! The transports' own device: it sends back what it is sent.

use husk_virtio::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, F_RING_RESET, VirtioDevice,
};
use std::sync::Arc;

/// Two queues that echo.
pub struct Echo {
    config: Arc<ConfigSpace>,
    queues: [Option<ActiveQueue>; 2],
    chain: Chain,
}

impl Echo {
    /// A new one.
    pub fn boxed() -> Box<dyn VirtioDevice> {
        Box::new(Self {
            config: ConfigSpace::new(b"echo!".to_vec()),
            queues: [None, None],
            chain: Chain::default(),
        })
    }

    fn place(&mut self, index: u16) -> &mut Option<ActiveQueue> {
        &mut self.queues[usize::from(index)]
    }
}

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            features: 1 << 5 | F_RING_RESET,
            queue_sizes: vec![256, 64],
            config: Arc::clone(&self.config),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config.set(offset as usize, data);
    }

    fn start(&mut self, _features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        for queue in queues {
            let place = self.place(queue.index());
            assert!(place.is_none(), "it is started twice");
            *place = Some(queue);
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
        let chain = &mut self.chain;
        let mut echo = || {
            loop {
                queue.disable_kicks()?;
                // A guest may write while this reads: not for ever.
                for _ in 0..1000 {
                    if !queue.pop(chain)? {
                        break;
                    }
                    let mem = queue.memory().clone();
                    let mut data = vec![0; chain.readable_length().min(1 << 16) as usize];
                    let length = chain.read(&mem, 0, &mut data)?;
                    let written = chain.write(&mem, 0, &data[..length])?;
                    queue.add_used(chain.head, written as u32)?;
                }
                queue.flush()?;
                if !queue.enable_kicks()? {
                    return Ok(());
                }
            }
        };
        echo().map_err(|e| DeviceError::Queue(index, e))
    }

    fn reset_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        self.place(index).take()
    }

    fn enable_queue(&mut self, queue: ActiveQueue) -> Result<(), DeviceError> {
        let place = self.place(queue.index());
        *place = Some(queue);
        Ok(())
    }
}
