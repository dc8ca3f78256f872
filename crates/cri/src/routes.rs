//! One tower service out of three gRPC services: a call goes where the first part of its path says.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use stasis_cri_api::runtime::image_service_server::ImageServiceServer;
use stasis_cri_api::runtime::runtime_service_server::RuntimeServiceServer;
use stasis_cri_api::stasis::admin_server::AdminServer;
use stasis_metrics::{Kind, Text};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;
use tracing::Instrument as _;

use crate::Parts;
use crate::admin::AdminCalls;
use crate::image::ImageCalls;
use crate::runtime::Runtime;
use crate::telemetry::Telemetry;

/// The services of the daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Routes {
    pub(crate) runtime: RuntimeServiceServer<Runtime>,
    pub(crate) image: ImageServiceServer<ImageCalls>,
    pub(crate) admin: AdminServer<AdminCalls>,
    pub(crate) parts: Arc<Parts>,
    pub(crate) telemetry: Arc<Telemetry>,
}

impl Routes {
    /// The daemon's metrics as OpenMetrics text.
    pub fn metrics(&self) -> String {
        let mut text = Text::default();
        text.family("stasis_build", Kind::Info, "What runs.");
        text.sample(&[("version", &self.parts.version)], 1);
        self.telemetry.write(&mut text);
        self.parts.pods.write_metrics(&mut text);
        self.parts.images.write_metrics(&mut text);
        text.finish()
    }

    fn route(&mut self, request: http::Request<Body>) -> BoxFuture<http::Response<Body>, Infallible> {
        match service_of(request.uri().path()) {
            RuntimeServiceServer::<Runtime>::NAME => self.runtime.call(request),
            ImageServiceServer::<ImageCalls>::NAME => self.image.call(request),
            AdminServer::<AdminCalls>::NAME => self.admin.call(request),
            unknown => {
                let status = Status::unimplemented(format!("unknown service {unknown}"));
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}

impl Service<http::Request<Body>> for Routes {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (call, span) = self.telemetry.begin(request.uri().path(), request.headers());
        let operation = self.parts.pods.operation();
        let answer = self.route(request);
        let counted = async move {
            let _operation = operation;
            let response = answer.await?;
            call.end(response.headers());
            Ok(response)
        };
        Box::pin(counted.instrument(span))
    }
}

/// The service in `/package.Service/Method`.
fn service_of(path: &str) -> &str {
    path.strip_prefix('/').and_then(|path| path.split_once('/')).map_or("", |(service, _)| service)
}

#[cfg(test)]
mod tests {
    use super::service_of;

    #[test]
    fn the_service_is_the_first_part_of_the_path() {
        assert_eq!(service_of("/runtime.v1.RuntimeService/Version"), "runtime.v1.RuntimeService");
        for malformed in ["", "/", "/x", "x/y", "//y"] {
            assert!(["", "x"].contains(&service_of(malformed)), "{malformed}");
        }
    }
}
