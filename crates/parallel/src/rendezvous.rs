//! How ranks on several machines find each other, by TCP at a place that all know or through a folder that all see; and
//! how all of them learn that one is gone: every rank keeps a connection to rank 0, over which a few bytes go now and
//! then. Tensors never take this way.
//!
//! Lines of text: `specforge-ranks 1 RANK SIZE TOKEN`, answered by `payload HEX` or `refused WHY`; then, both ways,
//! `alive`, `failed WHY` and `bye`.

mod link;

use std::io::Write;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::watch::Alarm;
pub use link::Link;

/// Between two attempts to reach rank 0, which may start later.
const RETRY: Duration = Duration::from_millis(100);
const HELLO: &str = "specforge-ranks 1";
/// What ranks say that need no token to tell their run from others.
const NO_TOKEN: &str = "-";
/// The file of a folder in which rank 0 says where it is.
const ADDRESS: &str = "rank-0";

/// Where ranks find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meeting {
    /// Host and port of rank 0.
    At(String, u16),
    /// A folder that all ranks see: rank 0 writes there where it listens.
    Folder(PathBuf),
}

/// What goes wrong while ranks find each other.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank} of {size}: {why}")]
pub struct Error {
    rank: usize,
    size: usize,
    why: String,
}

type Result<T> = std::result::Result<T, Error>;

/// Waits for all ranks; what rank 0 makes is given to all of them. Afterwards `alarm` is told once if another rank fails
/// or disappears before it has said goodbye.
pub fn meet(
    meeting: &Meeting,
    (rank, size): (usize, usize),
    (patience, alarm): (Duration, Alarm),
    payload: impl FnOnce() -> std::result::Result<Vec<u8>, String>,
) -> Result<(Vec<u8>, Link)> {
    let error = |why: String| Error { rank, size, why };
    let until = Instant::now() + patience;
    let (payload, peers) = if rank == 0 {
        let peers = gather(meeting, size, until).map_err(error)?;
        let payload = payload().map_err(error)?;
        for (_, stream) in &peers {
            say(stream, &format!("payload {}", hex(&payload))).map_err(|e| error(e.to_string()))?;
        }
        (payload, peers)
    } else {
        let (payload, stream) = greet(meeting, (rank, size), until).map_err(error)?;
        (payload, vec![(0, stream)])
    };
    let link = Link::new((rank, size), peers, alarm);
    Ok((payload, link.map_err(|e| error(format!("the connection to another rank: {e}")))?))
}

/// Rank 0: a connection from every other rank.
fn gather(
    meeting: &Meeting,
    size: usize,
    until: Instant,
) -> std::result::Result<Vec<(usize, TcpStream)>, String> {
    let (listener, token) = match meeting {
        Meeting::At(host, port) => (listen(host, *port)?, NO_TOKEN.to_owned()),
        Meeting::Folder(folder) => announce(folder)?,
    };
    listener.set_nonblocking(true).map_err(|e| e.to_string())?;
    let mut peers: Vec<(usize, TcpStream)> = Vec::new();
    while peers.len() + 1 < size {
        match listener.accept() {
            Ok((stream, _)) => peers.extend(admit(stream, (size, &token), &peers)),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(format!("cannot take connections: {e}")),
        }
        if Instant::now() > until {
            let missing: Vec<usize> = (1..size).filter(|rank| peers.iter().all(|(r, _)| r != rank)).collect();
            return Err(format!("ranks {missing:?} did not come to {} in time", meeting.name()));
        }
    }
    if let Meeting::Folder(folder) = meeting {
        // Nobody needs it any more; the next run writes its own.
        let _ = std::fs::remove_file(folder.join(ADDRESS));
    }
    Ok(peers)
}

fn listen(host: &str, port: u16) -> std::result::Result<TcpListener, String> {
    // Whatever name the others use for this machine, they come to one of its addresses.
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    listener.map_err(|e| {
        format!("cannot listen on port {port} of {host}: {e}; another run may use it: set MASTER_PORT to a free one")
    })
}

/// Listens on a free port and writes where to the folder, with a token that only this run's ranks know.
fn announce(folder: &Path) -> std::result::Result<(TcpListener, String), String> {
    let listener = listen("this machine", 0)?;
    let port = listener.local_addr().map_err(|e| e.to_string())?.port();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    let token = format!("{:x}{now:x}", std::process::id());
    let unfinished = folder.join(format!("{ADDRESS}.{token}.tmp"));
    let text = format!("{} {port} {token}\n", host.trim());
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&unfinished, text))
        .and_then(|()| std::fs::rename(&unfinished, folder.join(ADDRESS)));
    written.map_err(|e| format!("{}: {e}", folder.display()))?;
    Ok((listener, token))
}

impl Meeting {
    fn name(&self) -> String {
        match self {
            Self::At(host, port) => format!("{host}:{port}"),
            Self::Folder(folder) => folder.display().to_string(),
        }
    }

