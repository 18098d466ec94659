//! Building a template by a recipe.
//!
//! Commands of a recipe are not trusted: they run in a sandbox on a fork of the template that the recipe starts from,
//! and the host sees of them only their output. After each step the sandbox's state is kept under a digest of all that
//! led to it, so that the next build of the same steps begins after them. The sandbox is not persistent: whatever ends
//! the build ends it, too.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use storage::{SnapshotId, Source, Store};
use vmm::image::ImageConfig;

use super::{BuildRequest, ImageSource, Progress, import, put_template, registered};
use crate::engine::error::{Error, Kind, Result};
use crate::engine::lifecycle::Request;
use crate::engine::recipe::{self, DEBIAN, Recipe, RunStep, Step, StepFile};
use crate::engine::records::{Consistency, NetworkPolicy, Record, StepRecord, TemplateRecord, load_all, new_id, slug};
use crate::engine::{BuildState, CreateRequest, Engine, ExecEvent, ExecSpec, Origin, Shared};

/// Processors and memory of a build whose recipe does not say.
const CPUS: u32 = 2;
const MEMORY_MIB: u64 = 2_048;
/// States of steps that are kept, of all templates; the oldest go first.
const MAX_KEPT: usize = 256;
/// Lines of a step's output that its failure quotes.
const QUOTED_LINES: usize = 12;
/// A line of output longer than this is cut.
const MAX_LINE: usize = 2_000;
/// Recipes larger than this are not kept with their template.
const MAX_KEPT_RECIPE: usize = 256 << 10;

