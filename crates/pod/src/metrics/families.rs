//! The metrics by name: those of the kubelet's `/metrics/cadvisor`, with the names and labels that cAdvisor gives them.

use stasis_cri_api::runtime::{MetricDescriptor, MetricType};

/// Labels of every metric, in the order of [`Labels`](super::Labels).
pub(super) const BASE: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// One metric.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    /// Labels beside [`BASE`].
    pub(super) labels: &'static [&'static str],
}

impl Family {
    pub(super) fn descriptor(&self) -> MetricDescriptor {
        let keys = BASE.iter().chain(self.labels);
        MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: keys.map(|key| (*key).to_owned()).collect(),
        }
    }
}

/// Declares the metrics and the list of all of them, so that none is sent that was not described.
macro_rules! families {
    ($($constant:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $constant: Family = Family {
            name: $name,
            help: $help,
            kind: MetricType::$kind,
            labels: &[$($label),*],
        };)*
        /// Every metric.
        pub(super) const ALL: &[Family] = &[$($constant),*];
    };
}

families! {
    LAST_SEEN = Gauge "container_last_seen" [] "When the container was last seen, in seconds since the epoch.";
    START_TIME = Gauge "container_start_time_seconds" [] "When the container was started, in seconds since the epoch.";

    CPU_USAGE = Counter "container_cpu_usage_seconds_total" [] "Processor time consumed, in seconds.";
    CPU_USER = Counter "container_cpu_user_seconds_total" [] "Processor time consumed outside of the kernel, in seconds.";
    CPU_SYSTEM = Counter "container_cpu_system_seconds_total" [] "Processor time consumed in the kernel, in seconds.";
    CPU_PERIODS = Counter "container_cpu_cfs_periods_total" [] "Periods of the processor quota that have passed.";
    CPU_THROTTLED_PERIODS = Counter "container_cpu_cfs_throttled_periods_total" []
        "Periods in which the processor quota was used up.";
    CPU_THROTTLED = Counter "container_cpu_cfs_throttled_seconds_total" []
        "Time spent waiting for the next period of the processor quota, in seconds.";

    MEMORY_USAGE = Gauge "container_memory_usage_bytes" [] "Memory in use, page cache included.";
    MEMORY_MAX_USAGE = Gauge "container_memory_max_usage_bytes" [] "The most memory that was in use.";
    MEMORY_WORKING_SET = Gauge "container_memory_working_set_bytes" []
        "Memory in use without the inactive page cache.";
    MEMORY_RSS = Gauge "container_memory_rss" [] "Anonymous memory in use.";
    MEMORY_CACHE = Gauge "container_memory_cache" [] "Page cache.";
    MEMORY_MAPPED = Gauge "container_memory_mapped_file" [] "Page cache that is mapped into processes.";
    MEMORY_KERNEL = Gauge "container_memory_kernel_usage" [] "Memory of the kernel on behalf of the processes.";
    MEMORY_SWAP = Gauge "container_memory_swap" [] "Swap in use, in bytes.";
    MEMORY_ACTIVE_FILE = Gauge "container_memory_total_active_file_bytes" [] "Page cache that was used lately.";
    MEMORY_INACTIVE_FILE = Gauge "container_memory_total_inactive_file_bytes" []
        "Page cache that the kernel would take back first.";
    MEMORY_FAILCNT = Counter "container_memory_failcnt" [] "How often the memory limit was met.";
    MEMORY_FAILURES = Counter "container_memory_failures_total" ["failure_type", "scope"] "Page faults.";
    OOM_EVENTS = Counter "container_oom_events_total" [] "Processes killed for lack of memory.";

    HUGETLB_USAGE = Gauge "container_hugetlb_usage_bytes" ["pagesize"] "Huge pages in use, in bytes.";
    HUGETLB_MAX_USAGE = Gauge "container_hugetlb_max_usage_bytes" ["pagesize"]
        "The most bytes of huge pages that were in use.";
    HUGETLB_FAILCNT = Counter "container_hugetlb_failcnt" ["pagesize"] "How often the limit of huge pages was met.";

    CPU_WAITING = Counter "container_pressure_cpu_waiting_seconds_total" []
        "Time in which a process waited for a processor, in seconds.";
    CPU_STALLED = Counter "container_pressure_cpu_stalled_seconds_total" []
        "Time in which all processes waited for a processor, in seconds.";
    MEMORY_WAITING = Counter "container_pressure_memory_waiting_seconds_total" []
        "Time in which a process waited for memory, in seconds.";
    MEMORY_STALLED = Counter "container_pressure_memory_stalled_seconds_total" []
        "Time in which all processes waited for memory, in seconds.";
    IO_WAITING = Counter "container_pressure_io_waiting_seconds_total" []
        "Time in which a process waited for block I/O, in seconds.";
    IO_STALLED = Counter "container_pressure_io_stalled_seconds_total" []
        "Time in which all processes waited for block I/O, in seconds.";

    FS_USAGE = Gauge "container_fs_usage_bytes" ["device"] "Bytes of the writable layer.";
    FS_LIMIT = Gauge "container_fs_limit_bytes" ["device"] "Size of the file system that has the writable layer.";
    FS_INODES = Gauge "container_fs_inodes_total" ["device"] "Inodes of the file system that has the writable layer.";
    FS_INODES_FREE = Gauge "container_fs_inodes_free" ["device"] "Inodes that are free there.";
    FS_READ_BYTES = Counter "container_fs_reads_bytes_total" ["device"] "Bytes read from the device.";
    FS_READS = Counter "container_fs_reads_total" ["device"] "Read operations of the device.";
    FS_WRITE_BYTES = Counter "container_fs_writes_bytes_total" ["device"] "Bytes written to the device.";
    FS_WRITES = Counter "container_fs_writes_total" ["device"] "Write operations of the device.";
    BLKIO_USAGE = Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"]
        "Bytes read from and written to the device.";

    RX_BYTES = Counter "container_network_receive_bytes_total" ["interface"] "Bytes received.";
    RX_PACKETS = Counter "container_network_receive_packets_total" ["interface"] "Packets received.";
    RX_DROPPED = Counter "container_network_receive_packets_dropped_total" ["interface"]
        "Packets dropped while receiving.";
    RX_ERRORS = Counter "container_network_receive_errors_total" ["interface"] "Errors while receiving.";
    TX_BYTES = Counter "container_network_transmit_bytes_total" ["interface"] "Bytes sent.";
    TX_PACKETS = Counter "container_network_transmit_packets_total" ["interface"] "Packets sent.";
    TX_DROPPED = Counter "container_network_transmit_packets_dropped_total" ["interface"]
        "Packets dropped while sending.";
    TX_ERRORS = Counter "container_network_transmit_errors_total" ["interface"] "Errors while sending.";

    PROCESSES = Gauge "container_processes" [] "Processes.";
    THREADS = Gauge "container_threads" [] "Processes and threads.";
    THREADS_MAX = Gauge "container_threads_max" [] "Most processes and threads that are allowed; 0 without a limit.";
    DESCRIPTORS = Gauge "container_file_descriptors" [] "Open file descriptors.";
    SOCKETS = Gauge "container_sockets" [] "Of them sockets.";
    ULIMITS = Gauge "container_ulimits_soft" ["ulimit"] "Soft limits of the first process.";

    SPEC_CPU_PERIOD = Gauge "container_spec_cpu_period" [] "Period of the processor quota, in microseconds.";
    SPEC_CPU_QUOTA = Gauge "container_spec_cpu_quota" [] "Processor quota a period, in microseconds.";
    SPEC_CPU_SHARES = Gauge "container_spec_cpu_shares" [] "Share of the processors, relative to others.";
    SPEC_MEMORY_LIMIT = Gauge "container_spec_memory_limit_bytes" [] "Memory limit; 0 without one.";
    SPEC_MEMORY_RESERVATION = Gauge "container_spec_memory_reservation_limit_bytes" []
        "Memory that is kept for the container; 0 for none.";
    SPEC_MEMORY_SWAP = Gauge "container_spec_memory_swap_limit_bytes" []
        "Limit of memory and swap together; 0 without one.";
}
