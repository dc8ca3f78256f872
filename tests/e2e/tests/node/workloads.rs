//! Real programs, checkpointed while they work: nothing is lost for the one that runs on, nor for the restored one.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stasis_cri_api::runtime::{ContainerConfig, Mount};
use stasis_e2e::{Stage, check, counts, counts_beyond, eventually, shell};
use xtask::cri::{Container, Pod, container_config};
use xtask::node::Setup;

/// The main class of a JavaScript interpreter in Java.
const RHINO: &str = "org.mozilla.javascript.tools.shell.Main";

/// Counts, after something was set up.
const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo count $n; sleep 0.1; done";

/// Checkpoints a container that counts, sees it go on, and restores it in another pod.
async fn carried(stage: &mut Stage, config: &ContainerConfig, options: &[&str]) -> Result<(Pod, Container)> {
    let pod = stage.pod("first").await?;
    let container = stage.container(&pod, config.clone()).await?;
    counts_beyond(&container, 3).await?;
    let archive = stage.archive("workload.tar").display().to_string();
    let options = options.iter().flat_map(|option| ["--option", option]);
    let create = ["checkpoint", "create", &container.id, &archive].into_iter().chain(options).collect::<Vec<_>>();
    stage.stasis(&create)?;
    is_whole(&container).await?;
    stage.remove(&pod).await?;
    let pod = stage.pod("second").await?;
    let mut config = config.clone();
    config.image = container_config("main", &archive, &[]).image;
    let restored = stage.container(&pod, config).await?;
    is_whole(&restored).await?;
    Ok((pod, restored))
}

/// It counts on, and no number is missing.
async fn is_whole(container: &Container) -> Result<()> {
    let at = *counts(container).last().context("it has not counted")?;
    counts_beyond(container, at + 5).await?;
    let counts = counts(container);
    ensure!(counts.iter().zip(1..).all(|(count, expected)| *count == expected), "{counts:?}");
    Ok(())
}

#[test]
fn a_hundred_processes() {
    check("hundred", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let script =
            format!("i=0; while [ $i -lt 100 ]; do i=$((i + 1)); (while :; do sleep 1000; done) & done; {COUNT}");
        let (pod, restored) = carried(stage, &shell("main", &script), &[]).await?;
        let processes = stage.sh(&restored, "ls -d /proc/[0-9]* | wc -l").await?;
        ensure!(processes.parse::<u32>()? > 200, "{processes} processes");
        stage.remove(&pod).await
    });
}

#[test]
fn ten_thousand_files_in_the_writable_layer() {
    check("files", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let script = format!(
            "for d in 0 1 2 3 4 5 6 7 8 9; do mkdir -p /data/$d; i=0; while [ $i -lt 1000 ]; do i=$((i + 1)); \
             echo $d$i > /data/$d/$i; done; done; {COUNT}"
        );
        let (pod, restored) = carried(stage, &shell("main", &script), &[]).await?;
        assert_eq!(stage.sh(&restored, "find /data -type f | wc -l; cat /data/7/777").await?, "10000\n7777");
        stage.remove(&pod).await
    });
}

#[test]
fn file_locks_and_deleted_open_files() {
    check("locks", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let script = format!(
            "flock /lock tail -f /dev/null & echo kept > /deleted; exec 3< /deleted; rm /deleted; sleep 0.5; {COUNT}"
        );
        let (pod, restored) = carried(stage, &shell("main", &script), &[]).await?;
        let held =
            "flock -n /lock true && echo free || echo held; cat /proc/1/fd/3; ls /deleted 2>&1 | grep -c 'No such'";
        assert_eq!(stage.sh(&restored, held).await?, "held\nkept\n1");
        stage.remove(&pod).await
    });
}

#[test]
fn a_shell_on_a_terminal() {
    check("tty", Setup::default(), async |stage| {
        stage.import(&["busybox"])?;
        let mut config = shell("main", COUNT);
        config.tty = true;
        let (pod, restored) = carried(stage, &config, &[]).await?;
        assert_eq!(stage.sh(&restored, "test -t 0 < /proc/1/fd/0 && echo terminal").await?, "terminal");
        stage.remove(&pod).await
    });
}

#[test]
fn python_with_threads_and_a_file_in_shared_memory() {
    check("python", Setup::default(), async |stage| {
        stage.import(&["python"])?;
        let program = "
import os, threading, time
shared = os.open('/dev/shm/numbers', os.O_RDWR | os.O_CREAT)
lock, seen = threading.Lock(), {}
def work(number):
    while True:
        with lock: seen[number] = seen.get(number, 0) + 1
        time.sleep(0.01)
for number in range(20): threading.Thread(target=work, args=(number,), daemon=True).start()
count = 0
while True:
    count += 1
    os.pwrite(shared, count.to_bytes(8, 'little'), 0)
    before = dict(seen); time.sleep(0.1)
    with lock: assert all(seen[n] >= before[n] for n in before)
    assert int.from_bytes(os.pread(shared, 8, 0), 'little') == count
    print('count', count, flush=True)
";
        let config = container_config("main", "localhost/python:latest", &["python3", "-c", program]);
        let (pod, restored) = carried(stage, &config, &[]).await?;
        let process = stage.process(&restored).await?;
        ensure!(fs::read_dir(process.join("task"))?.count() == 21, "threads are missing");
        stage.remove(&pod).await
    });
}

