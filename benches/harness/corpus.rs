//! Disk images made of Debian packages: a base, and forks that live on as disks do, each a raw file changed in place.
//!
//! They are made once, as root, through a loop mount on the host, and kept in the cache directory; remove
//! `corpus/` there to have them made again. Package versions are those of the host's Debian release at that time; they
//! are written to `corpus/packages`.

use super::tools::{self, Mount};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Size of every disk.
pub const SIZE: u64 = 4 << 30;
const BLOCK: usize = 4096;

/// Compilers, Node.js and scientific Python: some 400 MB.
const TOOLS: &[&str] = &[
    "binutils-x86-64-linux-gnu",
    "cpp-12",
    "gcc-12",
    "g++-12",
    "libgcc-12-dev",
    "libstdc++-12-dev",
    "libc6-dev",
    "linux-libc-dev",
    "libasan8",
    "libtsan2",
    "libnode108",
    "libnode-dev",
    "libicu72",
    "python3-numpy",
    "python3-scipy",
    "python3-pandas-lib",
    "python3-pandas",
    "libopenblas0-pthread",
];
/// Something else: Go and its library.
const OTHER: &[&str] = &["golang-1.19-go", "golang-1.19-src", "ruby3.1", "libruby3.1"];

/// A state of a disk.
pub struct Step {
    /// Short name.
    pub name: &'static str,
    /// What it is.
    pub what: &'static str,
    /// The step it is a fork of.
    pub parent: Option<&'static str>,
    /// Its raw image.
    pub image: PathBuf,
}

type Change = fn(&Path, &Path) -> Result<(), String>;

const STEPS: &[(&str, &str, Option<&str>, Change)] = &[
    ("A", "base", None, |_, _| Ok(())),
    ("B", "A + tools", Some("A"), |debs, root| install(debs, root, TOOLS.iter())),
    ("C", "B, tools removed, re-installed", Some("B"), |debs, root| {
        remove(debs, root, TOOLS)?;
        tools::run("sync", &[&"-f", &root])?;
        install(debs, root, TOOLS.iter())
    }),
    // In another order, so that the same files end up elsewhere.
    ("D", "A + tools, a sibling of B", Some("A"), |debs, root| install(debs, root, TOOLS.iter().rev())),
    ("E", "B, files edited", Some("B"), |_, root| edit(root)),
    ("F0", "B + a database", Some("B"), |_, root| make_database(root)),
    ("F", "F0, rows at random rewritten", Some("F0"), |_, root| update_database(root)),
    ("G", "B + other packages", Some("B"), |debs, root| install(debs, root, OTHER.iter())),
];

/// The steps, made if they are not there.
///
/// # Errors
/// What is missing.
pub fn corpus() -> Result<Vec<Step>, String> {
    let dir = super::cache_dir().join("corpus");
    let debs = dir.join("debs");
    std::fs::create_dir_all(&debs).map_err(|e| e.to_string())?;
    let at = |name: &str| dir.join(format!("{name}.raw"));
    for (name, what, parent, change) in STEPS {
        let image = at(name);
        if image.is_file() {
            continue;
        }
        eprintln!("making the corpus: {name} ({what})");
        let Some(parent) = parent else {
            vmm::image::build_base_rootfs(&dir, &image, SIZE, |_| {}).map_err(|e| e.to_string())?;
            continue;
        };
        download(&dir, &debs)?;
        let unfinished = dir.join(format!("{name}.unfinished"));
        tools::run("cp", &[&"--sparse=auto", &at(parent), &unfinished])?;
        let mount = Mount::image(&unfinished, "noatime")?;
        change(&debs, mount.path())?;
        drop(mount);
        std::fs::rename(&unfinished, &image).map_err(|e| e.to_string())?;
    }
    Ok(STEPS.iter().map(|(name, what, parent, _)| Step { name, what, parent: *parent, image: at(name) }).collect())
}

fn download(dir: &Path, debs: &Path) -> Result<(), String> {
    let list = dir.join("packages");
    if list.is_file() {
        return Ok(());
    }
    for package in TOOLS.iter().chain(OTHER) {
        tools::run_in(debs, "apt-get", &[&"download", &"-q", package])?;
    }
    let names = tools::run("ls", &[&debs])?;
    std::fs::write(list, names).map_err(|e| e.to_string())
}

