//! Logins, and where credentials go.

use stasis_image::{Auth, Kind};

use crate::build::{image, plain_layer};
use crate::fixtures::{Node, RegistryServer, tls_file};
use crate::http::{Answer, Server, serve_image};

fn password(password: &str) -> Auth {
    Auth { username: "user".into(), password: password.into(), ..Auth::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_password_wants_the_right_one() {
    let (registry, node) = (RegistryServer::with_password(), Node::new());
    let built = image(&[plain_layer(&[("f", b"x")])], "private");
    let reference = format!("{}/private:1", registry.host());
    built.push(&reference, Some(&password("secret"))).await;

    for (auth, words) in [(None, "none were given"), (Some(password("wrong")), "do not suffice")] {
        let error = node.images.pull(&reference, auth, |_| {}).await.expect_err("must be refused");
        assert_eq!(error.kind(), Kind::PermissionDenied);
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("private") && !text.contains("wrong"), "{text}");
    }
    node.assert_empty();
    node.images.pull(&reference, Some(password("secret")), |_| {}).await.expect("user and password");
    let encoded = Auth { auth: "dXNlcjpzZWNyZXQ=".into(), ..Auth::default() };
    node.images.pull(&reference, Some(encoded.clone()), |_| {}).await.expect("the auth field");

    let target = format!("{}/copy:2", registry.host());
    let error = node.images.push(&reference, Some(&target), None, |_| {}).await.expect_err("must be refused");
    assert_eq!(error.kind(), Kind::PermissionDenied);
    let pushed = node.images.push(&reference, Some(&target), Some(encoded), |_| {}).await.expect("push");
    assert_eq!(pushed.to_string(), built.digest());
}

/// A registry that wants a token, which its token server gives to `user:secret` and for the identity token `identity`.
fn token_registry(built: &crate::build::Built) -> (Server, Server) {
    let tokens = Server::start(|request| {
        let basic = request.header("authorization") == Some("Basic dXNlcjpzZWNyZXQ=");
        match (request.method.as_str(), basic) {
            ("GET", true) => Answer::ok(r#"{"token":"for-a-password"}"#),
            ("POST", _) => Answer::ok(r#"{"access_token":"for-an-identity"}"#),
            _ => Answer::status(401),
        }
    });
    let challenge =
        format!("Bearer realm=\"http://{}/token\",service=\"test\",scope=\"repository:x:pull\"", tokens.host());
    let image = built.clone();
    let registry = Server::start(move |request| match request.header("authorization") {
        Some("Bearer for-a-password" | "Bearer for-an-identity" | "Bearer ready-made") => serve_image(&image, request),
        _ => Answer::status(401).with("WWW-Authenticate", &challenge),
    });
    (registry, tokens)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_fetched_once_and_the_password_goes_to_the_token_server_only() {
    let built = image(&[plain_layer(&[("f", b"x")])], "token");
    let (registry, tokens) = token_registry(&built);
    let reference = format!("{}/x:1", registry.host());
    let identity = Auth { identity_token: "identity".into(), ..Auth::default() };
    let ready = Auth { registry_token: "ready-made".into(), ..Auth::default() };
    for (auth, token, asked) in [
        (password("secret"), "Bearer for-a-password", 1),
        (identity, "Bearer for-an-identity", 2),
        (ready, "Bearer ready-made", 2),
    ] {
        let node = Node::new();
        node.images.pull(&reference, Some(auth), |_| {}).await.expect("pull");
        assert_eq!(tokens.requests().len(), asked, "the token is asked for once a pull");
        assert_eq!(registry.requests().last().unwrap().header("authorization"), Some(token));
    }
    assert!(
        tokens.requests()[0].path.contains("scope=repository%3Ax%3Apull&service=test"),
        "{:?}",
        tokens.requests()[0]
    );
    for request in registry.requests() {
        assert!(request.header("authorization").is_none_or(|value| value.starts_with("Bearer ")));
    }
    let error = Node::new().images.pull(&reference, Some(password("wrong")), |_| {}).await.expect_err("refused");
    assert!(error.to_string().contains("the credentials were not accepted"), "{error}");
    let error = Node::new().pull(&reference).await.expect_err("refused");
    assert!(error.to_string().contains("no credentials were given"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let built = image(&[plain_layer(&[("f", b"x")])], "redirect");
    let storage = Server::of_image(&built, |_| None);
    let (image, to) = (built.clone(), storage.host());
    let registry = Server::start(move |request| {
        if request.header("authorization").is_none() {
            return Answer::status(401).with("WWW-Authenticate", "Basic realm=\"test\"");
        }
        match request.path.contains("/blobs/") {
            true => Answer::status(307).with("Location", &format!("http://{to}{}", request.path)),
            false => serve_image(&image, request),
        }
    });
    let node = Node::new();
    let reference = format!("{}/x:1", registry.host());
    node.images.pull(&reference, Some(password("secret")), |_| {}).await.expect("pull");
    assert_eq!(storage.requests().len(), 2, "configuration and layer come from the storage");
    for request in storage.requests() {
        assert_eq!(request.header("authorization"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_elsewhere_carries_no_credentials() {
    let (source, node) = (RegistryServer::start(), Node::new());
    let built = image(&[plain_layer(&[("f", b"x")])], "upload");
    let reference = format!("{}/x:1", source.host());
    built.push(&reference, None).await;
    node.pull(&reference).await.expect("pull");

    let storage = Server::start(|_| Answer::status(201));
    let to = storage.host();
    let registry = Server::start(move |request| {
        if request.header("authorization").is_none() {
            return Answer::status(401).with("WWW-Authenticate", "Basic realm=\"test\"");
        }
        match request.method.as_str() {
            "HEAD" => Answer::status(404),
            "POST" => Answer::status(202).with("Location", &format!("http://{to}/upload?state=1")),
            _ => Answer::status(201),
        }
    });
    let target = format!("{}/y:1", registry.host());
    node.images.push(&reference, Some(&target), Some(password("secret")), |_| {}).await.expect("push");
    assert_eq!(storage.requests().len(), 2);
    for request in storage.requests() {
        assert_eq!(request.header("authorization"), None);
        assert!(request.path.starts_with("/upload?state=1&digest=sha256%3A"), "{}", request.path);
    }
    assert!(
        registry.requests().iter().any(|request| request.method == "PUT" && request.header("authorization").is_some())
    );
}

/// Pulls over TLS with these lines in the registry's `hosts.toml`.
async fn pull_by_tls(host: &str, lines: &str) -> Result<(), stasis_image::Error> {
    let hosts = tempfile::tempdir().unwrap();
    std::fs::create_dir(hosts.path().join(host)).unwrap();
    std::fs::write(hosts.path().join(host).join("hosts.toml"), format!("server = \"https://{host}\"\n{lines}"))
        .unwrap();
    let node = Node::with(|config| config.registry.hosts_dir = Some(hosts.path().to_owned()));
    // The registry is empty: reaching it is all that is to be shown.
    let error = node.pull(&format!("{host}/tls:1")).await.expect_err("nothing is there");
    if error.kind() == Kind::NotFound { Ok(()) } else { Err(error) }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked() {
    let registry = RegistryServer::with_tls();
    let ca = tls_file("ca").display().to_string();
    pull_by_tls(&registry.host(), &format!("ca = {ca:?}")).await.expect("a known authority");
    pull_by_tls(&registry.host(), "skip_verify = true").await.expect("no verification");
    let error = pull_by_tls(&registry.host(), "").await.expect_err("an unknown authority");
    assert_eq!(error.kind(), Kind::Unavailable);
    let text = error.to_string();
    assert!(text.contains("certificate") && text.contains("name it in its hosts.toml"), "{text}");
    let error = pull_by_tls(&registry.host(), "ca = \"/no/such/file\"").await.expect_err("no such file");
    assert!(error.to_string().contains("/no/such/file"), "{error}");
}
