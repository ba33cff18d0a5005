//! As much of HTTP/1.1 as a static page needs. Pure.

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Its length, blank line included.
    pub length: usize,
    pub status: Status,
    /// Bytes asked for by a path that is a number; None: the usual page.
    pub size: Option<u64>,
    pub head_only: bool,
    pub close: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Ok,
    BadRequest,
    NotFound,
    NotAllowed,
}

impl Status {
    pub fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::BadRequest => "400 Bad Request",
            Status::NotFound => "404 Not Found",
            Status::NotAllowed => "405 Method Not Allowed",
        }
    }
}

/// The first request in these bytes, once its blank line is there.
pub fn parse(bytes: &[u8]) -> Option<Request> {
    let length = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let bad = Request {
        length,
        status: Status::BadRequest,
        size: None,
        head_only: false,
        close: true,
    };
    let Ok(text) = core::str::from_utf8(&bytes[..length]) else {
        return Some(bad);
    };
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or("").split(' ');
    let (Some(method), Some(path), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Some(bad);
    };
    if !version.starts_with("HTTP/1.") {
        return Some(bad);
    }
    let mut close = version == "HTTP/1.0";
    for line in lines {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("connection")
        {
            close = value.trim().eq_ignore_ascii_case("close")
                || close && !value.trim().eq_ignore_ascii_case("keep-alive");
        }
    }
    let path = path.trim_start_matches('/');
    let size = path.parse().ok();
    let status = match (method, path.is_empty() || size.is_some()) {
        ("GET" | "HEAD", true) => Status::Ok,
        ("GET" | "HEAD", false) => Status::NotFound,
        _ => Status::NotAllowed,
    };
    Some(Request {
        length,
        status,
        size,
        head_only: method == "HEAD",
        close: close || status == Status::NotAllowed,
    })
}

/// The page's content repeats after this many bytes: byte k is k % 251, so that a client can check all of it.
pub const PERIOD: u64 = 251;
