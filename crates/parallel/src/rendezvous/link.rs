//! The connections between rank 0 and all others while they work.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::say;
use crate::watch::Alarm;

/// How often a rank shows that it is there, and after what silence it is not.
const ALIVE_EVERY: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_secs(20);

/// This rank's connections: to rank 0, or from all others.
#[derive(Debug, Clone)]
pub struct Link {
    place: (usize, usize),
    peers: Arc<Vec<(usize, Mutex<TcpStream>)>>,
    /// This rank is done, or has told already why not.
    over: Arc<AtomicBool>,
    alarm: Alarm,
}

impl Link {
    pub(super) fn new(
        place: (usize, usize),
        peers: Vec<(usize, TcpStream)>,
        alarm: Alarm,
    ) -> std::io::Result<Self> {
        let peers = Arc::new(peers.into_iter().map(|(rank, stream)| (rank, Mutex::new(stream))).collect());
        let link = Self { place, peers, over: Arc::default(), alarm };
        link.listen()?;
        Ok(link)
    }

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

fn one_line(text: &str) -> String {
    text.replace('\n', "; ")
}
