//! The gRPC services: CRI's RuntimeService and ImageService, and the administration interface stasis.v1.
//!
//! Each method checks that the request says what it must, calls `stasis-pod`, `stasis-image` or `stasis-checkpoint`,
//! and turns what comes back into a message or a status. How anything is done is not known here, nor are sockets.
//!
//! ```text
//!   Services ── routes   one tower service, by the path of the call
//!            ├─ runtime  CRI RuntimeService      image  CRI ImageService     admin  stasis.v1 Admin
//!            ├─ telemetry  trace, count and latency of every call
//!            ├─ call     span, log line and latency of every call
//!            ├─ streams  lists item by item, events
//!            ├─ backend  the engine behind exec, attach and port-forward
//!            ├─ status   errors → gRPC codes, in one place
//!            └─ request  what must be in a request
//! ```

mod admin;
mod backend;
mod call;
mod image;
mod progress;
mod request;
mod routes;
mod runtime;
mod status;
mod streams;
mod telemetry;

use std::fmt;
use std::sync::{Arc, RwLock};

use stasis_cni::Cni;
use stasis_cri_api::runtime::RuntimeHandler;
use stasis_cri_api::runtime::image_service_server::ImageServiceServer;
use stasis_cri_api::runtime::runtime_service_server::RuntimeServiceServer;
use stasis_cri_api::stasis::Finding;
use stasis_cri_api::stasis::admin_server::AdminServer;
use stasis_image::Images;
use stasis_pod::Pods;
use stasis_streaming::Server;
use tonic::{Response, Status};

pub use crate::backend::backend;
pub use crate::routes::Routes;
use crate::telemetry::Telemetry;

/// Largest message in either direction: the kubelet's own limit (16 MiB), which the pod engine keeps ExecSync below.
pub const MESSAGE_MAX: usize = 16 * 1024 * 1024;

/// What a method answers.
type Answer<T> = Result<Response<T>, Status>;

/// What the services stand on.
#[derive(Clone)]
pub struct Parts {
    /// Pods and containers.
    pub pods: Pods,
    /// Images.
    pub images: Images,
    /// The pod network, for the condition NetworkReady.
    pub cni: Cni,
    /// Gives out the URLs of exec, attach and port-forward.
    pub streaming: Server,
    /// The runtime handlers with what each can do; the default one a second time, with an empty name.
    pub handlers: Vec<RuntimeHandler>,
    /// The daemon's version.
    pub version: String,
    /// What a verbose Status shows of the daemon's configuration, as JSON.
    pub configuration: Arc<RwLock<String>>,
    /// Looks at the engines and the kernel; may take seconds, and runs off the async threads.
    pub doctor: Doctor,
}

/// Looks at the node and says what it finds.
pub type Doctor = Arc<dyn Fn() -> Vec<Finding> + Send + Sync>;

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("version", &self.version).finish_non_exhaustive()
    }
}

/// All services as one, ready to be served on any transport.
pub fn services(parts: Parts) -> Routes {
    let parts = Arc::new(parts);
    let telemetry = Arc::new(Telemetry::default());
    Routes {
        parts: Arc::clone(&parts),
        telemetry: Arc::clone(&telemetry),
        runtime: RuntimeServiceServer::from_arc(Arc::new(runtime::Runtime(Arc::clone(&parts))))
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX),
        image: ImageServiceServer::from_arc(Arc::new(image::ImageCalls(Arc::clone(&parts))))
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX),
        admin: AdminServer::from_arc(Arc::new(admin::AdminCalls(parts, telemetry)))
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX),
    }
}
