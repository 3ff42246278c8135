//! What the guest is answered: Firecracker's rules for versions 1 and 2, with its status codes and texts.

pub use crate::http::Reply;
use crate::http::{
    self, BAD_REQUEST, METHOD_NOT_ALLOWED, NOT_FOUND, NOT_IMPLEMENTED, OK, Request, Response,
    UNAUTHORIZED,
};
use crate::store::Mmds;
use crate::token::{TTL, Tokens};
use husk_config::{MmdsConfig, MmdsVersion};
use husk_metrics::{METRICS, MmdsMetrics};
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];
const FORWARDED: &str = "X-Forwarded-For";
const JSON: &str = "application/json";

/// The service of one VM, for all of its interfaces. With it, all of its tokens are forgotten.
pub struct Server {
    mmds: Arc<Mmds>,
    version: MmdsVersion,
    imds_compat: bool,
    tokens: Tokens,
    pub(crate) metrics: &'static MmdsMetrics,
}

impl Server {
    /// A service that answers from `mmds` as `config` says. Fails when the host has no random numbers.
    pub fn new(mmds: Arc<Mmds>, config: &MmdsConfig) -> std::io::Result<Arc<Self>> {
        Self::with_metrics(mmds, config, &METRICS.mmds)
    }

    pub(crate) fn with_metrics(
        mmds: Arc<Mmds>,
        config: &MmdsConfig,
        metrics: &'static MmdsMetrics,
    ) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            mmds,
            version: config.version,
            imds_compat: config.imds_compat,
            tokens: Tokens::new(Instant::now())?,
            metrics,
        }))
    }

    /// The answer to the request that `input` begins with; None when more of it has to come.
    pub fn reply(&self, input: &[u8], now: Instant) -> Option<Reply> {
        http::reply(input, |request| self.answer(request, now))
    }

    fn answer(&self, request: &Request, now: Instant) -> Response {
        let Some(path) = request.path else {
            return Response::text(BAD_REQUEST, "Invalid URI.");
        };
        match (request.method, self.version) {
            ("GET", version) => match (self.check_token(request, now), version) {
                (Err(why), MmdsVersion::V2) => Response::text(UNAUTHORIZED, why),
                _ => self.get(request, path),
            },
            ("PUT", _) => self.put(request, path, now),
            _ => {
                let mut response = Response::text(METHOD_NOT_ALLOWED, "Not allowed HTTP method.");
                response.fields = "Allow: GET, PUT\r\n".into();
                response
            }
        }
    }

    /// Whether a request may be answered, by version 2; else why not.
    fn check_token(&self, request: &Request, now: Instant) -> Result<(), &'static str> {
        let Some((_, token)) = request.field(&TOKEN) else {
            self.metrics.rx_no_token.inc();
            return Err(
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify \
                 the session token.",
            );
        };
        if !self.tokens.is_valid(token, now) {
            self.metrics.rx_invalid_token.inc();
            return Err("MMDS token not valid.");
        }
        Ok(())
    }

    fn get(&self, request: &Request, path: &str) -> Response {
        let pointer = sanitized(path);
        let pointer = pointer.strip_suffix('/').unwrap_or(&pointer);
        let stored = self.mmds.snapshot();
        let Some(value) = stored.as_ref().and_then(|all| all.pointer(pointer)) else {
            return not_found(path);
        };
        let wants_json = request
            .field(&["Accept"])
            .is_some_and(|(_, accept)| accept.eq_ignore_ascii_case(JSON.as_bytes()));
        if wants_json && !self.imds_compat {
            return Response {
                content_type: JSON,
                ..Response::text(OK, value.to_string())
            };
        }
        match imds(value) {
            Some(text) => Response::text(OK, text),
            None => Response::text(
                NOT_IMPLEMENTED,
                "Cannot retrieve value. The value has an unsupported type.",
            ),
        }
    }

    /// The one thing to put is a request for a token.
    fn put(&self, request: &Request, path: &str, now: Instant) -> Response {
        // From a proxy, behind which anybody could be.
        if let Some((name, _)) = request.field(&[FORWARDED]) {
            let text = format!("Invalid header. Reason: Unsupported header name. Key: {name}");
            return Response::text(BAD_REQUEST, text);
        }
        if sanitized(path) != TOKEN_PATH {
            return not_found(path);
        }
        let Some((name, value)) = request.field(&TOKEN_TTL) else {
            return Response::text(
                BAD_REQUEST,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                 `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
        };
        let value = String::from_utf8_lossy(value);
        let Ok(seconds) = value.parse::<u32>() else {
            let text = format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}");
            return Response::text(BAD_REQUEST, text);
        };
        match self.tokens.issue(seconds, now) {
            Some(token) => Response {
                fields: format!("{name}: {seconds}\r\n"),
                ..Response::text(OK, token)
            },
            None => {
                let (least, most) = (TTL.start(), TTL.end());
                let text = format!(
                    "Invalid time to live value provided for token: {seconds}. Please provide a value between {least} and {most}."
                );
                Response::text(BAD_REQUEST, text)
            }
        }
    }
}

fn not_found(path: &str) -> Response {
    Response::text(NOT_FOUND, format!("Resource not found: {path}."))
}

/// A path with single slashes, which then is a JSON pointer (RFC 6901).
fn sanitized(path: &str) -> String {
    let mut last = None;
    path.chars()
        .filter(|&c| last.replace(c) != Some('/') || c != '/')
        .collect()
}

/// EC2's format: an object as its keys, those of objects with a slash; a string as it is. There is none for other values.
fn imds(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(map) => {
            let lines = map.iter().map(|(key, value)| match value {
                Value::Object(_) => format!("{key}/"),
                _ => key.clone(),
            });
            Some(lines.collect::<Vec<_>>().join("\n"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn server(version: MmdsVersion, imds_compat: bool) -> Arc<Server> {
        let mmds = Mmds::new(crate::DEFAULT_LIMIT);
        mmds.put(json!({
            "name": {"first": "John", "second": "Doe"},
            "age": 43,
            "phones": {"home": {"RO": "+40"}, "mobile": "+44", "all": ["+40", "+44"]},
            "a/b~c": {"": "odd"},
            "ok": true,
            "none": null,
        }))
        .unwrap();
        let mut config = MmdsConfig::new(["eth0"]);
        config.version = version;
        config.imds_compat = imds_compat;
        Server::new(mmds, &config).unwrap()
    }

    /// Status, content type and body.
    fn ask_at(server: &Server, now: Instant, request: &str) -> (u16, String, String) {
        let reply = server.reply(request.as_bytes(), now).unwrap();
        let text = String::from_utf8(reply.bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let mut lines = head.lines();
        let code = lines.next().unwrap().split(' ').nth(1).unwrap();
        let kind = lines.find_map(|line| line.strip_prefix("Content-Type: "));
        (code.parse().unwrap(), kind.unwrap().into(), body.into())
    }

    fn ask(server: &Server, request: &str) -> (u16, String, String) {
        ask_at(server, Instant::now(), request)
    }

    fn get(path: &str, fields: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{fields}\r\n")
    }

    fn token(server: &Server, now: Instant, field: &str) -> String {
        let put = format!("PUT /latest/api/token HTTP/1.1\r\n{field}\r\n\r\n");
        let (code, kind, token) = ask_at(server, now, &put);
        assert_eq!((code, kind.as_str()), (200, "text/plain"), "{token}");
        token
    }

    #[test]
    fn values_come_as_text_or_as_json() {
        let server = server(MmdsVersion::V1, false);
        for (path, text, json) in [
            (
                "/",
                "a/b~c/\nage\nname/\nnone\nok\nphones/",
                r#"{"a/b~c":{"":"odd"},"age":43,"name":{"first":"John","second":"Doe"},"none":null,"ok":true,"phones":{"all":["+40","+44"],"home":{"RO":"+40"},"mobile":"+44"}}"#,
            ),
            (
                "/name",
                "first\nsecond",
                r#"{"first":"John","second":"Doe"}"#,
            ),
            ("/name/first", "John", r#""John""#),
            (
                "/phones",
                "all\nhome/\nmobile",
                r#"{"all":["+40","+44"],"home":{"RO":"+40"},"mobile":"+44"}"#,
            ),
            ("//phones///home//", "RO", r#"{"RO":"+40"}"#),
            ("/phones/all/1", "+44", r#""+44""#),
            ("http://169.254.169.254/name/first/", "John", r#""John""#),
            ("/a~1b~0c", "", r#"{"":"odd"}"#),
        ] {
            let plain = (200, "text/plain".into(), text.into());
            for accept in [
                "",
                "Accept: */*\r\n",
                "Accept: text/plain\r\n",
                "Accept:\r\n",
            ] {
                assert_eq!(ask(&server, &get(path, accept)), plain, "{path} {accept}");
            }
            let formatted = (200, JSON.into(), json.into());
            let asked = get(path, "accept: application/json\r\n");
            assert_eq!(ask(&server, &asked), formatted, "{path}");
        }
    }

    #[test]
    fn values_without_a_text_and_paths_without_a_value() {
        let server = server(MmdsVersion::V1, false);
        for (path, json) in [
            ("/age", "43"),
            ("/ok", "true"),
            ("/none", "null"),
            ("/phones/all", r#"["+40","+44"]"#),
        ] {
            let (code, kind, body) = ask(&server, &get(path, ""));
            assert_eq!((code, kind.as_str()), (501, "text/plain"), "{path}");
            assert_eq!(
                body,
                "Cannot retrieve value. The value has an unsupported type."
            );
            let asked = get(path, "Accept: application/json\r\n");
            assert_eq!(ask(&server, &asked), (200, JSON.into(), json.into()));
        }
        for path in ["/nobody", "/name/first/x", "/phones/all/2", "/name?x=1"] {
            for accept in ["", "Accept: application/json\r\n"] {
                let text = format!("Resource not found: {path}.");
                let wanted = (404, "text/plain".into(), text);
                assert_eq!(ask(&server, &get(path, accept)), wanted);
            }
        }
        let (code, _, body) = ask(&server, &get("http://", ""));
        assert_eq!((code, body.as_str()), (400, "Invalid URI."));
    }

    #[test]
    fn nothing_is_found_before_something_is_stored() {
        let mmds = Mmds::new(1000);
        let server = Server::new(mmds.clone(), &MmdsConfig::new(["eth0"])).unwrap();
        assert_eq!(ask(&server, &get("/", "")).0, 404);
        assert_eq!(ask(&server, &get("/a", "")).0, 404);
        mmds.put(json!({"a": "b"})).unwrap();
        assert_eq!(ask(&server, &get("/a", "")).2, "b");
        mmds.patch(json!({"a": "c"})).unwrap();
        assert_eq!(ask(&server, &get("/a", "")).2, "c");
    }

    #[test]
    fn imds_compat_is_text_whatever_is_asked_for() {
        let server = server(MmdsVersion::V1, true);
        let asked = get("/name", "Accept: application/json\r\n");
        let wanted = (200, "text/plain".into(), "first\nsecond".into());
        assert_eq!(ask(&server, &asked), wanted);
    }

    #[test]
    fn version_2_wants_a_token_that_is_good_still() {
        let server = server(MmdsVersion::V2, false);
        let now = Instant::now();
        let (code, _, body) = ask(&server, &get("/age", ""));
        assert_eq!(code, 401);
        assert!(body.starts_with("No MMDS token provided."), "{body}");
        for (ttl, field) in [
            ("X-metadata-token-ttl-seconds: 60", "x-Metadata-token"),
            (
                "x-aws-ec2-metadata-token-ttl-seconds: 60",
                "X-aws-ec2-metadata-token",
            ),
        ] {
            let token = token(&server, now, ttl);
            let with = get("/name/first", &format!("{field}: {token}\r\n"));
            assert_eq!(ask_at(&server, now, &with).2, "John");
            let later = now + Duration::from_secs(60);
            let (code, _, body) = ask_at(&server, later, &with);
            assert_eq!((code, body.as_str()), (401, "MMDS token not valid."));
        }
        let made_up = get("/name", "X-metadata-token: abc\r\n");
        assert_eq!(ask(&server, &made_up).0, 401);
        // Not even whether something is there is told without a token.
        assert_eq!(ask(&server, &get("/nobody", "")).0, 401);
    }

    #[test]
    fn version_1_takes_tokens_and_does_not_look_at_them() {
        let server = server(MmdsVersion::V1, false);
        let token = token(&server, Instant::now(), "X-metadata-token-ttl-seconds: 1");
        for token in [&token, "made up"] {
            let with = get("/name/first", &format!("X-metadata-token: {token}\r\n"));
            assert_eq!(ask(&server, &with).2, "John");
        }
    }

    #[test]
    fn requests_for_tokens_are_looked_at_closely() {
        for version in [MmdsVersion::V1, MmdsVersion::V2] {
            let server = server(version, false);
            let put = |path: &str, fields: &str| {
                let (code, kind, body) =
                    ask(&server, &format!("PUT {path} HTTP/1.1\r\n{fields}\r\n"));
                assert_eq!(kind, "text/plain");
                (code, body)
            };
            let good = "X-metadata-token-ttl-seconds: 21600\r\n";
            assert_eq!(put("//latest/api//token", good).0, 200);
            assert_eq!(
                put(TOKEN_PATH, &format!("{good}x-Forwarded-for: 1.2.3.4\r\n")),
                (
                    400,
                    "Invalid header. Reason: Unsupported header name. Key: x-Forwarded-for".into()
                )
            );
            assert_eq!(
                put("/token", good),
                (404, "Resource not found: /token.".into())
            );
            let (code, body) = put(TOKEN_PATH, "");
            assert_eq!(code, 400);
            assert!(body.starts_with("Token time to live value not found."));
            for seconds in ["0", "21601", "4294967295"] {
                let field = format!("X-metadata-token-ttl-seconds: {seconds}\r\n");
                let wanted = format!(
                    "Invalid time to live value provided for token: {seconds}. Please provide a value between 1 and 21600."
                );
                assert_eq!(put(TOKEN_PATH, &field), (400, wanted));
            }
            for seconds in ["", "soon", "-1", "4294967296", "1.5"] {
                let field = format!("X-metadata-token-ttl-seconds: {seconds}\r\n");
                let (code, body) = put(TOKEN_PATH, &field);
                assert_eq!(code, 400, "{seconds}");
                assert!(body.contains("Invalid value."), "{body}");
            }
            for method in ["PATCH", "POST", "DELETE", "OPTIONS"] {
                let request = format!("{method} / HTTP/1.1\r\n\r\n");
                let reply = server.reply(request.as_bytes(), Instant::now()).unwrap();
                let text = String::from_utf8(reply.bytes).unwrap();
                assert!(text.starts_with("HTTP/1.1 405 "), "{text}");
                assert!(text.contains("\r\nAllow: GET, PUT\r\n"), "{text}");
                assert!(text.ends_with("Not allowed HTTP method."), "{text}");
            }
        }
    }

    #[test]
    fn the_time_of_a_token_is_said_again() {
        let server = server(MmdsVersion::V2, false);
        let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
        let reply = server.reply(put.as_bytes(), Instant::now()).unwrap();
        let text = String::from_utf8(reply.bytes).unwrap();
        assert!(
            text.contains("\r\nX-metadata-token-ttl-seconds: 60\r\n"),
            "{text}"
        );
    }
}