#[test]
fn node_with_timers() {
    check("node", Setup::default(), async |stage| {
        stage.import(&["node"])?;
        let program = "let n = 0; const kept = new Map(); setInterval(() => { n += 1; kept.set(n, 'x'.repeat(1000)); \
                       if (kept.size !== n) process.exit(3); console.log('count', n); }, 100)";
        let config = container_config("main", "localhost/node:latest", &["node", "-e", program]);
        let (pod, _) = carried(stage, &config, &[]).await?;
        stage.remove(&pod).await
    });
}

#[test]
fn java_with_fifty_threads() {
    check("java", Setup::default(), async |stage| {
        stage.import(&["java"])?;
        // Each thread counts for itself; the main one goes on as long as all of them do.
        let program = "var counters = [], Thread = java.lang.Thread, seen = []; \
                       for (var i = 0; i < 50; i++) (function (counter) { \
                         counters.push(counter); seen.push(0); \
                         new Thread(function () { while (true) { counter.incrementAndGet(); Thread.sleep(5); } }).start(); \
                       })(new java.util.concurrent.atomic.AtomicLong()); \
                       for (var n = 1; ; n++) { \
                         for (var i = 0; i < 50; i++) { \
                           while (counters[i].get() == seen[i]) Thread.sleep(5); \
                           seen[i] = counters[i].get(); \
                         } \
                         java.lang.System.out.println('count ' + n); Thread.sleep(100); \
                       }";
        let command = ["java", "-Xmx128m", "-cp", "/usr/share/java/rhino.jar", RHINO, "-e", program];
        let config = container_config("main", "localhost/java:latest", &command);
        let (pod, restored) = carried(stage, &config, &[]).await?;
        let status = fs::read_to_string(stage.process(&restored).await?.join("status"))?;
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:")).context("no number of threads")?;
        ensure!(threads.trim().parse::<u32>()? > 50, "{threads} threads");
        stage.remove(&pod).await
    });
}

#[test]
fn nginx_with_a_connection_that_is_kept_alive() {
    check("nginx", Setup::default(), async |stage| {
        stage.import(&["nginx"])?;
        let conf = stage.node.ground.disk.join("conf");
        fs::create_dir_all(&conf)?;
        let text = "user root; daemon off; pid /tmp/nginx.pid; error_log stderr; worker_processes 2; events {} \
                    http { access_log off; keepalive_timeout 600; server { listen 80; \
                    location / { return 200 \"$connection_requests\\n\"; } } }";
        fs::write(conf.join("nginx.conf"), text)?;
        let mut config = container_config("main", "localhost/nginx:latest", &["nginx", "-c", "/conf/nginx.conf"]);
        config.mounts.push(Mount {
            container_path: "/conf".into(),
            host_path: conf.display().to_string(),
            readonly: true,
            ..Mount::default()
        });
        let pod = stage.pod("web").await?;
        let container = stage.container(&pod, config).await?;
        let address = format!("{}:80", stage.node.cri.pod_address(&pod.id).await?);
        let mut connection =
            eventually("nginx", async || Ok(TcpStream::connect(&address).ok())).await.context("connect to nginx")?;
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        assert_eq!(request(&mut connection)?, 1);
        let archive = stage.archive("nginx.tar").display().to_string();
        for number in 2..6 {
            let create = ["checkpoint", "create", &container.id, &archive, "--option", "tcp-established"];
            stage.stasis(&create)?;
            // The server numbers the requests of a connection: it is the same one.
            assert_eq!(request(&mut connection)?, number);
        }
        stage.remove(&pod).await
    });
}

/// A request on a connection, and the number that the server gives it.
fn request(connection: &mut TcpStream) -> Result<u32> {
    connection.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut byte = [0];
    // The headers, and a body of one line.
    while !(answer.windows(4).any(|end| end == b"\r\n\r\n") && answer.ends_with(b"\n") && !answer.ends_with(b"\r\n")) {
        ensure!(connection.read(&mut byte)? == 1, "closed after {:?}", String::from_utf8_lossy(&answer));
        answer.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    text.lines().last().and_then(|line| line.parse().ok()).with_context(|| format!("no number in {text}"))
}

#[test]
fn redis_under_load() {
    check("redis", Setup::default(), async |stage| {
        stage.import(&["redis"])?;
        let script = "redis-server /etc/redis/redis.conf > /dev/null & sleep 1; n=0; \
                      while :; do n=$((n + 1)); until redis-cli set key$n $n | grep -qx OK; do sleep 0.1; done; \
                      echo count $n; sleep 0.02; done";
        let mut config = container_config("main", "localhost/redis:latest", &["sh", "-c", script]);
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).context("no context")?;
        // Of other users' processes CRIU cannot read the limits without CAP_SYS_RESOURCE.
        context.run_as_user = Some(stasis_cri_api::runtime::Int64Value { value: 0 });
        let (pod, restored) = carried(stage, &config, &["tcp-established"]).await?;
        let last = *counts(&restored).last().context("no count")?;
        let script = format!("n=0; while [ $n -lt {last} ]; do n=$((n + 1)); echo get key$n; done | redis-cli");
        let values = stage.sh(&restored, &script).await?;
        let values: Vec<u64> = values.lines().filter_map(|line| line.parse().ok()).collect();
        ensure!(values == (1..=last).collect::<Vec<_>>(), "not every key that was acknowledged is there: {values:?}");
        stage.remove(&pod).await
    });
}
