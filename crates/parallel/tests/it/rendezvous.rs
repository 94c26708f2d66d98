//! Ranks find each other by TCP, and learn that one of them is gone.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use specforge_parallel::rendezvous::{Link, Meeting, meet};

const PATIENCE: Duration = Duration::from_secs(20);
/// What the alarms of a test say; tests that use it run one at a time.
static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());
static ALONE: Mutex<()> = Mutex::new(());

fn hear(why: &str) {
    HEARD.lock().unwrap().push(why.to_owned());
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn at(port: u16) -> Meeting {
    Meeting::At("127.0.0.1".to_owned(), port)
}

/// All ranks of a meeting, each on a thread of its own.
fn all(size: usize, port: u16) -> Vec<Link> {
    all_at(size, &at(port))
}

fn all_at(size: usize, meeting: &Meeting) -> Vec<Link> {
    std::thread::scope(|scope| {
        let join = |rank| {
            move || {
                let made = || Ok(vec![7, 0, 255]);
                let (payload, link) = meet(meeting, (rank, size), (PATIENCE, hear), made).unwrap();
                assert_eq!(payload, [7, 0, 255]);
                link
            }
        };
        // Rank 0 comes last.
        let mut running: Vec<_> = (1..size).map(|rank| scope.spawn(join(rank))).collect();
        std::thread::sleep(Duration::from_millis(50));
        running.insert(0, scope.spawn(join(0)));
        running.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

fn wait_for(n: usize) -> Vec<String> {
    let until = Instant::now() + Duration::from_secs(10);
    while HEARD.lock().unwrap().len() < n && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    std::mem::take(&mut *HEARD.lock().unwrap())
}

#[test]
fn parallel_ranks_meet_and_part_in_peace() {
    let _alone = ALONE.lock().unwrap();
    for size in [1, 2, 5] {
        let links = all(size, free_port());
        links.iter().for_each(Link::leave);
        drop(links);
    }
    assert_eq!(wait_for(0), Vec::<String>::new());
}

/// Also where an earlier run has left its address, or something else has the name.
#[test]
fn parallel_ranks_meet_in_a_folder() {
    let _alone = ALONE.lock().unwrap();
    let folder = specforge_testkit::tempdir();
    let meeting = Meeting::Folder(folder.path().join("below"));
    for left in [None, Some("nowhere 1 abc"), Some("?")] {
        if let Some(left) = left {
            std::fs::write(folder.path().join("below/rank-0"), left).unwrap();
        }
        let links = all_at(3, &meeting);
        links.iter().for_each(Link::leave);
        assert!(std::fs::read_dir(folder.path().join("below")).unwrap().next().is_none());
    }
    assert_eq!(wait_for(0), Vec::<String>::new());
}

#[test]
fn parallel_the_cause_of_a_failure_reaches_every_rank() {
    let _alone = ALONE.lock().unwrap();
    for failing in [0, 2] {
        let links = all(4, free_port());
        links[failing].fail("row 17: the disk\nsays no");
        // All but the one that told it.
        assert_eq!(wait_for(3), vec!["row 17: the disk; says no"; 3]);
    }
}

/// As when a rank is killed: its connection closes without a word.
#[test]
fn parallel_a_rank_that_disappears_is_named_to_all() {
    let _alone = ALONE.lock().unwrap();
    let port = free_port();
    std::thread::scope(|scope| {
        let rank = |rank| {
            scope.spawn(move || meet(&at(port), (rank, 3), (PATIENCE, hear), || Ok(vec![1])).unwrap().1)
        };
        let staying = [rank(0), rank(1)];
        let mut killed = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        killed.write_all(b"specforge-ranks 1 2 3 -\n").unwrap();
        let links = staying.map(|r| r.join().unwrap());
        drop(killed);
        let said = wait_for(2);
        assert_eq!(said, vec!["rank 2 of 3 is gone: it was killed, or its machine is"; 2]);
        drop(links);
    });
}

#[test]
fn parallel_a_meeting_that_cannot_be_says_why() {
    let port = free_port();
    let short = Duration::from_millis(300);
    let said = |rank, size| {
        let met = meet(&at(port), (rank, size), (short, hear), || Ok(Vec::new()));
        met.unwrap_err().to_string()
    };
    assert!(said(1, 2).contains("rank 1 of 2: rank 0 cannot be reached at 127.0.0.1"), "{}", said(1, 2));
    assert!(said(0, 3).contains("ranks [1, 2] did not come"), "{}", said(0, 3));
    let taken = TcpListener::bind(("::", port)).unwrap();
    assert!(said(0, 2).contains("MASTER_PORT"), "{}", said(0, 2));
    drop(taken);
    // Another run's rank is refused; the run itself goes on.
    std::thread::scope(|scope| {
        let first = scope.spawn(|| meet(&at(port), (0, 2), (PATIENCE, hear), || Ok(vec![1])).unwrap().1);
        let stranger = meet(&at(port), (1, 5), (PATIENCE, hear), || Ok(Vec::new()));
        let said = stranger.unwrap_err().to_string();
        assert!(said.contains("it says there are 5 ranks, rank 0 says 2"), "{said}");
        let second = meet(&at(port), (1, 2), (PATIENCE, hear), || Ok(Vec::new())).unwrap().1;
        let first = first.join().unwrap();
        first.leave();
        second.leave();
    });
}
