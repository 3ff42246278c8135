//! Where the console's output goes, and how much of it.

use husk_config::Serial;
use husk_console::FileOutput;
use husk_devices::rate_limiter::Allowance;
use husk_devices::serial::Output;
use husk_metrics::METRICS;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// What takes the output of `serial`: the file or named pipe that it names, else `stdout`, as far as its limit allows.
pub fn open(
    serial: &Serial,
    stdout: Arc<dyn Output>,
) -> Result<Arc<dyn Output>, (PathBuf, std::io::Error)> {
    let output = match &serial.serial_out_path {
        Some(path) => Arc::new(FileOutput::open(path).map_err(|e| (path.clone(), e))?),
        None => stdout,
    };
    Ok(match serial.rate_limiter {
        Some(limit) => Arc::new(Limited {
            output,
            allowance: Mutex::new(Allowance::new(Some(limit))),
        }),
        None => output,
    })
}

/// Drops what is more than the allowance.
struct Limited {
    output: Arc<dyn Output>,
    allowance: Mutex<Allowance>,
}

impl Output for Limited {
    fn write(&self, bytes: &[u8]) {
        let mut allowance = self
            .allowance
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let allowed = allowance.take(bytes.len() as u64);
        drop(allowance);
        match allowed {
            true => self.output.write(bytes),
            false => METRICS
                .uart
                .rate_limiter_dropped_bytes
                .add(bytes.len() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_appended_as_far_as_it_is_allowed() {
        let path = std::env::temp_dir().join(format!("husk-serial-{}", std::process::id()));
        std::fs::write(&path, "before ").unwrap();
        let limit = husk_config::TokenBucket {
            size: 5,
            one_time_burst: None,
            refill_time: 3_600_000,
        };
        let serial = Serial {
            serial_out_path: Some(path.clone()),
            rate_limiter: Some(limit),
        };
        struct Nobody;
        impl Output for Nobody {
            fn write(&self, _: &[u8]) {
                panic!("it is not for stdout");
            }
        }
        let output = open(&serial, Arc::new(Nobody)).unwrap();
        for piece in ["abc", "defg", "hi", "j"] {
            output.write(piece.as_bytes());
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "before abchi");
    }
}
