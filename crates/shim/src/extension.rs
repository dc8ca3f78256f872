//! Our own service beside containerd's: JSON documents over ttrpc, see [`stasis_shim_api`].

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_shim_api::{
    AttachRequest, METHOD_ATTACH, METHOD_CHECKPOINT, METHOD_PROGRESS, METHOD_REOPEN_LOG, ProgressRequest,
    ReopenLogRequest, SERVICE,
};
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response, get_status};

use crate::checkpoint;
use crate::error::Error;
use crate::server::{Shim, detached};

#[derive(Clone, Copy)]
enum Method {
    Checkpoint,
    Progress,
    ReopenLog,
    Attach,
}

struct Handler {
    shim: Arc<Shim>,
    method: Method,
}

/// The service, in the form in which a ttrpc server takes it.
pub(crate) fn service(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let handler = |name: &str, method| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Handler { shim: Arc::clone(shim), method });
        (name.to_owned(), handler)
    };
    let methods = [
        handler(METHOD_CHECKPOINT, Method::Checkpoint),
        handler(METHOD_PROGRESS, Method::Progress),
        handler(METHOD_REOPEN_LOG, Method::ReopenLog),
        handler(METHOD_ATTACH, Method::Attach),
    ];
    HashMap::from([(SERVICE.to_owned(), Service { methods: methods.into(), streams: HashMap::new() })])
}

impl Handler {
    async fn answer(&self, payload: &[u8]) -> Result<Vec<u8>, Error> {
        let shim = Arc::clone(&self.shim);
        match self.method {
            Method::Checkpoint => {
                let request = parse(payload)?;
                encode(&detached(async move { checkpoint::checkpoint(&shim, request).await }).await?)
            }
            Method::Progress => {
                let request: ProgressRequest = parse(payload)?;
                encode(&shim.progress(&request.id))
            }
            Method::ReopenLog => {
                let request: ReopenLogRequest = parse(payload)?;
                shim.container(&request.id)?.init.reopen_logs()?;
                encode(&serde_json::Map::new())
            }
            Method::Attach => {
                let request: AttachRequest = parse(payload)?;
                shim.container(&request.id)?.init.attach(&request)?;
                encode(&serde_json::Map::new())
            }
        }
    }
}

#[async_trait]
impl MethodHandler for Handler {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        match self.answer(&request.payload).await {
            Ok(payload) => {
                let mut response = Response { payload, ..Default::default() };
                response.set_status(get_status(Code::OK, ""));
                Ok(response)
            }
            Err(error) => Ok(error.into_extension_status().into()),
        }
    }
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|error| Error::Invalid(format!("the request cannot be read: {error}")))
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::Internal(error.to_string()))
}
