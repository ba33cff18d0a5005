//! The calculation service: even numbers go out with a sequence number, sums of two primes come back and are checked.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpStream, UdpSocket, tcp};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use super::arrivals::mix;
use super::record::{Answer, Failure};

/// Numbers below this are asked for; large enough that the server has something to do.
const LARGEST: u64 = 10_000_000;
/// A longer line is none of the service's.
const LONGEST_LINE: u64 = 256;

/// Questions that wait for their answer, by sequence number.
type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<String>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct CalcClient {
    address: SocketAddr,
    seed: u64,
    sequence: AtomicU64,
    waiting: Waiting,
    way: Way,
}

enum Way {
    Udp(AsyncMutex<Option<Arc<UdpSocket>>>),
    /// Some connections that are kept and used in turn.
    Tcp(Vec<AsyncMutex<Option<tcp::OwnedWriteHalf>>>),
}

impl CalcClient {
    pub(super) fn udp(address: SocketAddr, seed: u64) -> Self {
        Self::new(address, seed, Way::Udp(AsyncMutex::new(None)))
    }

    pub(super) fn tcp(address: SocketAddr, seed: u64, connections: usize) -> Self {
        let connections = (0..connections.max(1)).map(|_| AsyncMutex::new(None)).collect();
        Self::new(address, seed, Way::Tcp(connections))
    }

    fn new(address: SocketAddr, seed: u64, way: Way) -> Self {
        Self {
            address,
            seed,
            sequence: AtomicU64::new(1),
            waiting: Arc::default(),
            way,
        }
    }

    pub(super) async fn ask(&self) -> Result<Answer, Failure> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let number = 4 + mix(self.seed ^ sequence) % LARGEST / 2 * 2;
        let (tell, told) = oneshot::channel();
        lock(&self.waiting).insert(sequence, tell);
        // However this ends, also by a time-out that drops it, nobody waits for this number any more.
        let _forget = Forget {
            waiting: &self.waiting,
            sequence,
        };
        let question = format!("{sequence} {number}\n");
        let sent = match &self.way {
            Way::Udp(socket) => self.send_datagram(socket, &question).await,
            Way::Tcp(connections) => {
                let turn = sequence as usize % connections.len().max(1);
                match connections.get(turn) {
                    Some(connection) => self.send_line(connection, &question).await,
                    None => Ok(()),
                }
            }
        };
        sent.map_err(|e| Failure::Error(format!("could not ask {}: {e}", self.address)))?;
        match told.await {
            Ok(answer) => check(number, &answer).map_err(Failure::Wrong).map(|()| Answer {
                bytes: answer.len() as u64,
            }),
            Err(_) => Err(Failure::Error("the connection was lost".to_owned())),
        }
    }

    async fn send_datagram(
        &self,
        place: &AsyncMutex<Option<Arc<UdpSocket>>>,
        question: &str,
    ) -> std::io::Result<()> {
        let mut place = place.lock().await;
        let socket = match &*place {
            Some(socket) => Arc::clone(socket),
            None => {
                let any: SocketAddr = match self.address {
                    SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
                    SocketAddr::V6(_) => ([0u16; 8], 0).into(),
                };
                let socket = Arc::new(UdpSocket::bind(any).await?);
                socket.connect(self.address).await?;
                tokio::spawn(hear_datagrams(Arc::clone(&socket), Arc::clone(&self.waiting)));
                *place = Some(Arc::clone(&socket));
                socket
            }
        };
        drop(place);
        socket.send(question.as_bytes()).await.map(drop)
    }

    async fn send_line(
        &self,
        place: &AsyncMutex<Option<tcp::OwnedWriteHalf>>,
        question: &str,
    ) -> std::io::Result<()> {
        let mut place = place.lock().await;
        if let Some(connection) = place.as_mut() {
            match connection.write_all(question.as_bytes()).await {
                Ok(()) => return Ok(()),
                // Closed since the last question: try a new one.
                Err(_) => *place = None,
            }
        }
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (reader, mut writer) = stream.into_split();
        tokio::spawn(hear_lines(reader, Arc::clone(&self.waiting)));
        writer.write_all(question.as_bytes()).await?;
        *place = Some(writer);
        Ok(())
    }
}

struct Forget<'a> {
    waiting: &'a Waiting,
    sequence: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.sequence);
    }
}

async fn hear_datagrams(socket: Arc<UdpSocket>, waiting: Waiting) {
    let mut buffer = [0; 2048];
    loop {
        // An error belongs to some earlier question, which nobody will answer.
        if let Ok(length) = socket.recv(&mut buffer).await {
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
            text.lines().for_each(|line| hear(line, &waiting));
        } else {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn hear_lines(reader: tcp::OwnedReadHalf, waiting: Waiting) {
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    loop {
        line.clear();
        let mut limited = tokio::io::AsyncReadExt::take(&mut reader, LONGEST_LINE);
        match limited.read_line(&mut line).await {
            Ok(n) if n > 0 => hear(&line, &waiting),
            // Its questions run into their time limit: which ones they are, only their sequence numbers tell.
            _ => return,
        }
    }
}

/// Gives a line to whoever asked. An answer that nobody waits for is late or a duplicate.
fn hear(line: &str, waiting: &Waiting) {
    let Some((sequence, answer)) = line.trim().split_once(' ') else {
        return;
    };
    if let Some(asker) = sequence
        .parse()
        .ok()
        .and_then(|sequence: u64| lock(waiting).remove(&sequence))
    {
        let _ = asker.send(answer.to_owned());
    }
}

/// `N = p + q` with both prime.
fn check(number: u64, answer: &str) -> Result<(), String> {
    let wrong = || format!("for {number} the service answered {answer:?}");
    let (said, sum) = answer.split_once(" = ").ok_or_else(wrong)?;
    let (p, q) = sum.split_once(" + ").ok_or_else(wrong)?;
    let parse = |text: &str| text.trim().parse::<u64>().map_err(|_| wrong());
    let (said, p, q) = (parse(said)?, parse(p)?, parse(q)?);
    if said == number && p.checked_add(q) == Some(number) && is_prime(p) && is_prime(q) {
        Ok(())
    } else {
        Err(wrong())
    }
}

/// By trial: the numbers are below ten million.
fn is_prime(n: u64) -> bool {
    n == 2
        || (n > 2
            && n % 2 == 1
            && (3..)
                .step_by(2)
                .take_while(|d| d * d <= n)
                .all(|d| !n.is_multiple_of(d)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sum_of_two_primes_is_a_right_answer() {
        assert_eq!(check(100, "100 = 3 + 97"), Ok(()));
        assert_eq!(check(4, "4 = 2 + 2"), Ok(()));
        for wrong in [
            "100 = 3 + 96",
            "100 = 9 + 91",
            "102 = 5 + 97",
            "100 = 1 + 99",
            "100 = ?",
            "",
            "100 = 18446744073709551615 + 101",
            "100 = -3 + 103",
        ] {
            assert!(check(100, wrong).is_err(), "{wrong}");
        }
    }
}
