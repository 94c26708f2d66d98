//! How ranks on several machines find each other by TCP, and how all of them learn that one is gone: every rank keeps a
//! connection to rank 0, over which a few bytes go now and then. Tensors never take this way.
//!
//! Lines of text: `specforge-ranks 1 RANK SIZE`, answered by `payload HEX` or `refused WHY`; then, both ways, `alive`,
//! `failed WHY` and `bye`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::watch::Alarm;

/// How often a rank shows that it is there, and after what silence it is not.
const ALIVE_EVERY: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_secs(20);
/// Between two attempts to reach rank 0, which may start later.
const RETRY: Duration = Duration::from_millis(100);
const HELLO: &str = "specforge-ranks 1";

/// What goes wrong while ranks find each other.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank} of {size}: {why}")]
pub struct Error {
    rank: usize,
    size: usize,
    why: String,
}

type Result<T> = std::result::Result<T, Error>;

/// This rank's connections: to rank 0, or from all others.
#[derive(Debug, Clone)]
pub struct Link {
    place: (usize, usize),
    peers: Arc<Vec<(usize, Mutex<TcpStream>)>>,
    /// This rank is done, or has told already why not.
    over: Arc<AtomicBool>,
    alarm: Alarm,
}

/// Waits for all ranks; what rank 0 makes is given to all of them. Afterwards `alarm` is told once if another rank fails
/// or disappears before it has said goodbye.
pub fn meet(
    (host, port): (&str, u16),
    (rank, size): (usize, usize),
    (patience, alarm): (Duration, Alarm),
    payload: impl FnOnce() -> std::result::Result<Vec<u8>, String>,
) -> Result<(Vec<u8>, Link)> {
    let error = |why: String| Error { rank, size, why };
    let until = Instant::now() + patience;
    let (payload, peers) = if rank == 0 {
        let peers = gather((host, port), size, until).map_err(error)?;
        let payload = payload().map_err(error)?;
        for (_, stream) in &peers {
            say(stream, &format!("payload {}", hex(&payload))).map_err(|e| error(e.to_string()))?;
        }
        (payload, peers)
    } else {
        let (payload, stream) = greet((host, port), (rank, size), until).map_err(error)?;
        (payload, vec![(0, stream)])
    };
    let peers = Arc::new(peers.into_iter().map(|(rank, stream)| (rank, Mutex::new(stream))).collect());
    let link = Link { place: (rank, size), peers, over: Arc::default(), alarm };
    link.listen().map_err(|e| error(format!("the connection to another rank: {e}")))?;
    Ok((payload, link))
}

/// Rank 0: a connection from every other rank.
fn gather(
    (host, port): (&str, u16),
    size: usize,
    until: Instant,
) -> std::result::Result<Vec<(usize, TcpStream)>, String> {
    // Whatever name the others use for this machine, they come to one of its addresses.
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    let listener = listener.map_err(|e| {
        format!("cannot listen on port {port} of {host}: {e}; another run may use it: set MASTER_PORT to a free one")
    })?;
    listener.set_nonblocking(true).map_err(|e| e.to_string())?;
    let mut peers: Vec<(usize, TcpStream)> = Vec::new();
    while peers.len() + 1 < size {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Some(peer) = admit(stream, size, &peers) {
                    peers.push(peer);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(format!("cannot take connections: {e}")),
        }
        if Instant::now() > until {
            let missing: Vec<usize> = (1..size).filter(|rank| peers.iter().all(|(r, _)| r != rank)).collect();
            return Err(format!("ranks {missing:?} did not come to {host}:{port} in time"));
        }
    }
    Ok(peers)
}

