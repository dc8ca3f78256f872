//! What the command line accepts. Help must suffice without the web: every command has an example.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

/// Socket of the daemon, unless said otherwise.
pub(crate) const DEFAULT_ADDRESS: &str = "unix:///run/stasis/stasis.sock";

const EXAMPLES: &str = "\
Examples:
  stasis ps -a                                          all containers of the node
  stasis logs -f web/app                                follow the log of container app in pod web
  stasis checkpoint create app /var/lib/stasis/checkpoints/app.tar
  stasis checkpoint to-image /var/lib/stasis/checkpoints/app.tar registry.local/app:frozen
  stasis push registry.local/app:frozen
  stasis restore registry.local/app:frozen --pod web    run it again, here or on another node

Containers, pods and images are named by ID, by any unique beginning of an ID, or by name
(POD/NAME for a container, NAMESPACE/NAME for a pod).";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the operation failed; of `doctor`: something is broken
  2  the command line is wrong
  3  the daemon cannot be reached
  4  there is no such container, pod or image, or more than one fits
  5  the time given by --timeout was up
  `exec` ends with the exit code of what it ran.";

/// Operate a stasis node: containers, pods, images and checkpoints.
#[derive(Debug, Parser)]
#[command(name = "stasis", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
#[command(propagate_version = false, disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Socket of the daemon
    #[arg(long, global = true, env = "STASIS_ADDRESS", default_value = DEFAULT_ADDRESS, value_name = "URI")]
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) address: String,
    /// Give up after so many seconds (default: 30; none for what moves data)
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: Option<u32>,
    /// Form of the output
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Format,
    /// Print IDs or nothing; show no progress
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
    /// For both
    Yaml,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List containers
    #[command(
        after_help = "Examples:\n  stasis ps\n  stasis ps -a -o json | jq -r '.[].name'\n  stasis rm $(stasis ps -aq)"
    )]
    Ps {
        /// Those that do not run, too
        #[arg(short, long)]
        all: bool,
    },
    /// List pods
    #[command(after_help = "Examples:\n  stasis pods\n  stasis pods -o yaml")]
    Pods,
    /// List images
    #[command(after_help = "Examples:\n  stasis images\n  stasis images -q")]
    Images,
    /// Pull an image from a registry
    #[command(after_help = "Examples:\n  stasis pull docker.io/library/redis:7\n  \
        stasis pull registry.local/app@sha256:…\n  pass show registry | stasis pull registry.local/app:1 --creds-stdin")]
    Pull {
        /// Image reference
        reference: String,
        #[command(flatten)]
        credentials: Credentials,
    },
    /// Push an image to a registry
    #[command(after_help = "Examples:\n  stasis push registry.local/app:frozen\n  \
        stasis push 3f2a registry.local/app:copy --creds user:secret")]
    Push {
        /// Local image
        image: String,
        /// Where to, if not to the image's own reference
        target: Option<String>,
        #[command(flatten)]
        credentials: Credentials,
    },
    /// Import an image from a tar archive or an OCI layout
    #[command(after_help = "Examples:\n  stasis import app.tar\n  stasis import ./oci-layout registry.local/app:1")]
    Import {
        /// Archive of `docker save`, `stasis export` or another tool, or directory with an OCI layout
        #[arg(value_hint = ValueHint::AnyPath)]
        path: PathBuf,
        /// Reference for it, if not those that the archive names
        reference: Option<String>,
    },
    /// Export an image to a tar archive that `docker load` reads, too
    #[command(after_help = "Examples:\n  stasis export docker.io/library/redis:7 redis.tar")]
    Export {
        /// Local image
        image: String,
        /// Archive to write
        #[arg(value_hint = ValueHint::FilePath)]
        path: PathBuf,
    },
    /// Remove images
    #[command(after_help = "Examples:\n  stasis rmi registry.local/app:frozen\n  stasis rmi 3f2a 77b1")]
    Rmi {
        /// Local images
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Print what a container wrote
    #[command(
        after_help = "Examples:\n  stasis logs app\n  stasis logs -f --tail 20 web/app\n  stasis logs app 2>/dev/null"
    )]
    Logs(Logs),
    /// Freeze containers into archives and images, and look into them
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// Run a container out of a checkpoint
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(Restore),
    /// Run a command in a container
    #[command(
        after_help = "Examples:\n  stasis exec app -- cat /etc/hostname\n  stasis exec web/app -- sh -c 'kill -HUP 1'"
    )]
    Exec {
        /// Container
        container: String,
        /// Command and its arguments
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Stop containers
    #[command(after_help = "Examples:\n  stasis stop app\n  stasis stop -t 0 web/app")]
    Stop {
        /// Containers
        #[arg(required = true)]
        containers: Vec<String>,
        /// Seconds from the stop signal to SIGKILL
        #[arg(short, long, default_value_t = 10, value_name = "SECONDS")]
        time: u32,
    },
    /// Remove containers
    #[command(after_help = "Examples:\n  stasis rm app\n  stasis rm -f web/app")]
    Rm {
        /// Containers
        #[arg(required = true)]
        containers: Vec<String>,
        /// Also if they run
        #[arg(short, long)]
        force: bool,
    },
    /// Stop pods: all of their containers, and their network
    #[command(after_help = "Examples:\n  stasis stopp web\n  stasis stopp default/web")]
    Stopp {
        /// Pods
        #[arg(required = true)]
        pods: Vec<String>,
    },
    /// Remove pods
    #[command(after_help = "Examples:\n  stasis rmp web\n  stasis rmp -f $(stasis pods -q)")]
    Rmp {
        /// Pods
        #[arg(required = true)]
        pods: Vec<String>,
        /// Stop them first
        #[arg(short, long)]
        force: bool,
    },
    /// Show what the daemon found of its engines, and what does not work for lack of them
    #[command(after_help = "Examples:\n  stasis doctor\n  stasis doctor -o json")]
    Doctor,
    /// Look for a fault in the daemon
    #[command(subcommand)]
    Debug(Debug),
    /// Print the versions of this program and of the daemon
    #[command(after_help = "Examples:\n  stasis version\n  stasis version --client")]
    Version {
        /// Do not ask the daemon
        #[arg(long)]
        client: bool,
    },
    /// Print completions for a shell
    #[command(after_help = "Examples:\n  stasis completions bash > /etc/bash_completion.d/stasis\n  \
        stasis completions zsh > /usr/share/zsh/site-functions/_stasis")]
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(after_help = "Examples:\n  stasis man | man -l -\n  stasis man --dir /usr/local/share/man/man1")]
    Man {
        /// Write all pages to this directory instead of one to standard output
        #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Credentials {
    /// Name and password for the registry; other users of this machine can see them
    #[arg(long, value_name = "USER:PASSWORD")]
    pub(crate) creds: Option<String>,
    /// Read USER:PASSWORD from standard input
    #[arg(long, conflicts_with = "creds")]
    pub(crate) creds_stdin: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Logs {
    /// Container
    pub(crate) container: String,
    /// Go on until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Begin with the last so many lines
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<usize>,
    /// Print the time of each line
    #[arg(short = 't', long)]
    pub(crate) timestamps: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Checkpoint {
    /// Freeze a container into an archive; it goes on running
    #[command(after_help = "Examples:\n  stasis checkpoint create app /var/lib/stasis/checkpoints/app.tar\n  \
        stasis checkpoint create app /tmp/app.tar --stop --timeout 60\n  \
        stasis checkpoint create app /tmp/app.tar.zst --option compression=zstd --option tcp-established\n  \
        stasis checkpoint create app --image registry.local/app:frozen --push\n\n\
        With --timeout, the container runs again after so many seconds whatever happens.\n\n\
        Options, with their defaults:\n  leave-running=true        the container goes on running\n  \
        file-locks=true           keep file locks\n  tcp-established=false     keep established TCP connections\n  \
        tcp-close=false           close TCP connections in the checkpoint\n  \
        skip-in-flight=false      leave out connections that are not accepted yet\n  \
        link-remap=false          link deleted but open files back into their directories\n  \
        shell-job=false           allow a terminal or session from outside the container\n  \
        ext-unix-sk=false         allow unix sockets that lead outside the container\n  \
        ghost-limit=1048576       largest deleted but open file that is kept, in bytes\n  \
        ignore-mounts=            mounts left out of the dump, by path, with commas\n  \
        include-volumes=          mounts whose content goes into the archive, likewise\n  \
        include-dev-shm=true      the content of /dev/shm goes into the archive\n  \
        include-log=true          the container's log goes into the archive\n  \
        keep-criu-log=true        keep CRIU's log of a dump that failed\n  \
        compression=none          none, zstd or lz4\n  compression-level=-3      zstd's level, -7 to 19\n  \
        compression-threads=1     threads that compress, 0 to 16\n  \
        image=                    reference of an image to make beside the archive\n  \
        record-cgroups=false      record control groups of version 1, which other runtimes need\n  \
        profile=containerd        for whose readers the archive is: containerd or cri-o")]
    Create {
        /// Container
        container: String,
        /// Archive to write
        #[arg(value_hint = ValueHint::FilePath, required_unless_present = "image")]
        archive: Option<PathBuf>,
        /// Make an image of this name instead of an archive
        #[arg(long, value_name = "REFERENCE", conflicts_with = "archive")]
        image: Option<String>,
        /// Push the image to its registry
        #[arg(long, requires = "image")]
        push: bool,
        /// Put the base image's layers into the image, so that one pull brings all
        #[arg(long, requires = "image")]
        self_contained: bool,
        #[command(flatten)]
        credentials: Credentials,
        /// End the container once the archive is durable
        #[arg(long)]
        stop: bool,
        /// Option of the checkpoint; may be given more than once
        #[arg(long, value_name = "NAME[=VALUE]")]
        option: Vec<String>,
    },
    /// Show whether a container can be checkpointed now, and what stands in the way
    #[command(after_help = "Examples:\n  stasis checkpoint preflight app\n  \
        stasis checkpoint preflight app --option tcp-established --directory /var/lib/stasis/checkpoints -o json\n\n\
        The exit code is 1 if something would make the checkpoint fail.")]
    Preflight {
        /// Container
        container: String,
        /// Option of the checkpoint; may be given more than once
        #[arg(long, value_name = "NAME[=VALUE]")]
        option: Vec<String>,
        /// Directory whose free space is looked at
        #[arg(long, value_hint = ValueHint::DirPath)]
        directory: Option<PathBuf>,
    },
    /// List the checkpoints that this node made
    #[command(after_help = "Examples:\n  stasis checkpoint ls\n  stasis checkpoint ls -q")]
    Ls,
    /// Remove checkpoints: the archive or the image itself
    #[command(after_help = "Examples:\n  stasis checkpoint rm 3f2a\n  \
        stasis checkpoint rm /var/lib/stasis/checkpoints/app.tar registry.local/app:frozen")]
    Rm {
        /// Checkpoints by ID, path or image reference
        #[arg(required = true)]
        checkpoints: Vec<String>,
    },
    /// Remove all but the newest checkpoints
    #[command(after_help = "Examples:\n  stasis checkpoint prune\n  \
        stasis checkpoint prune --keep 3 --max-age 604800 --dry-run\n\n\
        Without --keep and --max-age the daemon's configuration decides. Pinned checkpoints stay.")]
    Prune {
        /// Newest checkpoints of each container that stay
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        keep: Option<u32>,
        /// Seconds after which a checkpoint goes
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
        max_age: Option<u64>,
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Keep a checkpoint from being pruned
    #[command(after_help = "Examples:\n  stasis checkpoint pin 3f2a\n  stasis checkpoint pin 3f2a --unpin")]
    Pin {
        /// Checkpoint by ID, path or image reference
        checkpoint: String,
        /// Let it be pruned again
        #[arg(long)]
        unpin: bool,
    },
    /// Make a local image of an archive
    #[command(after_help = "Examples:\n  stasis checkpoint to-image app.tar registry.local/app:frozen\n  \
        stasis push registry.local/app:frozen")]
    ToImage {
        /// Archive
        #[arg(value_hint = ValueHint::FilePath)]
        archive: PathBuf,
        /// Reference of the new image
        reference: String,
        /// Put the base image's layers into the image, so that one pull brings all
        #[arg(long)]
        self_contained: bool,
    },
    /// Show what an archive or a checkpoint image holds
    #[command(after_help = "Examples:\n  stasis checkpoint inspect app.tar\n  \
        stasis checkpoint inspect registry.local/app:frozen -o json\n\n\
        An archive that can be read here is read here, without the daemon.")]
    Inspect {
        /// Archive or image
        #[arg(value_name = "ARCHIVE|IMAGE", value_hint = ValueHint::FilePath)]
        source: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Debug {
    /// Print what the daemon holds: pods, containers, tasks, and the calls and operations that run, as JSON
    #[command(after_help = "Examples:\n  stasis debug dump\n  stasis debug dump | jq .calls")]
    Dump,
}

const RESTORE_EXAMPLES: &str = "\
Examples:
  stasis restore registry.local/app:frozen --pod web
  stasis restore /var/lib/stasis/checkpoints/app.tar --pod web --name app-2
  stasis restore app.tar --pod web --mount /srv/data:/data --mount /etc/app:/etc/app:ro

The daemon takes archives only from directories that its configuration names.
The mounts that the container had must be given again: they are the node's, not the archive's.";

#[derive(Args, Debug)]
pub(crate) struct Restore {
    /// Archive or checkpoint image
    #[arg(value_name = "ARCHIVE|IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) source: String,
    /// Pod to run it in
    #[arg(long)]
    pub(crate) pod: String,
    /// Name of the container, if not the one that it had
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Log file, relative to the pod's log directory (default: NAME.log)
    #[arg(long, value_name = "PATH")]
    pub(crate) log_path: Option<String>,
    /// Bind mount; may be given more than once
    #[arg(long, value_name = "HOST:CONTAINER[:ro]")]
    pub(crate) mount: Vec<String>,
    /// The container had a terminal
    #[arg(long)]
    pub(crate) tty: bool,
}
