//! Recipes: how a template is made of another, as people write it down (TOML) and as the API takes it (JSON).

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize};

use super::error::{Error, Kind, Result};
use super::guest::{check_env, check_path};
use super::records::check_name;
use crate::units::{parse_duration, parse_size_mib};

/// What a recipe starts from that starts from no template: the bare root file system.
pub const DEBIAN: &str = "debian";
/// Recipes that need no file.
const BUILT_IN: [(&str, &str); 3] = [
    ("base", include_str!("recipes/base.toml")),
    ("node", include_str!("recipes/node.toml")),
    ("nextjs", include_str!("recipes/nextjs.toml")),
];
/// Size of the disk of a template made of [`DEBIAN`], unless asked otherwise.
const DISK_MIB: u64 = 10 * 1_024;
/// How long a step may take, unless asked otherwise.
const STEP_TIMEOUT: Duration = Duration::from_secs(3_600);
const MAX_STEPS: usize = 200;

/// A recipe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the template, unless asked otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The template it starts from, or `debian`.
    pub from: String,
    /// Size of the disk, such as `10gb`: at least that of what it starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Debian packages to install, first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// Files to put in place, after the packages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<RecipeFile>,
    /// Environment of the commands, and of everything that is run in the template's sandboxes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Where commands are run, here and in the template's sandboxes. Made if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Commands to run, last, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub run: Vec<RunStep>,
    /// Processors of the build and of the template's sandboxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Memory of the build and of the template's sandboxes, such as `2gb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

/// A file to be put in place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeFile {
    /// Where, in the guest.
    pub path: String,
    /// Its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Its content, if that is no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_base64: Option<String>,
    /// The file next to the recipe that has its content. Only in files: the command line reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Its permissions in octal digits, such as `755`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// A command: a line of shell alone, or a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RunStep {
    /// A line of shell, or several.
    pub command: String,
    /// Who runs it, if not root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Where, if not in the recipe's directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Added to the recipe's environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How long it may take, such as `10m`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
}

impl<'de> Deserialize<'de> for RunStep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            command: String,
            #[serde(default)]
            user: Option<String>,
            #[serde(default)]
            workdir: Option<String>,
            #[serde(default)]
            env: BTreeMap<String, String>,
            #[serde(default)]
            timeout: Option<String>,
        }

        struct Either;
        impl<'de> serde::de::Visitor<'de> for Either {
            type Value = RunStep;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a command, or a table with one")
            }

            fn visit_str<E: serde::de::Error>(self, command: &str) -> std::result::Result<RunStep, E> {
                Ok(RunStep { command: command.to_owned(), ..RunStep::default() })
            }

            // Not untagged: that would hide which key is wrong.
            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> std::result::Result<RunStep, A::Error> {
                let Table { command, user, workdir, env, timeout } =
                    Table::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                Ok(RunStep { command, user, workdir, env, timeout })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// One step of a build. What it serializes to is what decides whether it was done before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Step {
    /// Install Debian packages.
    Packages(Vec<String>),
    /// Put files in place.
    Files(Vec<StepFile>),
    /// Run a command.
    Run(RunStep),
}

/// A file of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct StepFile {
    pub(super) path: String,
    pub(super) content: Vec<u8>,
    pub(super) mode: u32,
}

impl Step {
    /// What it does, in a few words.
    pub(super) fn title(&self) -> String {
        match self {
            Step::Packages(names) => format!("packages {}", shorten(&names.join(" "))),
            Step::Files(files) => {
                let paths: Vec<_> = files.iter().map(|f| f.path.as_str()).collect();
                format!("files {}", shorten(&paths.join(" ")))
            }
            Step::Run(run) => {
                let mut lines = run.command.lines().map(str::trim).filter(|l| !l.is_empty());
                format!("run {}", shorten(lines.next().unwrap_or_default()))
            }
        }
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 60;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    text.chars().take(MOST - 1).chain(['…']).collect()
}

impl RunStep {
    /// How long it may take.
    pub(super) fn limit(&self) -> Duration {
        self.timeout.as_deref().and_then(|t| parse_duration(t).ok()).filter(|t| !t.is_zero()).unwrap_or(STEP_TIMEOUT)
    }
}

impl Recipe {
    /// The recipe that comes with the program under this name.
    pub fn built_in(name: &str) -> Option<Recipe> {
        let (_, text) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name)?;
        // Parsed by a test of ours.
        toml::from_str(text).ok()
    }

