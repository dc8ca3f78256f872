//! Requests to one server: the HTTP clients, logins, retries, and bounded answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Certificate, RequestBuilder, Response, StatusCode, Url, redirect};

use crate::Access;
use crate::auth::{Auth, Secret, bearer, parse_challenges};
use crate::error::{Error, Result, chain};
use crate::hosts::{Endpoint, Trust};
use crate::reference::Reference;

/// How long a connection may take to come about. The kubelet gives up a pull that makes no progress after a minute.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a server may send nothing before the transfer counts as broken.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A token server has this long for its answer.
pub(crate) const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle connections are kept this long: from one image of a pod to the next.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Redirects of one download: a registry points to its storage, which may point to a nearer one.
const REDIRECTS_MAX: usize = 5;
/// Times a request is sent to a server that says it is busy.
const BUSY_ATTEMPTS_MAX: u32 = 4;
/// Pause after the first "busy", doubled each time.
const BUSY_PAUSE: Duration = Duration::from_millis(250);
/// Most bytes that are read of an error's explanation.
const ERROR_BYTES_MAX: u64 = 64 << 10;
/// Most characters of a registry's explanation in a message.
const REASON_CHARS_MAX: usize = 300;
/// Most bytes of a certificate authority file.
const CA_BYTES_MAX: u64 = 4 << 20;

/// The HTTP clients, one pair for each way of trusting a server, made when first needed: loading the system's authorities
/// costs memory that a node with a plain local registry never needs.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    made: Mutex<BTreeMap<Trust, Client>>,
}

/// Two clients on the same terms.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// Follows redirects, for downloads. `Authorization` is dropped on the way to another scheme, host or port.
    pub(crate) following: reqwest::Client,
    /// Follows none: for uploads and logins, whose bodies would travel along.
    pub(crate) direct: reqwest::Client,
}

impl Clients {
    fn get(&self, endpoint: &Endpoint) -> Result<Client> {
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(client) = made.get(&endpoint.trust) {
            return Ok(client.clone());
        }
        let fail = |reason: String| Error::Tls { host: endpoint.host.clone(), reason };
        let build = |policy| builder(&endpoint.trust)?.redirect(policy).build().map_err(|e| chain(&e));
        let client = Client {
            following: build(redirect::Policy::custom(follow)).map_err(fail)?,
            direct: build(redirect::Policy::none()).map_err(fail)?,
        };
        made.insert(endpoint.trust.clone(), client.clone());
        Ok(client)
    }
}

