//! CRI RuntimeService over the pod engine.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use stasis_cri_api::runtime::runtime_service_server::RuntimeService;
use stasis_cri_api::runtime::*;
use stasis_pod::{CheckpointOptions, ImageTarget};
use stasis_streaming::{self as streaming, Streams};
use tonic::codegen::BoxStream;
use tonic::{Request, Status, async_trait};

use crate::request::{absolute, address_ranges, not_negative, port_number, present, required, seconds};
use crate::status::{self, from_pod, from_streaming};
use crate::streams::{self, one_a_message};
use crate::{Answer, Parts, call};

/// The name in Version, by which the kubelet prefixes container IDs (`stasis://…`).
const RUNTIME_NAME: &str = "stasis";
/// The version of the CRI that is served.
const RUNTIME_API_VERSION: &str = "v1";
/// The version of Version's own fields: the kubelet sends and expects 0.1.0.
const KUBELET_API_VERSION: &str = "0.1.0";

/// A location of CheckpointContainer that begins so is the reference of an image to make instead of an archive.
const IMAGE_LOCATION: &str = "image:";

/// The service.
#[derive(Debug)]
pub(crate) struct Runtime(pub(crate) Arc<Parts>);

#[async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        call::read("Version", "", async {
            Ok(VersionResponse {
                version: KUBELET_API_VERSION.into(),
                runtime_name: RUNTIME_NAME.into(),
                runtime_version: self.0.version.clone(),
                runtime_api_version: RUNTIME_API_VERSION.into(),
            })
        })
        .await
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        call::read("Status", "", async { self.node_status(request.into_inner().verbose).await }).await
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        call::read("RuntimeConfig", "", async {
            let cgroup_driver = self.0.pods.cgroup_driver().into();
            Ok(RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver }) })
        })
        .await
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let request = request.into_inner();
        let name = request.config.as_ref().map(pod_name).unwrap_or_default();
        call::change("RunPodSandbox", &name, async {
            let config = present(request.config, "config")?;
            let pods = &self.0.pods;
            let pod_sandbox_id = pods.run_pod_sandbox(config, &request.runtime_handler).await.map_err(from_pod)?;
            Ok(RunPodSandboxResponse { pod_sandbox_id })
        })
        .await
    }

    async fn stop_pod_sandbox(&self, request: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call::change("StopPodSandbox", &id, async {
            self.0.pods.stop_pod_sandbox(required(&id, "pod_sandbox_id")?).await.map_err(from_pod)?;
            Ok(StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(&self, request: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call::change("RemovePodSandbox", &id, async {
            self.0.pods.remove_pod_sandbox(required(&id, "pod_sandbox_id")?).await.map_err(from_pod)?;
            Ok(RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(&self, request: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        let PodSandboxStatusRequest { pod_sandbox_id: id, verbose } = request.into_inner();
        call::read("PodSandboxStatus", &id, async {
            self.0.pods.pod_sandbox_status(required(&id, "pod_sandbox_id")?, verbose).map_err(from_pod)
        })
        .await
    }

    async fn list_pod_sandbox(&self, request: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        call::read("ListPodSandbox", "", async {
            let filter = request.into_inner().filter;
            Ok(ListPodSandboxResponse { items: self.0.pods.list_pod_sandboxes(filter.as_ref()) })
        })
        .await
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let CreateContainerRequest { pod_sandbox_id, config, .. } = request.into_inner();
        let name = config.as_ref().and_then(|config| config.metadata.as_ref());
        let object = format!("{} in {pod_sandbox_id}", name.map(|metadata| metadata.name.as_str()).unwrap_or_default());
        call::change("CreateContainer", &object, async {
            let pod = required(&pod_sandbox_id, "pod_sandbox_id")?;
            let config = present(config, "config")?;
            let container_id = self.0.pods.create_container(pod, config).await.map_err(from_pod)?;
            Ok(CreateContainerResponse { container_id })
        })
        .await
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        let id = request.into_inner().container_id;
        call::change("StartContainer", &id, async {
            self.0.pods.start_container(required(&id, "container_id")?).await.map_err(from_pod)?;
            Ok(StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let StopContainerRequest { container_id: id, timeout } = request.into_inner();
        call::change("StopContainer", &id, async {
            // Callers send what is left of a grace period, which may be below zero: no time is left then.
            let timeout = timeout.max(0);
            self.0.pods.stop_container(required(&id, "container_id")?, timeout).await.map_err(from_pod)?;
            Ok(StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        call::change("RemoveContainer", &id, async {
            self.0.pods.remove_container(required(&id, "container_id")?).await.map_err(from_pod)?;
            Ok(RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(&self, request: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        call::read("ListContainers", "", async {
            let filter = request.into_inner().filter;
            Ok(ListContainersResponse { containers: self.0.pods.list_containers(filter.as_ref()) })
        })
        .await
    }

    async fn container_status(&self, request: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        let ContainerStatusRequest { container_id: id, verbose } = request.into_inner();
        call::read("ContainerStatus", &id, async {
            self.0.pods.container_status(required(&id, "container_id")?, verbose).map_err(from_pod)
        })
        .await
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let ExecSyncRequest { container_id: id, cmd, timeout } = request.into_inner();
        // Not logged as a change: probes run it every few seconds in every pod.
        call::read("ExecSync", &id, async {
            required(&id, "container_id")?;
            required(cmd.first().map(String::as_str).unwrap_or_default(), "cmd")?;
            not_negative(timeout, "timeout")?;
            self.0.pods.exec_sync(&id, cmd, timeout).await.map_err(from_pod)
        })
        .await
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let ExecRequest { container_id: id, cmd, tty, stdin, stdout, stderr } = request.into_inner();
        call::change("Exec", &id, async {
            required(cmd.first().map(String::as_str).unwrap_or_default(), "cmd")?;
            let container = self.0.pods.container_for_exec(required(&id, "container_id")?).map_err(from_pod)?;
            let streams = Streams { stdin, stdout, stderr, tty };
            let url = self.url(streaming::Request::Exec { container, command: cmd, streams })?;
            Ok(ExecResponse { url })
        })
        .await
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        let AttachRequest { container_id: id, stdin, tty, stdout, stderr } = request.into_inner();
        call::change("Attach", &id, async {
            let container = self.0.pods.container_for_attach(required(&id, "container_id")?).map_err(from_pod)?;
            let url =
                self.url(streaming::Request::Attach { container, streams: Streams { stdin, stdout, stderr, tty } })?;
            Ok(AttachResponse { url })
        })
        .await
    }

    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        let PortForwardRequest { pod_sandbox_id: id, port } = request.into_inner();
        call::change("PortForward", &id, async {
            let pod = self.0.pods.pod_for_ports(required(&id, "pod_sandbox_id")?).map_err(from_pod)?;
            let ports = port.into_iter().map(port_number).collect::<Result<_, _>>()?;
            let url = self.url(streaming::Request::PortForward { pod, ports })?;
            Ok(PortForwardResponse { url })
        })
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        call::change("ReopenContainerLog", &id, async {
            self.0.pods.reopen_container_log(required(&id, "container_id")?).await.map_err(from_pod)?;
            Ok(ReopenContainerLogResponse {})
        })
        .await
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        let CheckpointContainerRequest { container_id: id, location, timeout } = request.into_inner();
        call::change("CheckpointContainer", &id, async {
            required(&id, "container_id")?;
            let image = location.strip_prefix(IMAGE_LOCATION);
            let options = CheckpointOptions {
                container_id: id.clone(),
                location: match image {
                    Some(_) => PathBuf::new(),
                    None => absolute(&location, "location")?.to_owned(),
                },
                timeout: seconds(timeout, "timeout")?,
                options: BTreeMap::new(),
                progress: None,
            };
            status::refuse_checkpoint(self.0.pods.checkpoints_possible(), &id)?;
            match image {
                Some(reference) => {
                    let target = ImageTarget { reference: reference.to_owned(), self_contained: false };
                    self.0.pods.checkpoint_to_image(options, target, |_| {}).await.map(drop).map_err(from_pod)?;
                }
                None => self.0.pods.checkpoint_container(options).await.map(drop).map_err(from_pod)?,
            }
            Ok(CheckpointContainerResponse {})
        })
        .await
    }

    async fn container_stats(&self, request: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        call::read("ContainerStats", &id, async {
            let stats = self.0.pods.container_stats(required(&id, "container_id")?).await.map_err(from_pod)?;
            Ok(ContainerStatsResponse { stats: Some(stats) })
        })
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Answer<ListContainerStatsResponse> {
        call::read("ListContainerStats", "", async {
            let filter = request.into_inner().filter;
            let stats = self.0.pods.list_container_stats(filter.as_ref()).await.map_err(from_pod)?;
            Ok(ListContainerStatsResponse { stats })
        })
        .await
    }

    async fn pod_sandbox_stats(&self, request: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call::read("PodSandboxStats", &id, async {
            let stats = self.0.pods.pod_sandbox_stats(required(&id, "pod_sandbox_id")?).await.map_err(from_pod)?;
            Ok(PodSandboxStatsResponse { stats: Some(stats) })
        })
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        call::read("ListPodSandboxStats", "", async {
            let filter = request.into_inner().filter;
            let stats = self.0.pods.list_pod_sandbox_stats(filter.as_ref()).await.map_err(from_pod)?;
            Ok(ListPodSandboxStatsResponse { stats })
        })
        .await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        call::read("ListMetricDescriptors", "", async {
            Ok(ListMetricDescriptorsResponse { descriptors: self.0.pods.metric_descriptors() })
        })
        .await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        call::read("ListPodSandboxMetrics", "", async {
            let pod_metrics = self.0.pods.list_pod_sandbox_metrics().await.map_err(from_pod)?;
            Ok(ListPodSandboxMetricsResponse { pod_metrics })
        })
        .await
    }

    type StreamPodSandboxesStream = BoxStream<StreamPodSandboxesResponse>;
    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        call::read("StreamPodSandboxes", "", async {
            let list = self.0.pods.list_pod_sandboxes(request.into_inner().filter.as_ref());
            Ok(one_a_message(list, |item| StreamPodSandboxesResponse { pod_sandboxes: vec![item] }))
        })
        .await
    }

    type StreamContainersStream = BoxStream<StreamContainersResponse>;
    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        call::read("StreamContainers", "", async {
            let list = self.0.pods.list_containers(request.into_inner().filter.as_ref());
            Ok(one_a_message(list, |item| StreamContainersResponse { containers: vec![item] }))
        })
        .await
    }

    type StreamContainerStatsStream = BoxStream<StreamContainerStatsResponse>;
    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        call::read("StreamContainerStats", "", async {
            let filter = request.into_inner().filter;
            let list = self.0.pods.list_container_stats(filter.as_ref()).await.map_err(from_pod)?;
            Ok(one_a_message(list, |item| StreamContainerStatsResponse { container_stats: vec![item] }))
        })
        .await
    }

    type StreamPodSandboxStatsStream = BoxStream<StreamPodSandboxStatsResponse>;
    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        call::read("StreamPodSandboxStats", "", async {
            let filter = request.into_inner().filter;
            let list = self.0.pods.list_pod_sandbox_stats(filter.as_ref()).await.map_err(from_pod)?;
            Ok(one_a_message(list, |item| StreamPodSandboxStatsResponse { pod_sandbox_stats: vec![item] }))
        })
        .await
    }

    type StreamPodSandboxMetricsStream = BoxStream<StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        call::read("StreamPodSandboxMetrics", "", async {
            let list = self.0.pods.list_pod_sandbox_metrics().await.map_err(from_pod)?;
            Ok(one_a_message(list, |item| StreamPodSandboxMetricsResponse { pod_sandbox_metrics: vec![item] }))
        })
        .await
    }

    type GetContainerEventsStream = BoxStream<ContainerEventResponse>;
    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        call::read("GetContainerEvents", "", async { Ok(streams::events(self.0.pods.events())) }).await
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let UpdateContainerResourcesRequest { container_id: id, linux, .. } = request.into_inner();
        call::change("UpdateContainerResources", &id, async {
            required(&id, "container_id")?;
            let wanted = present(linux, "linux")?;
            self.0.pods.update_container_resources(&id, wanted).await.map_err(from_pod)?;
            Ok(UpdateContainerResourcesResponse {})
        })
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        let UpdatePodSandboxResourcesRequest { pod_sandbox_id: id, overhead, resources } = request.into_inner();
        call::change("UpdatePodSandboxResources", &id, async {
            required(&id, "pod_sandbox_id")?;
            self.0.pods.update_pod_sandbox_resources(&id, overhead, resources).await.map_err(from_pod)?;
            Ok(UpdatePodSandboxResourcesResponse {})
        })
        .await
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        let ranges = network.map(|network| network.pod_cidr).unwrap_or_default();
        call::change("UpdateRuntimeConfig", &ranges, async {
            // As containerd without a template: addresses are the business of the network's own configuration.
            address_ranges(&ranges, "runtime_config.network_config.pod_cidr")?;
            Ok(UpdateRuntimeConfigResponse {})
        })
        .await
    }

    // What follows is not built yet.

    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        Err(status::unbuilt("CheckpointPod"))
    }

    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        Err(status::unbuilt("RestorePod"))
    }
}

impl Runtime {
    /// A URL at which one client gets what it asks for.
    fn url(&self, request: streaming::Request) -> Result<String, Status> {
        self.0.streaming.url(request).map_err(from_streaming)
    }

    /// Whether pods can get a network; if not, a reason in CamelCase and a sentence.
    fn network(&self) -> Result<(), (String, String)> {
        let status = self.0.cni.status();
        status.map(drop).map_err(|not_ready| ("NetworkPluginNotReady".to_owned(), not_ready.to_string()))
    }

    /// What `crictl info` shows beside the conditions, under the keys that containerd uses where it has the same.
    async fn info(&self) -> Result<HashMap<String, String>, Status> {
        let network = match self.0.cni.status() {
            Ok(_) => "OK".to_owned(),
            Err(not_ready) => not_ready.to_string(),
        };
        let cdi = self.0.pods.cdi().await.map_err(from_pod)?;
        let cdi = serde_json::json!({ "devices": cdi.devices, "errors": cdi.errors });
        Ok(HashMap::from([
            ("cdi".to_owned(), cdi.to_string()),
            ("config".to_owned(), self.0.configuration.read().unwrap_or_else(PoisonError::into_inner).clone()),
            ("lastCNILoadStatus".to_owned(), serde_json::Value::from(network).to_string()),
            ("version".to_owned(), serde_json::Value::from(self.0.version.as_str()).to_string()),
        ]))
    }

    /// The two conditions that CRI requires, the handlers and what they can do.
    async fn node_status(&self, verbose: bool) -> Result<StatusResponse, Status> {
        let runtime = condition("RuntimeReady", Ok(()));
        let network = condition("NetworkReady", self.network());
        let info = match verbose {
            true => self.info().await?,
            false => HashMap::new(),
        };
        Ok(StatusResponse {
            status: Some(RuntimeStatus { conditions: vec![runtime, network] }),
            info,
            runtime_handlers: self.0.handlers.clone(),
            features: Some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
                mount_options: true,
            }),
        })
    }
}

/// A condition; a false one says why, in a CamelCase reason and a sentence.
fn condition(name: &str, state: Result<(), (String, String)>) -> RuntimeCondition {
    let status = state.is_ok();
    let (reason, message) = state.err().unwrap_or_default();
    RuntimeCondition { r#type: name.into(), status, reason, message }
}

fn pod_name(config: &PodSandboxConfig) -> String {
    config.metadata.as_ref().map(|metadata| format!("{}/{}", metadata.namespace, metadata.name)).unwrap_or_default()
}
