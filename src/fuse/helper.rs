//! fusermount3: mounts and unmounts for users who may not. It opens /dev/fuse, mounts, and hands the descriptor over
//! through a socket.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::mount::Wish;

/// libfuse 3's name, then that of version 2, which some have only.
const PROGRAMS: [&str; 2] = ["fusermount3", "fusermount"];

/// Tells it at which descriptor the socket is; the socket is its standard input.
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";

/// Mounts, and returns the open /dev/fuse.
///
/// # Errors
/// One line: there is no fusermount3, or it says why not.
pub(super) fn mount(path: &Path, wish: &Wish<'_>) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().context("no socket for fusermount3")?;
    let mut options = OsString::from("rw,nosuid,nodev,default_permissions,subtype=nbdbridge,fsname=");
    if wish.read_only {
        options = OsString::from("ro,nosuid,nodev,default_permissions,subtype=nbdbridge,fsname=");
    }
    options.push(escape_commas(wish.source));
    if wish.allow_other {
        options.push(",allow_other");
    }
    let child = start(|command| {
        command.arg("-o").arg(&options).arg("--").arg(path).env(SOCKET_VARIABLE, "0");
        command.stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)));
        Ok(())
    })?;
    // Only the program has it now: when it ends, our side sees that.
    drop(theirs);
    let received = receive(&ours);
    let output = child.wait_with_output().context("fusermount3")?;
    match received {
        Ok(Some(device)) if output.status.success() => Ok(device),
        Ok(_) => bail!("{}: {}", path.display(), refusal(&output.stderr)),
        Err(error) => Err(error).context("fusermount3"),
    }
}

/// Unmounts; `lazily` also what is in use.
///
/// # Errors
/// One line: there is no fusermount3, or it says why not.
pub(super) fn unmount(path: &Path, lazily: bool) -> Result<()> {
    let child = start(|command| {
        command.arg("-u");
        if lazily {
            command.arg("-z");
        }
        command.arg("--").arg(path).stdin(Stdio::null());
        Ok(())
    })?;
    let output = child.wait_with_output().context("fusermount3")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{}: {}", path.display(), refusal(&output.stderr))
}

fn start(set_up: impl Fn(&mut Command) -> io::Result<()>) -> Result<std::process::Child> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        set_up(&mut command).context("fusermount3")?;
        match command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            spawned => return spawned.with_context(|| format!("cannot start {program}")),
        }
    }
    bail!("there is no fusermount3, which mounts for users; install the package fuse3, or be root")
}

/// The descriptor that the other end passes; None where it ends without.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut passed = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut passed, flags))?;
    let descriptors = passed.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptors.last())
}

/// What the program said, and the way out where it is known.
fn refusal(stderr: &[u8]) -> String {
    let said = String::from_utf8_lossy(stderr);
    let said = said.lines().next().unwrap_or("fusermount3 failed and does not say why").trim().to_owned();
    if said.contains("user_allow_other") {
        return "--allow-other needs the line user_allow_other in /etc/fuse.conf; or be root".to_owned();
    }
    if said.contains("failed to open /dev/fuse: Permission denied") {
        return "/dev/fuse is open to root only; let users in: chmod 666 /dev/fuse (as root), as udev does"
            .to_owned();
    }
    said
}

/// In a list of options a comma needs a backslash.
fn escape_commas(text: &OsStr) -> OsString {
    let mut bytes = Vec::new();
    for byte in text.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(*byte);
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_refusals() {
        assert_eq!(escape_commas(OsStr::new(r"a,b\c")), r"a\,b\\c");
        let text =
            b"fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf\n";
        assert!(refusal(text).contains("/etc/fuse.conf; or be root"));
        let text = b"fusermount3: failed to open /dev/fuse: Permission denied\n";
        assert!(refusal(text).contains("let users in: chmod 666 /dev/fuse"));
        assert_eq!(refusal(b"fusermount3: bad mount point\nmore\n"), "fusermount3: bad mount point");
        assert!(!refusal(b"").is_empty());
    }

    #[test]
    fn a_socket_that_closes_passes_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(receive(&ours).unwrap().is_none());
    }
}