fn builder(trust: &Trust) -> std::result::Result<reqwest::ClientBuilder, String> {
    static PROVIDER: Once = Once::new();
    // An error only says that the process has a provider already.
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let builder = reqwest::Client::builder()
        .user_agent(concat!("stasis/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(STALL_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT);
    Ok(match trust {
        // No authority is loaded for a connection that has no certificates. A redirect of it to https then fails, in words.
        Trust::Plain { loopback: true } => builder.tls_certs_only([]).no_proxy(),
        Trust::Plain { loopback: false } => builder,
        Trust::Anyone => builder.tls_danger_accept_invalid_certs(true),
        Trust::Authorities(files) => {
            let mut certificates = Vec::new();
            for file in files {
                let pem = read_limited(file).map_err(|e| format!("{}: {e}", file.display()))?;
                let parsed =
                    Certificate::from_pem_bundle(&pem).map_err(|e| format!("{}: {}", file.display(), chain(&e)))?;
                certificates.extend(parsed);
            }
            builder.tls_certs_merge(certificates)
        }
    })
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(CA_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Never from https to http: what is then read could be anybody's, and the address would be visible to all.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    if attempt.previous().len() > REDIRECTS_MAX {
        return attempt.error("too many redirects");
    }
    if attempt.url().scheme() != "https" && attempt.previous().last().is_some_and(|url| url.scheme() == "https") {
        return attempt.error("redirect from https to http refused");
    }
    attempt.follow()
}

/// One server of a session, with the login that was established there.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) endpoint: Endpoint,
    pub(crate) client: Client,
    pub(crate) repository: String,
    pub(crate) access: Access,
    pub(crate) secret: Secret,
    /// `?ns=…`: tells a mirror of several registries which of them is meant, as containerd does.
    pub(crate) query: String,
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// How a request may be dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resend {
    /// The request has no body, or one that can be sent again.
    Allowed,
    /// The body is a stream: one attempt only.
    Never,
}

impl Connection {
    pub(crate) fn new(
        clients: &Arc<Clients>,
        endpoint: Endpoint,
        reference: &Reference,
        auth: Option<&Auth>,
        access: Access,
    ) -> Result<Connection> {
        let client = clients.get(&endpoint)?;
        let repository = reference.repository().to_owned();
        let secret = match auth {
            None => Secret::None,
            Some(auth) => auth.secret_for(&endpoint.host, reference.registry(), endpoint.origin).map_err(|reason| {
                Error::Unauthorized { host: endpoint.host.clone(), repository: repository.clone(), reason }
            })?,
        };
        let query = if endpoint.origin { String::new() } else { format!("?ns={}", reference.registry()) };
        let authorization = tokio::sync::Mutex::new(bearer(&secret));
        Ok(Connection { endpoint, client, repository, access, secret, query, authorization })
    }

    /// URL of a part of the repository, such as `manifests/latest`.
    pub(crate) fn url(&self, part: &str) -> String {
        format!("{}/{}/{part}{}", self.endpoint.base, self.repository, self.query)
    }

    /// Sends a request that `make` builds, logging in when asked to and waiting when the server is busy. Any answer but a
    /// login or "busy" one is returned. Credentials are added only if the URL is on this server.
    pub(crate) async fn send(&self, resend: Resend, make: impl Fn() -> RequestBuilder) -> Result<Response> {
        let mut logged_in = false;
        let mut busy = 0;
        loop {
            let known = self.authorization.lock().await.clone();
            let mut request = make().build().map_err(|e| self.unreachable(&e))?;
            let ours = self.is_here(request.url());
            if let (true, Some(value)) = (ours, &known) {
                request.headers_mut().insert(AUTHORIZATION, value.clone());
            }
            let reads = matches!(*request.method(), reqwest::Method::GET | reqwest::Method::HEAD);
            let client = if reads { &self.client.following } else { &self.client.direct };
            let response = client.execute(request).await.map_err(|e| self.unreachable(&e))?;
            if resend == Resend::Never {
                return Ok(response);
            }
            if response.status() == StatusCode::UNAUTHORIZED && ours && !logged_in {
                logged_in = true;
                self.log_in(&response, known).await?;
                continue;
            }
            let is_busy = matches!(response.status().as_u16(), 429 | 502 | 503 | 504);
            busy += 1;
            if !is_busy || busy >= BUSY_ATTEMPTS_MAX {
                return Ok(response);
            }
            tokio::time::sleep(BUSY_PAUSE * (1 << (busy - 1))).await;
        }
    }

    /// Answers the challenge of a 401, unless another request of the session has done so in the meantime.
    async fn log_in(&self, response: &Response, used: Option<HeaderValue>) -> Result<()> {
        let headers = response.headers().get_all(WWW_AUTHENTICATE).into_iter().filter_map(|value| value.to_str().ok());
        let challenge = parse_challenges(headers);
        let mut authorization = self.authorization.lock().await;
        if *authorization == used {
            *authorization = Some(self.answer(challenge).await?);
        }
        Ok(())
    }

    /// Whether a URL is on this server: what decides where credentials go (CVE-2020-15157).
    fn is_here(&self, url: &Url) -> bool {
        Url::parse(&self.endpoint.base).is_ok_and(|base| base.origin() == url.origin())
    }

    /// Turns an answer that is no success into an error. `what` was asked for.
    pub(crate) async fn refuse(&self, response: Response, what: &str, request: &str) -> Error {
        let status = response.status();
        let host = self.endpoint.host.clone();
        let reason = explanation(response).await;
        match status {
            StatusCode::NOT_FOUND => Error::NotFound { what: what.to_owned(), host },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let given = match self.secret {
                    Secret::None => "no credentials were given for it",
                    _ => "the credentials do not suffice",
                };
                self.unauthorized(&format!("{given} ({reason})"))
            }
            _ => Error::Refused { host, status: status.as_u16(), request: request.to_owned(), reason },
        }
    }

    pub(crate) fn unauthorized(&self, reason: &str) -> Error {
        Error::Unauthorized {
            host: self.endpoint.host.clone(),
            repository: self.repository.clone(),
            reason: reason.to_owned(),
        }
    }

    pub(crate) fn unreachable(&self, error: &reqwest::Error) -> Error {
        let reason = describe(error);
        let tls = ["certificate", "tls", "TLS", "InvalidContentType"].iter().any(|word| reason.contains(word));
        let hint = match tls {
            true => {
                "; if it serves plain HTTP, list it as insecure; if its authority is private, name it in its hosts.toml"
            }
            false => "",
        };
        Error::Unreachable { host: self.endpoint.host.clone(), reason, hint }
    }
}

/// An HTTP error's reason, without the URL: redirects carry signatures in theirs.
pub(crate) fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
        cause = error.source();
    }
    match (text.is_empty(), error.is_timeout()) {
        (true, true) => "no answer in time".to_owned(),
        (true, false) => "the connection failed".to_owned(),
        _ => text,
    }
}

/// A whole body, if it is not larger than `limit` bytes.
pub(crate) async fn body_limited(mut response: Response, limit: u64) -> std::result::Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| BodyError::Broken(describe(&e)))? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Err(BodyError::TooLarge(limit));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Why a body could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the answer is larger than {0} bytes")]
    TooLarge(u64),
    #[error("the answer broke off: {0}")]
    Broken(String),
}

/// What a registry says about a refusal: its error envelope, or the beginning of whatever it sent.
async fn explanation(response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct Envelope {
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let fallback = response.status().canonical_reason().unwrap_or("no reason given").to_owned();
    let Ok(body) = body_limited(response, ERROR_BYTES_MAX).await else { return fallback };
    let text = match serde_json::from_slice::<Envelope>(&body) {
        Ok(envelope) if !envelope.errors.is_empty() => {
            let parts: Vec<String> =
                envelope.errors.into_iter().map(|e| format!("{}: {}", e.code, e.message)).collect();
            parts.join("; ")
        }
        _ => String::from_utf8_lossy(&body).into_owned(),
    };
    // It ends up in logs and terminals.
    let clean: String = text.chars().filter(|c| !c.is_control()).take(REASON_CHARS_MAX).collect();
    if clean.trim().is_empty() { fallback } else { clean.trim().to_owned() }
}

/// A header value that is not shown in debug output.
pub(crate) fn header(text: &str) -> HeaderValue {
    // A secret with a line break matches no registry's; the empty value lets the registry say so.
    let mut value = HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}
