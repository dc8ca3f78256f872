//! What each URL stands for: a request behind a token that works once, and for a minute.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::Request;
use crate::error::Error;

/// How long a client may take from the CRI call to its connection; the peers' time.
pub(crate) const LIFETIME: Duration = Duration::from_secs(60);

/// URLs that may wait for their clients; the peers' number. Who asks for more gets none until some are used or expire.
pub(crate) const OPEN_MAX: usize = 1000;

/// The open requests.
#[derive(Debug, Default)]
pub(crate) struct Tokens(Mutex<HashMap<String, (Request, Instant)>>);

impl Tokens {
    /// Keeps a request and gives the token for it: 256 random bits.
    pub(crate) fn insert(&self, request: Request, now: Instant) -> Result<String, Error> {
        let mut open = self.open();
        if open.len() >= OPEN_MAX {
            open.retain(|_, (_, until)| *until > now);
        }
        if open.len() >= OPEN_MAX {
            return Err(Error::TooManyOpen(OPEN_MAX));
        }
        let token = stasis_sys::file::random_id();
        open.insert(token.clone(), (request, now + LIFETIME));
        Ok(token)
    }

    /// The request of a token, which nobody gets again. The kind must be the one that the URL was made for.
    pub(crate) fn take(&self, kind: &str, token: &str, now: Instant) -> Option<Request> {
        let mut open = self.open();
        if open.get(token)?.0.kind() != kind {
            return None;
        }
        let (request, until) = open.remove(token)?;
        (until > now).then_some(request)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, (Request, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(pod: usize) -> Request {
        Request::PortForward { pod: pod.to_string(), ports: Vec::new() }
    }

    #[test]
    fn a_token_works_once_for_its_kind_and_for_a_minute() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.insert(request(1), now).unwrap();
        assert_eq!(tokens.take("exec", &token, now), None);
        assert_eq!(tokens.take("portforward", "other", now), None);
        assert_eq!(tokens.take("portforward", &token, now), Some(request(1)));
        assert_eq!(tokens.take("portforward", &token, now), None);
        let late = tokens.insert(request(2), now).unwrap();
        assert_eq!(tokens.take("portforward", &late, now + LIFETIME), None);
        assert_eq!(tokens.take("portforward", &late, now), None);
    }

    #[test]
    fn open_tokens_are_bounded_and_expired_ones_make_room() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        for pod in 0..OPEN_MAX {
            tokens.insert(request(pod), now).unwrap();
        }
        assert!(matches!(tokens.insert(request(0), now), Err(Error::TooManyOpen(OPEN_MAX))));
        assert!(tokens.insert(request(0), now + LIFETIME).is_ok());
    }
}