fn deb(debs: &Path, package: &str) -> Result<PathBuf, String> {
    let entries = std::fs::read_dir(debs).map_err(|e| e.to_string())?.flatten();
    let prefix = format!("{package}_");
    let found =
        entries.map(|e| e.path()).find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)));
    found.ok_or_else(|| format!("{package} has not been downloaded"))
}

fn shell(script: &str, args: &[&Path]) -> Result<(), String> {
    let mut command = std::process::Command::new("bash");
    tools::finish(command.args(["-euo", "pipefail", "-c", script, "-"]).args(args)).map(drop)
}

fn install<'a>(debs: &Path, root: &Path, packages: impl Iterator<Item = &'a &'a str>) -> Result<(), String> {
    for package in packages {
        // As dpkg does it: a symbolic link to a directory, such as /lib, is kept.
        let script = "dpkg-deb --fsys-tarfile \"$1\" | tar -x --keep-directory-symlink -C \"$2\"";
        shell(script, &[&deb(debs, package)?, root])?;
    }
    Ok(())
}

fn remove(debs: &Path, root: &Path, packages: &[&str]) -> Result<(), String> {
    for package in packages {
        let script = "dpkg-deb --fsys-tarfile \"$1\" | tar -t | grep -v '/$' | (cd \"$2\" && xargs -d '\\n' rm -f)";
        shell(script, &[&deb(debs, package)?, root])?;
    }
    Ok(())
}

/// A line more at the top of every 20th source file, written as editors do: a new file, then a rename.
fn edit(root: &Path) -> Result<(), String> {
    let script = "cd \"$1\"; find usr -type f '(' -name '*.py' -o -name '*.h' ')' | LC_ALL=C sort | awk 'NR % 20 == 0' \
        | while IFS= read -r f; do { echo '# edited'; cat \"$f\"; } > \"$f.new\"; mv \"$f.new\" \"$f\"; done";
    shell(script, &[root])
}

/// 64 MiB of rows that look like an application's.
fn make_database(root: &Path) -> Result<(), String> {
    let script = "mkdir -p \"$1/workspace\"; sqlite3 \"$1/workspace/app.db\" \"\
        create table events(id integer primary key, at text, who text, what text); \
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 600000) \
        insert into events select i, datetime(1700000000 + i * 37, 'unixepoch'), \
            printf('user-%06d', (i * 2654435761) % 100003), \
            printf('request %x took %d us', (i * 6364136223846793005) & 0xffffffffffff, (i * 48271) % 99991) from n;\"";
    shell(script, &[root])
}

/// One row in 300 is rewritten, all over the file.
fn update_database(root: &Path) -> Result<(), String> {
    let script = "sqlite3 \"$1/workspace/app.db\" \"update events set what = printf('rewritten %x', id * 2246822519) \
        where (id * 2654435761) % 300 = 7;\"";
    shell(script, &[root])
}

/// Runs of blocks in which an image differs from its parent's, or from zeroes: offset and length. `visit` gets the bytes.
pub fn changes(image: &Path, parent: Option<&Path>, mut visit: impl FnMut(u64, &[u8])) {
    let new = File::open(image).expect("a corpus image");
    let old = parent.map(|path| File::open(path).expect("a corpus image"));
    const CHUNK: usize = 1 << 20;
    let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < SIZE {
        // Jump over what is a hole in both.
        let next = old.as_ref().map_or(SIZE, |f| data_from(f, at)).min(data_from(&new, at));
        at = next / CHUNK as u64 * CHUNK as u64;
        if at >= SIZE {
            break;
        }
        new.read_exact_at(&mut a, at).expect("a corpus image can be read");
        if let Some(old) = &old {
            old.read_exact_at(&mut b, at).expect("a corpus image can be read");
        }
        let differs = |i: usize| a[i * BLOCK..(i + 1) * BLOCK] != b[i * BLOCK..(i + 1) * BLOCK];
        let mut i = 0;
        while i < CHUNK / BLOCK {
            let from = i;
            while i < CHUNK / BLOCK && differs(i) {
                i += 1;
            }
            if i > from {
                visit(at + (from * BLOCK) as u64, &a[from * BLOCK..i * BLOCK]);
            }
            i += 1;
        }
        at += CHUNK as u64;
    }
}

/// Where the next data begins, or `SIZE`.
fn data_from(file: &File, at: u64) -> u64 {
    let seek = nix::unistd::Whence::SeekData;
    // Nothing but holes is ENXIO.
    nix::unistd::lseek(file, at as i64, seek).map_or(SIZE, |found| found as u64)
}
