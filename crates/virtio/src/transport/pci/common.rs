//! The common configuration structure (4.1.4.3).

use super::{Messages, NO_VECTOR};
use crate::device::DeviceError;
use crate::transport::{Core, CoreState, Ring};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// Offsets of the fields.
mod field {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_RESET: u64 = 58;
    /// End of the three 64-bit addresses.
    pub const ADDRESSES_END: u64 = 56;
}

/// The structure's state, over the core.
pub(super) struct Common {
    core: Core,
    messages: Arc<Messages>,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
}

/// What a snapshot holds of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CommonState {
    /// The device.
    pub core: CoreState,
    /// Fields that select.
    pub device_features_select: u32,
    /// See above.
    pub driver_features_select: u32,
    /// See above.
    pub queue_select: u16,
    /// The vector for changes of the configuration.
    pub config_vector: u16,
    /// The vector of each queue.
    pub queue_vectors: Vec<u16>,
}

impl Common {
    pub(super) fn save(&self) -> Option<CommonState> {
        let vector = |of: &AtomicU16| of.load(Ordering::Acquire);
        Some(CommonState {
            core: self.core.save()?,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            config_vector: vector(&self.messages.config),
            queue_vectors: self.messages.queues.iter().map(vector).collect(),
        })
    }

    pub(super) fn load(&mut self, state: CommonState) -> Result<(), DeviceError> {
        if state.queue_vectors.len() != self.messages.queues.len() {
            let why = "the saved device has not a vector for each queue";
            return Err(DeviceError::Unsupported(why.into()));
        }
        self.core.load(state.core)?;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        let messages = &self.messages;
        messages.set_vector(&messages.config, state.config_vector);
        for (own, vector) in messages.queues.iter().zip(state.queue_vectors) {
            messages.set_vector(own, vector);
        }
        Ok(())
    }

    pub(super) fn new(core: Core, messages: Arc<Messages>) -> Self {
        Self {
            core,
            messages,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        }
    }

    pub(super) fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// 4.1.3.1: each field is accessed at its own width, 64-bit ones in halves. What is not a field reads as 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match data.len() {
            1 => self.read_byte(offset).map(u64::from),
            2 => self.read_word(offset).map(u64::from),
            4 => self.read_dword(offset).map(u64::from),
            8 => self.address(offset),
            _ => None,
        };
        let bytes = value.unwrap_or(0).to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// As [`Common::read`]; other writes are ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == field::DEVICE_STATUS => self.set_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(ring(offset), Some((_, false))) => {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn read_byte(&self, offset: u64) -> Option<u8> {
        match offset {
            field::DEVICE_STATUS => Some(self.core.status()),
            field::CONFIG_GENERATION => Some(self.core.config_generation()),
            _ => None,
        }
    }

    fn read_word(&self, offset: u64) -> Option<u16> {
        let queue = self.queue_select;
        let vector = |of: &AtomicU16| of.load(Ordering::Acquire);
        Some(match offset {
            field::CONFIG_MSIX_VECTOR => vector(&self.messages.config),
            field::NUM_QUEUES => self.core.queue_count(),
            field::QUEUE_SELECT => queue,
            // 0: there is no such queue.
            field::QUEUE_SIZE => self.core.queue_size(queue),
            field::QUEUE_MSIX_VECTOR => self.queue_vector().map_or(NO_VECTOR, vector),
            field::QUEUE_ENABLE => self.core.is_queue_enabled(queue).into(),
            field::QUEUE_NOTIFY_OFF if queue < self.core.queue_count() => queue,
            // A reset is done when the write returns.
            field::QUEUE_RESET => 0,
            _ => return None,
        })
    }

    fn read_dword(&self, offset: u64) -> Option<u32> {
        Some(match offset {
            field::DEVICE_FEATURE_SELECT => self.device_features_select,
            field::DEVICE_FEATURE => self.core.device_features(self.device_features_select),
            field::DRIVER_FEATURE_SELECT => self.driver_features_select,
            field::DRIVER_FEATURE => self.core.driver_features(self.driver_features_select),
            _ => {
                let (part, high) = ring(offset)?;
                let address = self.core.queue_address(self.queue_select, part);
                (address >> if high { 32 } else { 0 }) as u32
            }
        })
    }

    fn address(&self, offset: u64) -> Option<u64> {
        let (part, high) = ring(offset)?;
        (!high).then(|| self.core.queue_address(self.queue_select, part))
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        let queue = self.queue_select;
        match offset {
            field::CONFIG_MSIX_VECTOR => self.messages.set_vector(&self.messages.config, value),
            field::QUEUE_SELECT => self.queue_select = value,
            field::QUEUE_SIZE => self.core.set_queue_size(queue, value),
            field::QUEUE_MSIX_VECTOR => {
                if let Some(vector) = self.queue_vector() {
                    self.messages.set_vector(vector, value);
                }
            }
            field::QUEUE_ENABLE if value == 1 => self.core.enable_queue(queue),
            field::QUEUE_RESET if value == 1 => self.reset_queue(),
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        match offset {
            field::DEVICE_FEATURE_SELECT => self.device_features_select = value,
            field::DRIVER_FEATURE_SELECT => self.driver_features_select = value,
            field::DRIVER_FEATURE => {
                let select = self.driver_features_select;
                self.core.set_driver_features(select, value);
            }
            _ => {
                if let Some((part, high)) = ring(offset) {
                    let queue = self.queue_select;
                    self.core.set_queue_address(queue, part, high, value);
                }
            }
        }
    }

    /// 4.1.4.3.1: a reset device has no vectors, and the selectors begin anew.
    fn set_status(&mut self, value: u8) {
        self.core.set_status(value);
        if value == 0 {
            self.messages.reset();
            self.device_features_select = 0;
            self.driver_features_select = 0;
            self.queue_select = 0;
        }
    }

    /// The queue's vector goes with its other settings.
    fn reset_queue(&mut self) {
        let enabled = self.core.is_queue_enabled(self.queue_select);
        self.core.reset_queue(self.queue_select);
        if enabled
            && !self.core.is_queue_enabled(self.queue_select)
            && let Some(vector) = self.queue_vector()
        {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn queue_vector(&self) -> Option<&AtomicU16> {
        self.messages.queues.get(usize::from(self.queue_select))
    }
}

/// Which part of a queue an address field is of, and whether its upper half.
fn ring(offset: u64) -> Option<(Ring, bool)> {
    let part = match offset {
        field::QUEUE_DESC..field::QUEUE_DRIVER => Ring::Descriptors,
        field::QUEUE_DRIVER..field::QUEUE_DEVICE => Ring::Available,
        field::QUEUE_DEVICE..field::ADDRESSES_END => Ring::Used,
        _ => return None,
    };
    match offset % 8 {
        0 => Some((part, false)),
        4 => Some((part, true)),
        _ => None,
    }
}