/// Installs the packages that are its arguments, and leaves no lists behind.
const INSTALL: &str = "\
apt-get -q -o Acquire::Languages=none update
apt-get -q install -y --no-install-recommends -- \"$@\"
apt-get -q clean
rm -rf /var/lib/apt/lists/*";

/// Where a build is: a state, and the digest of all that led to it.
struct Position {
    digest: String,
    state: BuildState,
}

impl Position {
    fn after(self, snapshot: SnapshotId, disk_size_bytes: u64, digest: String) -> Self {
        Self { digest, state: BuildState { snapshot, disk_size_bytes, ..self.state } }
    }
}

/// Size of the disk of a recipe's template, which starts from a disk of `from` bytes.
fn enlarged(recipe: &Recipe, from: u64) -> Result<u64> {
    let Some(mib) = recipe.disk_mib()? else { return Ok(from) };
    if mib << 20 < from {
        let message =
            format!("the recipe's disk has {mib} MiB, and what it starts from has {} MiB already", from >> 20);
        return Err(Error::invalid(message).hint("leave it out, or ask for a larger one"));
    }
    Ok(mib << 20)
}

pub(super) async fn run(
    engine: &Arc<Engine>,
    name: &str,
    recipe: Recipe,
    no_cache: bool,
    progress: &Progress,
) -> Result<TemplateRecord> {
    let steps = recipe.steps()?;
    if recipe.from == name {
        return Err(Error::invalid(format!("template {name:?} cannot start from itself")).hint("choose another name"));
    }
    let mut position = beginning(engine, name, &recipe, progress).await?;
    // The first step's sandbox has it, and with it all states from there on.
    let disk_size_bytes = enlarged(&recipe, position.state.disk_size_bytes)?;
    let mut used = vec![position.digest.clone()];
    let mut bench: Option<Bench> = None;
    let mut failed = None;
    for (index, step) in steps.iter().enumerate() {
        let digest = follow(&position.digest, &recipe, step);
        used.push(digest.clone());
        let title = format!("step {} of {}: {}", index + 1, steps.len(), step.title());
        if bench.is_none()
            && !no_cache
            && let Some(done) = kept(engine, &digest)
        {
            progress(format!("{title} (done before)"));
            position = position.after(done.snapshot, disk_size_bytes, digest);
            continue;
        }
        progress(title);
        let done = async {
            let bench = match &bench {
                Some(bench) => bench,
                None => bench
                    .insert(Bench::set_up(engine, name, &recipe, &position.state, disk_size_bytes, progress).await?),
            };
            bench.carry_out(step, progress).await?;
            bench.keep(name, &digest).await
        };
        match done.await {
            Ok(snapshot) => position = position.after(snapshot, disk_size_bytes, digest),
            Err(error) => {
                let message = format!("step {} of {} ({}) failed: {error}", index + 1, steps.len(), step.title());
                // What went wrong here, and not in the recipe, stays what it is.
                let kind = if error.kind().status() < 500 { Kind::BuildFailed } else { error.kind() };
                let hint = error.hint_text().unwrap_or("mend the recipe and build again: the steps before are kept");
                failed = Some(Error::new(kind, message).hint(hint));
                break;
            }
        }
    }
    if let Some(bench) = bench {
        bench.take_down().await;
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let record = register(&engine.shared, name, recipe, position.state, disk_size_bytes, progress).await?;
    forget_others(&engine.shared, name, used).await;
    engine.shared.want_seal();
    Ok(record)
}

/// What the recipe starts from; a built-in template that is missing is built.
async fn beginning(engine: &Arc<Engine>, name: &str, recipe: &Recipe, progress: &Progress) -> Result<Position> {
    let shared = &engine.shared;
    if recipe.from == DEBIAN {
        return bare(shared, name, recipe, progress).await;
    }
    let parent = match shared.registry.template(&recipe.from) {
        Ok(parent) => parent,
        Err(_) => {
            let built_in = Recipe::built_in(&recipe.from).ok_or_else(|| recipe::unknown(&recipe.from))?;
            progress(format!("template {} is missing; building it first", recipe.from));
            let source = ImageSource::Recipe(Box::new(built_in));
            let request = BuildRequest { name: recipe.from.clone(), source, no_cache: false };
            let build = engine.begin_build(&request)?;
            engine.clone().run_build(build, request, progress.clone()).await?
        }
    };
    let digest = match recipe.disk_mib()? {
        None => digest(&["template", &parent.snapshot.to_string()]),
        Some(mib) => digest(&["template", &parent.snapshot.to_string(), &format!("disk {mib}")]),
    };
    let state = BuildState { snapshot: parent.snapshot, disk_size_bytes: parent.disk_size_bytes, image: parent.image };
    Ok(Position { digest, state })
}

/// The bare root file system, imported once a size.
async fn bare(shared: &Arc<Shared>, name: &str, recipe: &Recipe, progress: &Progress) -> Result<Position> {
    let disk_size_bytes = recipe.disk_mib()?.unwrap_or(0) << 20;
    let (path, origin) = shared.templates.build_base(disk_size_bytes, progress.clone()).await?;
    let image = vmm::image::ReadyImage::whole(path, origin)?;
    let changed = image.path.metadata().and_then(|m| m.modified()).ok();
    let digest = digest(&["image", &image.path.to_string_lossy(), &format!("{changed:?} {}", image.len)]);
    let state = |snapshot| BuildState { snapshot, disk_size_bytes, image: ImageConfig::default() };
    let (key, template, told) = (digest.clone(), name.to_owned(), progress.clone());
    let snapshot = shared
        .with_store(move |store| {
            if let Some(done) = find_kept(store, &key) {
                return Ok(done.snapshot);
            }
            import(store, &image, image.len.max(disk_size_bytes), &told, |tx, snapshot, _| {
                let record = StepRecord { digest: key, template, snapshot, created_at: Timestamp::now() };
                tx.put_record(StepRecord::KIND, &record.digest, record.encode()?);
                Ok(snapshot)
            })
        })
        .await?;
    Ok(Position { digest, state: state(snapshot) })
}

/// Makes the template of a state: a copy of it that costs nothing. One that is this already stays as it is.
async fn register(
    shared: &Arc<Shared>,
    name: &str,
    recipe: Recipe,
    state: BuildState,
    disk_size_bytes: u64,
    progress: &Progress,
) -> Result<TemplateRecord> {
    let mut image = state.image;
    image.env.extend(recipe.env.clone());
    image.workdir = recipe.workdir.clone().or(image.workdir);
    let origin = recipe.description.clone().unwrap_or_else(|| format!("recipe from {}", recipe.from));
    let small = serde_json::to_vec(&recipe).is_ok_and(|text| text.len() <= MAX_KEPT_RECIPE);
    let old = shared.registry.template(name).ok();
    let mut record = TemplateRecord {
        name: name.to_owned(),
        snapshot: state.snapshot,
        disk_size_bytes,
        data_bytes: 0,
        origin,
        created_at: Timestamp::now(),
        image,
        cpus: recipe.cpus,
        memory_mib: recipe.memory_mib()?,
        recipe: small.then_some(recipe),
        built_on: Some(state.snapshot),
    };
    if let Some(old) = &old {
        let TemplateRecord { snapshot, data_bytes, created_at, .. } = *old;
        if *old == (TemplateRecord { snapshot, data_bytes, created_at, ..record.clone() }) {
            progress("the template is up to date".to_owned());
            return Ok(old.clone());
        }
    }
    progress("registering the template".to_owned());
    let replaced = old.as_ref().map(|old| old.snapshot);
    let record = shared
        .with_store(move |store| {
            record.data_bytes = store.logical_bytes(Source::Snapshot(state.snapshot))?;
            let mut tx = store.begin();
            let (from, copy) = (Source::Snapshot(state.snapshot), new_id("import"));
            let disk = match disk_size_bytes > state.disk_size_bytes {
                // No step has made it larger.
                true => tx.fork_larger(from, &copy, disk_size_bytes),
                false => tx.fork(from, &copy),
            };
            record.snapshot = tx.snapshot(disk, &new_id("template"));
            tx.delete_disk(disk);
            put_template(&mut tx, &record, old.as_ref())?;
            tx.commit_durable()?;
            Ok(record)
        })
        .await?;
    registered(shared, &record, replaced).await;
    Ok(record)
}

fn digest(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"miosa template 1\n");
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The digest after a step.
fn follow(before: &str, recipe: &Recipe, step: &Step) -> String {
    let surroundings = (&recipe.env, &recipe.workdir);
    // What a step is made of can always be written as JSON; were it not so, it would be carried out.
    let text = serde_json::to_string(&(step, surroundings)).unwrap_or_else(|_| new_id("step"));
    digest(&["step", before, &text])
}

fn find_kept(store: &Store, digest: &str) -> Option<StepRecord> {
    serde_json::from_slice(&store.record(StepRecord::KIND, digest)?).ok()
}

fn kept(engine: &Engine, digest: &str) -> Option<StepRecord> {
    find_kept(&engine.shared.store, digest)
}

/// Gives up the states of steps that this template was built by earlier, and the oldest of all beyond a bound.
async fn forget_others(shared: &Arc<Shared>, template: &str, used: Vec<String>) {
    let template = template.to_owned();
    let forgotten = shared.with_store(move |store| {
        let mut steps: Vec<StepRecord> = load_all(store)?;
        steps.sort_by_key(|step| step.created_at);
        let too_many = steps.len().saturating_sub(MAX_KEPT);
        let mut tx = store.begin();
        let mut changed = false;
        for (index, step) in steps.iter().enumerate() {
            if !used.contains(&step.digest) && (step.template == template || index < too_many) {
                tx.delete_snapshot(step.snapshot);
                tx.delete_record(StepRecord::KIND, &step.digest);
                changed = true;
            }
        }
        if changed {
            tx.commit_durable()?;
        }
        Ok(())
    });
    if let Err(error) = forgotten.await {
        tracing::warn!(%error, "states of earlier builds stay until the next build");
    }
}

/// The sandbox that steps are carried out in.
struct Bench {
    engine: Arc<Engine>,
    sandbox: String,
    workdir: Option<String>,
}

impl Bench {
    async fn set_up(
        engine: &Arc<Engine>,
        name: &str,
        recipe: &Recipe,
        state: &BuildState,
        disk_size_bytes: u64,
        progress: &Progress,
    ) -> Result<Bench> {
        progress("starting a sandbox to build in".to_owned());
        let (id, mut short) = (new_id("build"), slug(name));
        short.truncate(32);
        let request = CreateRequest {
            origin: Origin::Build(state.clone()),
            name: Some(format!("{short}-{id}")),
            cpus: recipe.cpus.unwrap_or(CPUS),
            memory_mib: recipe.memory_mib()?.unwrap_or(MEMORY_MIB),
            disk_mib: Some(disk_size_bytes >> 20),
            timeout: None,
            idle_timeout: None,
            persistent: false,
            env: recipe.env.clone(),
            network_policy: NetworkPolicy::Allow,
            dedup_domain: None,
            metadata: serde_json::Map::new(),
            tags: vec![super::BENCH_TAG.to_owned()],
            volumes: Vec::new(),
            publish_ports: Vec::new(),
            without_memory: false,
            start: true,
            wait: false,
        };
        let view = engine.create(request).await?;
        let bench = Bench { engine: engine.clone(), sandbox: view.record.id, workdir: recipe.workdir.clone() };
        let ready = async {
            engine.resume(&bench.sandbox).await?;
            if let Some(dir) = &bench.workdir {
                let argv = vec!["mkdir".to_owned(), "-p".to_owned(), dir.clone()];
                let spec = ExecSpec { argv, cwd: Some("/".to_owned()), ..ExecSpec::default() };
                bench.exec(spec, progress).await?;
            }
            Ok(())
        };
        match ready.await {
            Ok(()) => Ok(bench),
            Err(error) => {
                bench.take_down().await;
                Err(error)
            }
        }
    }

    async fn carry_out(&self, step: &Step, progress: &Progress) -> Result<()> {
        match step {
            Step::Packages(names) => {
                let mut argv: Vec<String> = ["sh", "-ec", INSTALL, "sh"].map(str::to_owned).to_vec();
                argv.extend(names.iter().cloned());
                let env = BTreeMap::from([("DEBIAN_FRONTEND".to_owned(), "noninteractive".to_owned())]);
                let spec = ExecSpec { argv, env, cwd: Some("/".to_owned()), ..ExecSpec::default() };
                self.exec(spec, progress).await
            }
            Step::Files(files) => {
                for file in files {
                    self.put(file).await?;
                }
                Ok(())
            }
            Step::Run(run) => self.exec(self.spec(run), progress).await,
        }
    }

    fn spec(&self, run: &RunStep) -> ExecSpec {
        ExecSpec {
            argv: vec!["sh".to_owned(), "-ec".to_owned(), run.command.clone()],
            env: run.env.clone(),
            cwd: run.workdir.clone().or_else(|| self.workdir.clone()),
            user: run.user.clone(),
            timeout: Some(run.limit()),
            stdin: false,
            tty: None,
        }
    }

    async fn put(&self, file: &StepFile) -> Result<()> {
        let mut writer = self.engine.write_file(&self.sandbox, &file.path, Some(file.mode)).await?;
        writer.write(&file.content).await?;
        writer.finish().await
    }

    /// Runs a program to its end, and tells its output line by line.
    async fn exec(&self, spec: ExecSpec, progress: &Progress) -> Result<()> {
        let limit = spec.timeout;
        let mut exec = self.engine.exec(&self.sandbox, spec).await?;
        let mut output = Output { progress: progress.clone(), pending: Vec::new(), last: VecDeque::new() };
        loop {
            match exec.next_event().await? {
                Some(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => output.add(&bytes),
                Some(ExecEvent::Exit { code: Some(0), .. }) => {
                    output.end_line();
                    return Ok(());
                }
                Some(ExecEvent::Exit { code, signal, timed_out }) => {
                    output.end_line();
                    return Err(output.failure(code, signal, limit.filter(|_| timed_out)));
                }
                None => return Err(Error::new(Kind::SessionEnded, "the command's end was not seen")),
            }
        }
    }

    /// Keeps the present state, which must be all that was written.
    async fn keep(&self, template: &str, digest: &str) -> Result<SnapshotId> {
        let sandbox = self.engine.find(&self.sandbox)?;
        let mut owner = sandbox.own().await;
        let disk = sandbox.record().disk;
        let (template, digest) = (template.to_owned(), digest.to_owned());
        let key = digest.clone();
        let keep = move |store: &Store, _| {
            let mut tx = store.begin();
            if let Some(old) = find_kept(store, &digest) {
                tx.delete_snapshot(old.snapshot);
            }
            let snapshot = tx.snapshot(disk, &new_id("template"));
            let record = StepRecord { digest, template, snapshot, created_at: Timestamp::now() };
            tx.put_record(StepRecord::KIND, &record.digest, record.encode()?);
            tx.commit_durable()?;
            Ok(snapshot)
        };
        let (snapshot, consistency) = sandbox.at_one_point(&mut owner, Request::Snapshot, keep, |_, _| Ok(())).await?;
        if consistency == Consistency::Filesystem {
            return Ok(snapshot);
        }
        drop(owner);
        self.engine
            .shared
            .transact(move |tx| {
                tx.delete_snapshot(snapshot);
                tx.delete_record(StepRecord::KIND, &key);
                Ok(())
            })
            .await?;
        Err(Error::new(Kind::AgentTimeout, "the guest's file system could not be frozen, so its state is not certain")
            .hint("build again; the steps before are kept"))
    }

    async fn take_down(self) {
        if let Err(error) = self.engine.destroy(&self.sandbox).await
            && error.kind() != Kind::SandboxDestroyed
        {
            tracing::warn!(sandbox = %self.sandbox, %error, "the sandbox of a build stays until the next start");
        }
    }
}

/// A program's output, told as it comes.
struct Output {
    progress: Progress,
    pending: Vec<u8>,
    last: VecDeque<String>,
}

impl Output {
    fn add(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|b| *b == b'\n' || *b == b'\r') {
            self.pending.extend_from_slice(piece);
            if matches!(piece.last(), Some(b'\n' | b'\r')) || self.pending.len() >= MAX_LINE {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let bytes = std::mem::take(&mut self.pending);
        // A guest chooses this text: nothing in it may move the cursor of a terminal.
        let line: String = String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect();
        if line.trim().is_empty() {
            return;
        }
        if self.last.len() >= QUOTED_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line.clone());
        (self.progress)(format!("  {line}"));
    }

    fn failure(self, code: Option<i32>, signal: Option<i32>, limit: Option<Duration>) -> Error {
        let how = match (limit, code, signal) {
            (Some(limit), ..) => format!("it took longer than {} s", limit.as_secs()),
            (None, Some(code), _) => format!("exit code {code}"),
            (None, None, signal) => format!("ended by signal {}", signal.unwrap_or(0)),
        };
        let said = self.last.into_iter().collect::<Vec<_>>().join(" | ");
        let message = if said.is_empty() { how } else { format!("{how}; it said last: {said}") };
        Error::new(Kind::BuildFailed, message)
    }
}
