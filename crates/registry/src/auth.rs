//! Credentials: what CRI hands over, what a registry challenges with, and the token that is fetched in between.
//!
//! Follows the distribution project's token authentication: `WWW-Authenticate: Bearer realm=…` names a token server, which
//! is asked with the user's name and password, or with an identity token by the OAuth2 refresh flow.

use std::fmt;

use reqwest::Url;
use reqwest::header::HeaderValue;

use crate::Access;
use crate::error::Result;
use crate::http::{Connection, TOKEN_TIMEOUT, body_limited, describe, header};

/// Most bytes of a token server's answer. Real tokens stay below 16 KiB.
const TOKEN_BYTES_MAX: u64 = 256 << 10;
/// What we call ourselves to an OAuth2 token server, which requires a name.
const CLIENT_ID: &str = "stasis";

/// Credentials with the meaning of CRI's `AuthConfig`. Empty strings count as absent. Never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// base64 of `username:password`, used if the two are empty.
    pub auth: String,
    /// The registry that these credentials are for; empty: the one that the image names.
    pub server_address: String,
    /// Token with which an OAuth2 token server is asked for an access token.
    pub identity_token: String,
    /// Token that is sent to the registry as it is.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

/// The one kind of credential that is in force for a connection.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    None,
    Password { username: String, password: String },
    Identity(String),
    Bearer(String),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Secret::None => "None",
            Secret::Password { .. } => "Password(redacted)",
            Secret::Identity(_) => "Identity(redacted)",
            Secret::Bearer(_) => "Bearer(redacted)",
        })
    }
}

impl Auth {
    /// The secret for a host. `origin`: the host is the registry that the image names.
    pub(crate) fn secret_for(&self, host: &str, registry: &str, origin: bool) -> std::result::Result<Secret, String> {
        let meant = match server_host(&self.server_address) {
            "" => origin,
            server if is_docker_hub(server) => is_docker_hub(host),
            server => server == host || (origin && server == registry),
        };
        if !meant {
            return Ok(Secret::None);
        }
        if !self.registry_token.is_empty() {
            return Ok(Secret::Bearer(self.registry_token.clone()));
        }
        if !self.identity_token.is_empty() {
            return Ok(Secret::Identity(self.identity_token.clone()));
        }
        if !self.username.is_empty() {
            return Ok(Secret::Password { username: self.username.clone(), password: self.password.clone() });
        }
        if self.auth.is_empty() {
            return Ok(Secret::None);
        }
        let decoded = decode_base64(&self.auth).and_then(|bytes| String::from_utf8(bytes).ok());
        let (username, password) = decoded
            .as_deref()
            .map(|text| text.trim_end_matches('\0'))
            .and_then(|text| text.split_once(':'))
            .ok_or("the credentials' auth field is not base64 of user:password")?;
        Ok(Secret::Password { username: username.to_owned(), password: password.to_owned() })
    }
}

/// Host of a server address, which may be written as a URL (`https://index.docker.io/v1/`).
fn server_host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or("")
}