    /// Names of the built-in recipes.
    pub fn built_in_names() -> Vec<&'static str> {
        BUILT_IN.iter().map(|(name, _)| *name).collect()
    }

    /// Reads a recipe as people write it.
    pub fn parse(text: &str) -> Result<Recipe> {
        toml::from_str(text).map_err(|e| {
            // With the line, and what would have been right.
            Error::invalid(format!("the recipe cannot be read: {}", e.to_string().trim_end()))
                .hint("keys: name, description, from, disk, packages, files, env, workdir, run, cpus, memory")
        })
    }

    /// Size of the disk, if it is not that of the template it starts from.
    pub(super) fn disk_mib(&self) -> Result<Option<u64>> {
        let disk = size("disk", self.disk.as_deref())?;
        Ok(disk.or_else(|| (self.from == DEBIAN).then_some(DISK_MIB)))
    }

    /// Memory of the build and of the template's sandboxes, in MiB.
    pub(super) fn memory_mib(&self) -> Result<Option<u64>> {
        size("memory", self.memory.as_deref())
    }

    /// Looks whether everything can be what it is meant to be.
    pub fn check(&self) -> Result<()> {
        self.steps().map(drop)
    }

    /// The steps of a build, if everything can be what it is meant to be.
    pub(super) fn steps(&self) -> Result<Vec<Step>> {
        self.checked_steps().map_err(|error| match error.hint_text() {
            Some(_) => error,
            None => error.hint("change that in the recipe, and build again"),
        })
    }

    fn checked_steps(&self) -> Result<Vec<Step>> {
        if self.from.is_empty() {
            return Err(Error::invalid("the recipe does not say what it starts from").hint("from = \"base\""));
        }
        check_name("template", &self.from)?;
        check_env(&self.env)?;
        if let Some(mib) = self.disk_mib()?
            && !(1 << 10..=64 << 20).contains(&mib)
        {
            return Err(Error::invalid(format!("a template's disk has 1 GiB to 64 TiB, not {mib} MiB")));
        }
        if let Some(mib) = self.memory_mib()?
            && !(128..=1 << 20).contains(&mib)
        {
            return Err(Error::invalid(format!("memory is 128 MiB to 1 TiB, not {mib} MiB")));
        }
        if self.cpus.is_some_and(|cpus| !(1..=64).contains(&cpus)) {
            return Err(Error::invalid("cpus are 1 to 64"));
        }
        self.workdir.as_deref().map(check_path).transpose()?;
        let mut steps = Vec::new();
        if !self.packages.is_empty() {
            self.packages.iter().try_for_each(|name| check_package(name))?;
            steps.push(Step::Packages(self.packages.clone()));
        }
        if !self.files.is_empty() {
            steps.push(Step::Files(self.files.iter().map(step_file).collect::<Result<_>>()?));
        }
        for run in &self.run {
            check_run(run)?;
            steps.push(Step::Run(run.clone()));
        }
        if steps.len() > MAX_STEPS {
            return Err(Error::invalid(format!("a recipe has at most {MAX_STEPS} commands")));
        }
        Ok(steps)
    }
}

fn size(what: &str, text: Option<&str>) -> Result<Option<u64>> {
    text.map(|text| parse_size_mib(text).map_err(|e| Error::invalid(format!("{what}: {e}")))).transpose()
}

/// A package's name, which must not be taken for an option.
fn check_package(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "+-.:=~/_".contains(c);
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 200 && name.chars().all(good) {
        return Ok(());
    }
    Err(Error::invalid(format!("{name:?} is not a Debian package's name")))
}