/// A connection from a rank of this run; anything else is refused and forgotten.
fn admit(stream: TcpStream, size: usize, peers: &[(usize, TcpStream)]) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let line = read_line(&stream)?;
    let mut numbers = line.strip_prefix(HELLO)?.split_whitespace().map(str::parse::<usize>);
    let (rank, of) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let wrong = if of != size {
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
    (host, port): (&str, u16),
    (rank, size): (usize, usize),
    until: Instant,
) -> std::result::Result<(Vec<u8>, TcpStream), String> {
    let mut last = "it has no address".to_owned();
    loop {
        let addresses = (host, port).to_socket_addrs();
        let addresses = addresses.map_err(|e| last = e.to_string()).into_iter().flatten();
        for address in addresses {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(stream) => {
                    say(&stream, &format!("{HELLO} {rank} {size}")).map_err(|e| e.to_string())?;
                    let left = until.saturating_duration_since(Instant::now()).max(RETRY);
                    stream.set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
                    match read_line(&stream) {
                        Some(line) => return answer(&line).map(|payload| (payload, stream)),
                        None => "it hung up, or other ranks are missing".clone_into(&mut last),
                    }
                }
                Err(e) => last = e.to_string(),
            }
        }
        if Instant::now() > until {
            return Err(format!("rank 0 cannot be reached at {host}:{port}: {last}"));
        }
        std::thread::sleep(RETRY);
    }
}

fn answer(line: &str) -> std::result::Result<Vec<u8>, String> {
    if let Some(why) = line.strip_prefix("refused ") {
        return Err(format!("rank 0 refuses this rank: {why}"));
    }
    let bytes = line.strip_prefix("payload ").and_then(from_hex);
    bytes.ok_or_else(|| format!("what answers is not rank 0 of a run: {line:?}"))
}

impl Link {
    /// Tells all other ranks why this one ends; they end too.
    pub fn fail(&self, why: &str) {
        if !self.over.swap(true, Ordering::SeqCst) {
            self.say_to_all(&format!("failed {}", one_line(why)), None);
        }
    }

    /// This rank is done; that its connections close is no failure.
    pub fn leave(&self) {
        if !self.over.swap(true, Ordering::SeqCst) {
            self.say_to_all("bye", None);
        }
    }

    fn say_to_all(&self, line: &str, but: Option<usize>) {
        for (rank, stream) in self.peers.iter().filter(|(rank, _)| Some(*rank) != but) {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            // One that cannot be reached is noticed by whoever reads from it.
            let _ = say(&stream, line).map_err(|_| rank);
        }
    }

    /// Threads that read from every connection, and one that shows that this rank is there.
    fn listen(&self) -> std::io::Result<()> {
        for (rank, stream) in self.peers.iter() {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).try_clone()?;
            stream.set_read_timeout(Some(SILENCE))?;
            let (link, rank) = (self.clone(), *rank);
            std::thread::spawn(move || link.read_from(rank, stream));
        }
        let link = self.clone();
        std::thread::spawn(move || {
            while !link.over.load(Ordering::SeqCst) {
                link.say_to_all("alive", None);
                std::thread::sleep(ALIVE_EVERY);
            }
        });
        Ok(())
    }

    fn read_from(&self, rank: usize, stream: TcpStream) {
        let cause = loop_lines(stream);
        let why = match cause {
            Heard::Bye => return,
            Heard::Failed(why) => why,
            Heard::Nothing(how) => format!("rank {rank} of {} is gone: {how}", self.place.1),
        };
        if self.over.swap(true, Ordering::SeqCst) {
            return;
        }
        // The others hear the cause itself, not that rank 0 went.
        self.say_to_all(&format!("failed {}", one_line(&why)), Some(rank));
        (self.alarm)(&why);
    }
}

/// How a connection ended.
enum Heard {
    Bye,
    Failed(String),
    Nothing(&'static str),
}

fn loop_lines(stream: TcpStream) -> Heard {
    let mut lines = BufReader::new(stream).lines();
    loop {
        match lines.next() {
            Some(Ok(line)) if line == "alive" => {}
            Some(Ok(line)) if line == "bye" => return Heard::Bye,
            Some(Ok(line)) => {
                let why = line.strip_prefix("failed ").unwrap_or(&line);
                return Heard::Failed(why.to_owned());
            }
            Some(Err(e))
                if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                return Heard::Nothing("nothing was heard of it for 20 s");
            }
            Some(Err(_)) | None => return Heard::Nothing("it was killed, or its machine is"),
        }
    }
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

fn one_line(text: &str) -> String {
    text.replace('\n', "; ")
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