fn is_docker_hub(host: &str) -> bool {
    matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for b in text.trim().trim_end_matches('=').bytes() {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

/// What a registry asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The challenge of a `WWW-Authenticate` header that we can answer; a token is preferred to sending the password each time.
pub(crate) fn parse_challenges<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for (scheme, parameters) in split_challenges(header) {
            let get = |name: &str| {
                parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = get("realm") {
                    return Some(Challenge::Bearer { realm, service: get("service"), scope: get("scope") });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

/// Splits `Scheme k=v, k="v", Scheme …` (RFC 9110, 11.6.1).
fn split_challenges(header: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        let end = rest.find([' ', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if let Some(value) = after.strip_prefix('=') {
            let (value, after) = take_value(value);
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_owned(), value));
            }
            rest = after;
        } else {
            challenges.push((word.to_owned(), Vec::new()));
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',']);
    }
    challenges
}

fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[derive(serde::Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl Connection {
    /// Answers a challenge: the value of the `Authorization` header to send from now on.
    pub(crate) async fn answer(&self, challenge: Option<Challenge>) -> Result<HeaderValue> {
        match (challenge, &self.secret) {
            (None, _) => Err(self.unauthorized("it asks for a kind of login that is not supported")),
            (Some(_), Secret::Bearer(_)) => Err(self.unauthorized("the registry token is not accepted")),
            (Some(Challenge::Basic), Secret::Password { username, password }) => Ok(header(&basic(username, password))),
            (Some(Challenge::Basic), Secret::Identity(_)) => {
                Err(self.unauthorized("it asks for user name and password, and an identity token was given"))
            }
            (Some(Challenge::Basic), Secret::None) => {
                Err(self.unauthorized("it asks for user name and password, and none were given"))
            }
            (Some(Challenge::Bearer { realm, service, scope }), secret) => {
                let token = self.fetch_token(secret, &realm, service, scope).await?;
                Ok(header(&format!("Bearer {token}")))
            }
        }
    }

    async fn fetch_token(
        &self,
        secret: &Secret,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String> {
        let mut url = Url::parse(realm)
            .map_err(|e| self.unauthorized(&format!("its token server {realm:?} is not a URL: {e}")))?;
        // A registry reached securely may not have the password sent in the clear.
        if self.endpoint.base.starts_with("https:") && url.scheme() != "https" {
            return Err(
                self.unauthorized(&format!("its token server {realm} is not https; no credentials are sent there"))
            );
        }
        let mut query = vec![("scope", self.scope(scope))];
        query.extend(service.map(|service| ("service", service)));
        let request = if let Secret::Identity(token) = secret {
            query.extend([
                ("grant_type", "refresh_token".to_owned()),
                ("client_id", CLIENT_ID.to_owned()),
                ("refresh_token", token.clone()),
            ]);
            self.client.direct.post(url).header("Content-Type", "application/x-www-form-urlencoded").body(form(&query))
        } else {
            url.query_pairs_mut().extend_pairs(&query);
            let request = self.client.direct.get(url);
            match secret {
                Secret::Password { username, password } => request.basic_auth(username, Some(password)),
                _ => request,
            }
        };
        let response = request.timeout(TOKEN_TIMEOUT).send().await;
        let response = response.map_err(|e| self.unauthorized(&format!("its token server: {}", describe(&e))))?;
        let status = response.status();
        let body = body_limited(response, TOKEN_BYTES_MAX)
            .await
            .map_err(|e| self.unauthorized(&format!("its token server: {e}")))?;
        if !status.is_success() {
            let given =
                if *secret == Secret::None { "no credentials were given" } else { "the credentials were not accepted" };
            return Err(self.unauthorized(&format!("{given} ({status} from its token server)")));
        }
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| self.unauthorized("its token server's answer holds no token"))?;
        let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
        let printable = !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
        printable.then_some(token).ok_or_else(|| self.unauthorized("its token server's answer holds no token"))
    }

    /// What the token is asked for. The registry's wish counts for a pull (a mirror may have the repository under another
    /// name); a push asks for both rights at once, since the first, reading request would only name one.
    fn scope(&self, wished: Option<String>) -> String {
        match (self.access, wished) {
            (Access::Pull, Some(scope)) => scope,
            (Access::Pull, None) => format!("repository:{}:pull", self.repository),
            (Access::Push, _) => format!("repository:{}:pull,push", self.repository),
        }
    }
}

/// The header of a registry token, which needs no challenge.
pub(crate) fn bearer(secret: &Secret) -> Option<HeaderValue> {
    match secret {
        Secret::Bearer(token) => Some(header(&format!("Bearer {token}"))),
        _ => None,
    }
}

fn basic(username: &str, password: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes = format!("{username}:{password}").into_bytes();
    let mut text = String::from("Basic ");
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |group, b| group << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

fn form(pairs: &[(&str, String)]) -> String {
    let mut url = Url::parse("http://form/").expect("a constant URL parses");
    url.query_pairs_mut().extend_pairs(pairs);
    url.query().unwrap_or("").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_goes_there_and_back() {
        for (user, password) in [("a", ""), ("ab", "c"), ("user", "päss:wörd"), ("x", "12345678901234567890")] {
            let encoded = basic(user, password);
            let decoded = decode_base64(encoded.strip_prefix("Basic ").expect("scheme")).expect("base64");
            assert_eq!(decoded, format!("{user}:{password}").into_bytes());
        }
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "RFC 7617's example");
        assert_eq!(decode_base64("a*"), None);
    }

    #[test]
    fn challenges_are_read() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.docker.io/token".into(),
            service: Some("registry.docker.io".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(parse_challenges([docker]), Some(expected));
        assert_eq!(parse_challenges([r#"Basic realm="x, y", Digest nonce=1"#]), Some(Challenge::Basic));
        let both = parse_challenges([r#"basic realm=x"#, r#"bearer realm="r\"q""#]);
        assert_eq!(both, Some(Challenge::Bearer { realm: "r\"q".into(), service: None, scope: None }));
        assert_eq!(parse_challenges(["Negotiate", "Bearer service=x", r#"Bearer realm"#]), None);
    }

    #[test]
    fn credentials_go_only_where_they_are_meant_for() {
        let for_host = |server: &str, host: &str, registry: &str, origin: bool| {
            let auth =
                Auth { username: "u".into(), password: "p".into(), server_address: server.into(), ..Auth::default() };
            auth.secret_for(host, registry, origin).expect("well-formed") != Secret::None
        };
        assert!(for_host("", "r.example", "r.example", true));
        assert!(!for_host("", "mirror.example", "r.example", false));
        assert!(for_host("https://index.docker.io/v1/", "registry-1.docker.io", "docker.io", true));
        assert!(!for_host("https://index.docker.io/v1/", "r.example", "r.example", true));
        assert!(for_host("mirror.example", "mirror.example", "r.example", false));
        assert!(!for_host("mirror.example", "r.example", "r.example", true));
    }

    #[test]
    fn the_auth_field_is_decoded_and_secrets_are_not_printed() {
        let auth = Auth { auth: "dXNlcjpwYXNz".into(), ..Auth::default() };
        let secret = auth.secret_for("r.example", "r.example", true).expect("base64");
        assert_eq!(secret, Secret::Password { username: "user".into(), password: "pass".into() });
        assert!(!format!("{auth:?} {secret:?}").contains("pass\""));
        assert!(Auth { auth: "???".into(), ..Auth::default() }.secret_for("h", "h", true).is_err());
    }
}
