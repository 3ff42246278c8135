//! What the monitor says of itself, in the shapes of Firecracker's API.

use serde::{Deserialize, Deserializer, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// Log messages. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// The file or FIFO that messages are appended to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Which messages there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Each message says its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Each message says its source file and line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of modules whose path begins like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Which messages there are: those of this level and of all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum LogLevel {
    /// None.
    Off,
    /// What went wrong.
    Error,
    /// What may go wrong. `Warning` in JSON, too.
    Warn,
    /// What happens now and then.
    Info,
    /// What happens often.
    Debug,
    /// Everything.
    Trace,
}

impl FromStr for LogLevel {
    type Err = String;

    /// In upper or lower case, as Firecracker takes it.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => {
                return Err(format!(
                    "there is no log level {text:?}: it is one of Off, Error, Warn, Info, Debug, Trace"
                ));
            }
        })
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// The file or FIFO that lines of JSON are appended to.
    pub metrics_path: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_firecrackers_in_any_case() {
        for (text, level) in [
            ("Off", LogLevel::Off),
            ("ERROR", LogLevel::Error),
            ("warn", LogLevel::Warn),
            ("Warning", LogLevel::Warn),
            ("Info", LogLevel::Info),
            ("debug", LogLevel::Debug),
            ("tRaCe", LogLevel::Trace),
        ] {
            let json = format!(r#"{{"level":"{text}"}}"#);
            let logger: Logger = serde_json::from_str(&json).unwrap();
            assert_eq!(logger.level, Some(level), "{text}");
        }
        let error = serde_json::from_str::<Logger>(r#"{"level":"loud"}"#).unwrap_err();
        assert!(error.to_string().contains("loud"), "{error}");
    }

    #[test]
    fn fields_are_firecrackers_and_no_others() {
        let json = r#"{"log_path":"l","level":"Info","show_level":true,"show_log_origin":false,"module":"m"}"#;
        let logger: Logger = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&logger).unwrap(), json);
        assert!(serde_json::from_str::<Logger>(r#"{"path":"l"}"#).is_err());
        let metrics: Metrics = serde_json::from_str(r#"{"metrics_path":"m"}"#).unwrap();
        assert_eq!(metrics.metrics_path, PathBuf::from("m"));
        for bad in [
            "{}",
            r#"{"metrics_path":3}"#,
            r#"{"metrics_path":"m","x":1}"#,
        ] {
            assert!(serde_json::from_str::<Metrics>(bad).is_err(), "{bad}");
        }
    }
}