    /// Where rank 0 is, as far as is known by now, and the token of its run.
    fn addresses(&self) -> std::result::Result<(Vec<(String, u16)>, String), String> {
        match self {
            Self::At(host, port) => Ok((vec![(host.clone(), *port)], NO_TOKEN.to_owned())),
            Self::Folder(folder) => {
                let path = folder.join(ADDRESS);
                let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let mut words = text.split_whitespace().map(str::to_owned);
                let mut parsed = || Some((words.next()?, words.next()?.parse().ok()?, words.next()?));
                let (host, port, token) = parsed().ok_or_else(|| format!("{}: not ours", path.display()))?;
                // A machine need not know its own name.
                Ok((vec![(host, port), ("127.0.0.1".to_owned(), port)], token))
            }
        }
    }
}

/// A connection from a rank of this run; anything else is refused and forgotten.
fn admit(
    stream: TcpStream,
    (size, token): (usize, &str),
    peers: &[(usize, TcpStream)],
) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let line = read_line(&stream)?;
    let mut words = line.strip_prefix(HELLO)?.split_whitespace();
    let (rank, of) = (words.next()?.parse::<usize>().ok()?, words.next()?.parse::<usize>().ok()?);
    let wrong = if words.next() != Some(token) {
        // A rank of another run: it hears nothing and looks again.
        return None;
    } else if of != size {
        Some(format!("it says there are {of} ranks, rank 0 says {size}"))
    } else if rank == 0 || rank >= size || peers.iter().any(|(other, _)| *other == rank) {
        Some(format!("there is a rank {rank} already: two runs with the same MASTER_PORT?"))
    } else {
        None
    };
    if let Some(why) = wrong {
        // It reads this or it is gone; either way it is not one of ours.
        let _ = say(&stream, &format!("refused {why}"));
        return None;
    }
    Some((rank, stream))
}

/// Another rank: the connection to rank 0 and what it gives to all.
fn greet(
    meeting: &Meeting,
    (rank, size): (usize, usize),
    until: Instant,
) -> std::result::Result<(Vec<u8>, TcpStream), String> {
    loop {
        let why = match meeting.addresses() {
            Ok((places, token)) => {
                match greet_at(&places, &format!("{HELLO} {rank} {size} {token}"), until) {
                    Ok((line, stream)) => return answer(&line).map(|payload| (payload, stream)),
                    Err(why) => why,
                }
            }
            Err(why) => why,
        };
        if Instant::now() > until {
            return Err(format!("rank 0 cannot be reached at {}: {why}", meeting.name()));
        }
        std::thread::sleep(RETRY);
    }
}

/// The first answer from any of these places.
fn greet_at(
    places: &[(String, u16)],
    hello: &str,
    until: Instant,
) -> std::result::Result<(String, TcpStream), String> {
    let mut why = "it has no address".to_owned();
    for (host, port) in places {
        let addresses = (host.as_str(), *port).to_socket_addrs();
        for address in addresses.map_err(|e| why = e.to_string()).into_iter().flatten() {
            let asked = TcpStream::connect_timeout(&address, Duration::from_secs(5)).and_then(|stream| {
                say(&stream, hello)?;
                let left = until.saturating_duration_since(Instant::now()).max(RETRY);
                stream.set_read_timeout(Some(left))?;
                Ok(stream)
            });
            match asked.map(|stream| (read_line(&stream), stream)) {
                Ok((Some(line), stream)) => return Ok((line, stream)),
                Ok((None, _)) => "it hung up, or other ranks are missing".clone_into(&mut why),
                Err(e) => why = e.to_string(),
            }
        }
    }
    Err(why)
}

fn answer(line: &str) -> std::result::Result<Vec<u8>, String> {
    if let Some(why) = line.strip_prefix("refused ") {
        return Err(format!("rank 0 refuses this rank: {why}"));
    }
    let bytes = line.strip_prefix("payload ").and_then(from_hex);
    bytes.ok_or_else(|| format!("what answers is not rank 0 of a run: {line:?}"))
}

fn say(mut stream: &TcpStream, line: &str) -> std::io::Result<()> {
    stream.write_all(format!("{line}\n").as_bytes())
}

/// A line, byte by byte: what follows it is for another reader.
fn read_line(mut stream: &TcpStream) -> Option<String> {
    use std::io::Read;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.len() < 1 << 16 {
        stream.read_exact(&mut byte).ok()?;
        if byte[0] == b'\n' {
            return String::from_utf8(line).ok();
        }
        line.push(byte[0]);
    }
    None
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|d| char::from_digit(d.into(), 16))
        .collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pair = |i: usize| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok();
    text.len().is_multiple_of(2).then(|| (0..text.len() / 2).map(pair).collect())?
}