fn check_run(run: &RunStep) -> Result<()> {
    if run.command.trim().is_empty() || run.command.contains('\0') {
        return Err(Error::invalid("a command of the recipe is empty, or has a NUL byte"));
    }
    check_env(&run.env)?;
    run.workdir.as_deref().map(check_path).transpose()?;
    if let Some(text) = &run.timeout {
        parse_duration(text).map_err(|e| Error::invalid(format!("timeout: {e}")))?;
    }
    Ok(())
}

fn step_file(file: &RecipeFile) -> Result<StepFile> {
    let path = check_path(&file.path)?;
    let about = |message: &str| Error::invalid(format!("the recipe's file {path}: {message}"));
    if path.ends_with('/') {
        return Err(about("it names a directory"));
    }
    let content = match (&file.content, &file.content_base64, &file.source) {
        // TOML's long strings begin on the line after their quotes, and people end them on one of their own.
        (Some(text), None, None) => text.clone().into_bytes(),
        (None, Some(encoded), None) => {
            BASE64.decode(encoded).map_err(|e| about(&format!("content_base64 is not base64: {e}")))?
        }
        (None, None, Some(_)) => {
            return Err(about("source is a file next to the recipe, which the command line reads")
                .hint("send its content, or use: miosa template build NAME --file RECIPE"));
        }
        _ => return Err(about("give one of content, content_base64 and source")),
    };
    let mode = match &file.mode {
        None => 0o644,
        Some(octal) => u32::from_str_radix(octal, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| about(&format!("{octal:?} is not a file mode; write octal digits, such as \"755\"")))?,
    };
    Ok(StepFile { path, content, mode })
}

/// That there is neither a template nor a recipe of this name.
pub(super) fn unknown(name: &str) -> Error {
    Error::new(Kind::TemplateNotFound, format!("there is no template {name:?}, and no recipe comes with that name"))
        .hint(format!(
            "built-in recipes: {}; for your own: miosa template build NAME --file RECIPE",
            Recipe::built_in_names().join(", ")
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_recipes_can_be_built() {
        for (name, text) in BUILT_IN {
            let recipe = Recipe::parse(text).unwrap();
            recipe.check().unwrap();
            assert!(recipe.from == DEBIAN || Recipe::built_in(&recipe.from).is_some(), "{name}");
        }
    }

    #[test]
    fn commands_are_lines_or_tables() {
        let recipe = Recipe::parse(
            "from = \"base\"\nrun = [\"true\", { command = \"id\", user = \"sandbox\", timeout = \"5m\" }]\n",
        )
        .unwrap();
        let [Step::Run(first), Step::Run(second)] = &recipe.steps().unwrap()[..] else { panic!("not two commands") };
        assert_eq!((first.command.as_str(), first.limit()), ("true", STEP_TIMEOUT));
        assert_eq!((second.user.as_deref(), second.limit()), (Some("sandbox"), Duration::from_secs(300)));
        let json = serde_json::to_value(&recipe).unwrap();
        assert_eq!(serde_json::from_value::<Recipe>(json).unwrap(), recipe);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("from = \"base\"\npackagse = []", "packagse"),
            ("from = \"base\"\nrun = [{ comand = \"x\" }]", "comand"),
            ("from = \"base\"\n[[files]]\npath = \"/x\"\nmodes = \"1\"", "modes"),
            ("packages = []", "from"),
            ("from = 3", "string"),
        ] {
            let error = Recipe::parse(text).unwrap_err();
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
        for (text, word) in [
            ("from = \"base\"\ndisk = \"many\"", "disk"),
            ("from = \"debian\"\ndisk = \"1mb\"", "1 GiB"),
            ("from = \"debian\"\ndisk = \"many\"", "disk"),
            ("from = \"base\"\npackages = [\"--force\"]", "--force"),
            ("from = \"base\"\nworkdir = \"here\"", "here"),
            ("from = \"base\"\nrun = [\" \"]", "empty"),
            ("from = \"base\"\n[[files]]\npath = \"/x\"", "content"),
            ("from = \"base\"\n[[files]]\npath = \"/x\"\ncontent = \"\"\nmode = \"888\"", "888"),
            ("from = \"base\"\nmemory = \"1mb\"", "128 MiB"),
        ] {
            let error = Recipe::parse(text).unwrap().check().unwrap_err();
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
    }
}
