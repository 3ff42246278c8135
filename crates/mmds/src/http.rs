//! HTTP/1.0 and 1.1, as far as the service needs it: heads of requests in, whole responses out.

use std::fmt::Write;

/// Most bytes of a request, head and body.
pub const MOST: usize = 4096;
/// Most header fields of one.
const MOST_FIELDS: usize = 64;

/// A status and its phrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16, pub &'static str);

pub const OK: Status = Status(200, "OK");
pub const BAD_REQUEST: Status = Status(400, "Bad Request");
pub const UNAUTHORIZED: Status = Status(401, "Unauthorized");
pub const NOT_FOUND: Status = Status(404, "Not Found");
pub const METHOD_NOT_ALLOWED: Status = Status(405, "Method Not Allowed");
pub const TOO_LARGE: Status = Status(413, "Payload Too Large");
pub const HEAD_TOO_LARGE: Status = Status(431, "Request Header Fields Too Large");
pub const NOT_IMPLEMENTED: Status = Status(501, "Not Implemented");

/// The head of a request.
pub struct Request<'a> {
    pub method: &'a str,
    /// Its target's absolute path. None when there is none.
    pub path: Option<&'a str>,
    fields: &'a [httparse::Header<'a>],
    /// HTTP/1.0 or HTTP/1.1.
    minor: u8,
    /// What comes behind it.
    body: Body,
}

enum Body {
    /// So many bytes.
    Of(usize),
    /// Nobody waits for it, so nothing behind it can be understood.
    Unknown,
}

/// A response without what belongs to the connection.
pub struct Response {
    pub status: Status,
    pub content_type: &'static str,
    pub body: String,
    /// Further fields, each with its line end.
    pub fields: String,
}

/// What comes of the bytes that were received.
pub struct Reply {
    /// How many of them were the request.
    pub taken: usize,
    /// The whole response.
    pub bytes: Vec<u8>,
    /// The connection ends after it.
    pub close: bool,
}

impl<'a> Request<'a> {
    /// The value of the first field that is called like one of `names`, and how it is really written.
    pub fn field(&self, names: &[&str]) -> Option<(&'a str, &'a [u8])> {
        let is = |field: &&httparse::Header| {
            let mut names = names.iter();
            names.any(|name| field.name.eq_ignore_ascii_case(name))
        };
        let field = self.fields.iter().find(is)?;
        Some((field.name, field.value.trim_ascii()))
    }

    fn has(&self, name: &str, value: &str) -> bool {
        self.field(&[name]).is_some_and(|(_, all)| {
            all.split(|&c| c == b',')
                .any(|one| one.trim_ascii().eq_ignore_ascii_case(value.as_bytes()))
        })
    }

    fn keeps_alive(&self) -> bool {
        match self.minor {
            0 => self.has("Connection", "keep-alive"),
            _ => !self.has("Connection", "close"),
        }
    }

    /// How long the body is, or why it cannot be had.
    fn find_body(&self) -> Result<Body, Response> {
        if self.field(&["Transfer-Encoding"]).is_some() {
            let text = "A request with Transfer-Encoding is not supported.";
            return Err(Response::text(NOT_IMPLEMENTED, text));
        }
        let Some((_, length)) = self.field(&["Content-Length"]) else {
            return Ok(Body::Of(0));
        };
        let digits = length.iter().all(u8::is_ascii_digit);
        let length = std::str::from_utf8(length).ok().filter(|_| digits);
        let length = length.and_then(|length| length.parse::<usize>().ok());
        let length = length
            .ok_or_else(|| Response::text(BAD_REQUEST, "The Content-Length is no number."))?;
        // A client that waits for 100 (Continue) gets the final answer instead.
        if self.field(&["Expect"]).is_some() && length > 0 {
            return Ok(Body::Unknown);
        }
        Ok(Body::Of(length))
    }
}

impl Response {
    /// Plain text.
    pub fn text(status: Status, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain",
            body: body.into(),
            fields: String::new(),
        }
    }

    fn write(&self, minor: u8, close: bool, without_body: bool) -> Vec<u8> {
        let Status(code, phrase) = self.status;
        let mut text = String::with_capacity(256 + self.body.len());
        let connection = if close { "close" } else { "keep-alive" };
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "HTTP/1.{minor} {code} {phrase}\r\nServer: Husk\r\nConnection: {connection}\r\n\
             Content-Type: {}\r\nContent-Length: {}\r\n{}\r\n",
            self.content_type,
            self.body.len(),
            self.fields
        );
        if !without_body {
            text += &self.body;
        }
        text.into_bytes()
    }
}

