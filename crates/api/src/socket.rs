//! The socket's file.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("the API socket {} is another process's, which listens on it; choose another path", .0.display())]
    Live(PathBuf),
    /// A socket that nobody listens on.
    #[error(
        "the API socket {} is there already, and nobody listens on it: a process that was killed has left it; remove it (rm {}), or choose another path", .0.display(), .0.display()
    )]
    Stale(PathBuf),
    /// Something else.
    #[error("{} is there already, and is no socket; choose another path for the API socket", .0.display())]
    Occupied(PathBuf),
    /// The host refuses.
    #[error("cannot make the API socket {}", path.display())]
    Host {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Make the socket at `path` and listen. Only its owner may connect (mode 0600). What is there already is left alone.
///
/// Changes the process's file mode mask for a moment, so call it before there are threads that make files.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(mask);
    bound.map_err(|source| match source.kind() {
        ErrorKind::AddrInUse => occupied(path),
        _ => SocketError::Host {
            path: path.into(),
            source,
        },
    })
}

fn occupied(path: &Path) -> SocketError {
    match UnixStream::connect(path) {
        Ok(_) => SocketError::Live(path.into()),
        Err(_) => {
            use std::os::unix::fs::FileTypeExt;
            let is_socket = std::fs::symlink_metadata(path)
                .is_ok_and(|metadata| metadata.file_type().is_socket());
            match is_socket {
                true => SocketError::Stale(path.into()),
                false => SocketError::Occupied(path.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_owner_may_connect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_is_there_already_is_told_apart_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::Live(_))));
        drop(listener);
        let stale = bind(&path).unwrap_err();
        assert!(matches!(stale, SocketError::Stale(_)));
        assert!(stale.to_string().contains("rm "), "{stale}");
        let file = dir.path().join("f");
        std::fs::write(&file, "mine").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::Occupied(_))));
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
        let nowhere = dir.path().join("no/such");
        assert!(matches!(bind(&nowhere), Err(SocketError::Host { .. })));
    }
}
