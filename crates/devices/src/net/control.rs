//! The control queue (5.1.6.5): how many pairs of queues the driver uses. Other commands were not offered.

use super::Budget;
use husk_virtio::{ActiveQueue, Chain, QueueError};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

const SET_PAIRS: [u8; 2] = [
    VIRTIO_NET_CTRL_MQ as u8,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
];

/// Answer what is in the queue. `set_pairs` does what it says, and tells whether it could.
pub fn answer(
    queue: &mut ActiveQueue,
    chain: &mut Chain,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Result<(), QueueError> {
    let mut budget = Budget::default();
    loop {
        queue.disable_kicks()?;
        while queue.pop(chain)? {
            // Class, command, and of the only command that is known, the number.
            let mut command = [0; 4];
            let length = chain.read(queue.memory(), 0, &mut command)?;
            let [class, code, low, high] = command;
            let known = [class, code] == SET_PAIRS && length == command.len();
            let done = known && set_pairs(u16::from_le_bytes([low, high]));
            let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let written = chain.write(queue.memory(), 0, &[ack as u8])?;
            queue.add_used(chain.head, written as u32)?;
            if budget.is_spent(0) {
                queue.flush()?;
                let _ = queue.kick().write(1);
                return Ok(());
            }
        }
        queue.flush()?;
        if !queue.enable_kicks()? {
            return Ok(());
        }
    }
}