/// Have the request that `input` begins with answered by `answer`. None when more of it is to come; then there are less than
/// [`MOST`] bytes.
pub fn reply(input: &[u8], answer: impl FnOnce(&Request) -> Response) -> Option<Reply> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    let head = match parsed.parse(input) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if input.len() < MOST => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            let text = "The head of the request is too large.";
            return Some(refuse(input, Response::text(HEAD_TOO_LARGE, text)));
        }
        Err(e) => {
            let text = format!("Invalid request: {e}.");
            return Some(refuse(input, Response::text(BAD_REQUEST, text)));
        }
    };
    let mut request = Request {
        method: parsed.method.unwrap_or_default(),
        path: path(parsed.path.unwrap_or_default()),
        fields: parsed.headers,
        minor: parsed.version.unwrap_or(1),
        body: Body::Of(0),
    };
    request.body = match request.find_body() {
        Ok(body) => body,
        Err(response) => return Some(refuse(input, response)),
    };
    let taken = match request.body {
        Body::Of(length) => head.saturating_add(length),
        Body::Unknown => input.len(),
    };
    if taken > MOST {
        let text = "The body of the request is too large.";
        return Some(refuse(input, Response::text(TOO_LARGE, text)));
    }
    if taken > input.len() {
        return None;
    }
    let close = !request.keeps_alive() || matches!(request.body, Body::Unknown);
    let response = answer(&request);
    Some(Reply {
        taken,
        bytes: response.write(request.minor, close, request.method == "HEAD"),
        close,
    })
}

/// What follows cannot be understood either.
fn refuse(input: &[u8], response: Response) -> Reply {
    Reply {
        taken: input.len(),
        bytes: response.write(1, true, false),
        close: true,
    }
}

/// The absolute path of a request's target (RFC 9112, 3.2.1 and 3.2.2).
fn path(target: &str) -> Option<&str> {
    if target.starts_with('/') {
        return Some(target);
    }
    let (scheme, rest) = target.split_once("://")?;
    let path = rest.get(rest.find('/')?..)?;
    scheme.eq_ignore_ascii_case("http").then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(request: &Request) -> Response {
        let path = request.path.unwrap_or("none");
        Response::text(OK, format!("{} {path}", request.method))
    }

    fn answer(text: &str) -> Option<(usize, String, bool)> {
        let reply = reply(text.as_bytes(), echo)?;
        let bytes = String::from_utf8(reply.bytes).unwrap();
        Some((reply.taken, bytes, reply.close))
    }

    #[test]
    fn a_request_is_answered_when_all_of_it_is_there() {
        let text = "PUT /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET";
        for end in 0..text.len() - 3 {
            assert!(answer(&text[..end]).is_none(), "{end}");
        }
        let (taken, response, close) = answer(text).unwrap();
        assert_eq!(taken, text.len() - 3);
        assert!(!close);
        assert_eq!(
            response,
            "HTTP/1.1 200 OK\r\nServer: Husk\r\nConnection: keep-alive\r\nContent-Type: text/plain\r\n\
             Content-Length: 6\r\n\r\nPUT /a"
        );
    }

    #[test]
    fn the_path_is_that_of_the_target() {
        for (target, wanted) in [
            ("/", "/"),
            ("/a//b?c", "/a//b?c"),
            ("http://169.254.169.254/x", "/x"),
            ("http://h:80/", "/"),
            ("http://h", "none"),
            ("http://", "none"),
            ("ftp://h/x", "none"),
            ("*", "none"),
            ("a/b", "none"),
        ] {
            let (_, response, _) = answer(&format!("GET {target} HTTP/1.0\r\n\r\n")).unwrap();
            assert!(response.ends_with(&format!("GET {wanted}")), "{target}");
            assert!(response.starts_with("HTTP/1.0 200"));
        }
    }

    #[test]
    fn connections_stay_open_as_the_client_wants() {
        for (text, closes) in [
            ("GET / HTTP/1.1\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: TE, close\r\n\r\n", true),
            ("GET / HTTP/1.0\r\n\r\n", true),
            ("GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n\r\n", false),
            (
                "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
                true,
            ),
        ] {
            let (taken, response, close) = answer(text).unwrap();
            assert_eq!((taken, close), (text.len(), closes), "{text}");
            assert_eq!(response.contains("Connection: close"), closes, "{text}");
        }
        let (_, response, _) = answer("HEAD / HTTP/1.1\r\n\r\n").unwrap();
        assert!(response.contains("Content-Length: 6\r\n") && response.ends_with("\r\n\r\n"));
    }

    #[test]
    fn what_is_no_request_is_refused_and_ends_the_connection() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MOST));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        for (text, code) in [
            ("\0\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
            (
                "GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                400,
            ),
            (
                "GET / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
                413,
            ),
            ("GET / HTTP/1.1\r\nContent-Length: 4096\r\n\r\n", 413),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            (&many, 431),
            (&long[..MOST], 431),
        ] {
            let (taken, response, close) = answer(text).unwrap();
            assert!(response.starts_with(&format!("HTTP/1.1 {code} ")), "{text}");
            assert!(close && taken == text.len(), "{text}");
        }
    }
}
