//! An example in every command's help, and what is made of the grammar: completions and manual pages.

use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::args::Cli;
use super::output::{Failure, Result};

/// A command, and how it is used.
const EXAMPLES: &[(&str, &str)] = &[
    ("daemon", "miosa daemon --listen 127.0.0.1:7070\nmiosa daemon --print-config"),
    ("doctor", "miosa doctor\nmiosa doctor --fix"),
    ("completion", "miosa completion bash > /etc/bash_completion.d/miosa\nmiosa completion zsh > ~/.zfunc/_miosa"),
    ("man", "miosa man /usr/local/share/man/man1"),
    ("sandbox", "miosa sandbox create --template base --name web --wait\nmiosa sandbox exec web -- ls /"),
    (
        "sandbox create",
        "miosa sandbox create --template base --name web --size small --timeout 1h --wait\nmiosa sandbox create --name db --volume data:/var/lib/db",
    ),
    ("sandbox list", "miosa sandbox list --state paused --tag ci"),
    ("sandbox show", "miosa sandbox show web --json"),
    (
        "sandbox write-file",
        "miosa sandbox write-file web /workspace/app.js ./app.js\necho hi | miosa sandbox write-file web /tmp/hi -",
    ),
    (
        "sandbox read-file",
        "miosa sandbox read-file web /etc/hostname\nmiosa sandbox read-file web /var/log/app.log --output app.log",
    ),
    (
        "sandbox exec",
        "miosa sandbox exec web -- sh -lc \"npm install\"\nmiosa sandbox exec web --cwd /workspace --env CI=1 -- npm test\nmiosa sandbox exec web --detached -- sh -lc \"npm run dev\"\nmiosa sandbox exec --tty --interactive web -- python3",
    ),
    ("sandbox shell", "miosa sandbox shell web\nmiosa sandbox shell web --user nobody --cwd /tmp"),
    ("sandbox command", "miosa sandbox command list web"),
    ("sandbox command list", "miosa sandbox command list web"),
    ("sandbox command get", "miosa sandbox command get web cmd-0123456789ab"),
    ("sandbox command logs", "miosa sandbox command logs web cmd-0123456789ab --follow"),
    ("sandbox command kill", "miosa sandbox command kill web cmd-0123456789ab --signal INT"),
    ("sandbox cp", "miosa sandbox cp ./app.js web:/workspace/app.js\nmiosa sandbox cp -r web:/workspace ./workspace"),
    ("sandbox upload", "miosa sandbox upload web ./app.js /workspace/app.js"),
    ("sandbox upload-dir", "miosa sandbox upload-dir web ./site /workspace/site --delete"),
    ("sandbox download", "miosa sandbox download web /workspace/app.js --output ./app.js"),
    ("sandbox wait", "miosa sandbox wait web --port 3000"),
    ("sandbox port-forward", "miosa sandbox port-forward web --remote 3000 --local 8080"),
    (
        "sandbox preview",
        "miosa sandbox preview web --port 3000\nmiosa sandbox preview web --port 3000 --expires 1h --read-only\nmiosa sandbox preview web --list",
    ),
    ("sandbox logs", "miosa sandbox logs web\nmiosa sandbox logs web --follow"),
    ("sandbox stop", "miosa sandbox stop web\nmiosa sandbox stop web --memory"),
    ("sandbox resume", "miosa sandbox resume web"),
    (
        "sandbox snapshot",
        "miosa sandbox snapshot web --name \"after install\"\nmiosa sandbox snapshot web --memory --name \"server is up\"",
    ),
    ("sandbox snapshots", "miosa sandbox snapshots list web"),
    ("sandbox snapshots list", "miosa sandbox snapshots list web"),
    ("sandbox snapshots get", "miosa sandbox snapshots get web \"after install\""),
    ("sandbox snapshots delete", "miosa sandbox snapshots delete snap-0123456789ab"),
    (
        "sandbox snapshots diff",
        "miosa sandbox snapshots diff \"before\" \"after install\"\nmiosa sandbox snapshots diff \"after install\" web",
    ),
    ("sandbox snapshots ls", "miosa sandbox snapshots ls \"after install\" /workspace -l"),
    ("sandbox snapshots cat", "miosa sandbox snapshots cat \"after install\" /etc/hostname"),
    ("sandbox snapshots extract", "miosa sandbox snapshots extract \"after install\" /workspace -o workspace.tar"),
    (
        "sandbox snapshots export",
        "miosa sandbox snapshots export \"after install\" web.miosa\nmiosa sandbox snapshots export web -",
    ),
    ("sandbox snapshots import", "miosa sandbox snapshots import web.miosa --name \"from elsewhere\""),
    ("sandbox restore", "miosa sandbox restore web \"after install\""),
    ("sandbox snapshots tree", "miosa sandbox snapshots tree web"),
    ("sandbox fork", "miosa sandbox fork web --name try --count 8 --wait"),
    ("sandbox metrics", "miosa sandbox metrics web"),
    ("sandbox usage", "miosa sandbox usage web --period 7d"),
    ("usage", "miosa usage --period 7d\nmiosa usage --sessions --period 24h"),
    (
        "sandbox publish",
        "miosa sandbox publish web --path / --output web.tar --tag web:1\nmiosa sandbox publish web --base node --cmd \"npm start\" --port 3000 --docker",
    ),
    ("sandbox destroy", "miosa sandbox destroy web"),
    ("sandbox extend", "miosa sandbox extend web --timeout 2h"),
    ("template", "miosa template build base"),
    ("template build", "miosa template build node --disk 20gb\nmiosa template build mine --file ./recipe.toml"),
    ("template import", "miosa template import ./image.tar --name mine"),
    ("template list", "miosa template list"),
    ("template show", "miosa template show base"),
    ("template delete", "miosa template delete mine"),
    ("volume", "miosa volume create data --size 10gb\nmiosa volume attach data web --mount /data"),
    ("volume create", "miosa volume create data --size 10gb\nmiosa volume create copy --snapshot \"before migration\""),
    ("volume list", "miosa volume list"),
    ("volume show", "miosa volume show data"),
    ("volume attach", "miosa volume attach data web --mount /data\nmiosa volume attach data reader --read-only"),
    ("volume detach", "miosa volume detach data web"),
    ("volume delete", "miosa volume delete data"),
    ("volume snapshot", "miosa volume snapshot data --name \"before migration\""),
    ("volume snapshots", "miosa volume snapshots list data"),
    ("volume snapshots list", "miosa volume snapshots list data"),
    ("volume snapshots delete", "miosa volume snapshots delete \"before migration\""),
    ("volume restore", "miosa volume restore data \"before migration\""),
    ("disk", "miosa disk create data --size 10gb\nmiosa disk attach data --frontend fuse"),
    ("disk create", "miosa disk create data --size 10gb"),
    ("disk import", "miosa disk import ./image.qcow2 --name golden --format qcow2"),
    ("disk export", "miosa disk export golden ./golden.raw\nmiosa disk export golden - --format archive"),
    ("disk list", "miosa disk list"),
    ("disk show", "miosa disk show golden"),
    ("disk snapshot", "miosa disk snapshot golden --name monday"),
    ("disk snapshots", "miosa disk snapshots golden"),
    ("disk fork", "miosa disk fork golden --name copy --count 100"),
    ("disk delete", "miosa disk delete copy-1"),
    ("disk diff", "miosa disk diff golden copy-1\nmiosa disk diff --files golden copy-1"),
    ("disk ls", "miosa disk ls golden /etc -l"),
    ("disk cat", "miosa disk cat golden /etc/hostname"),
    ("disk extract", "miosa disk extract golden /home -o home.tar"),
    ("disk attach", "miosa disk attach golden --frontend vhost-user"),
    ("disk detach", "miosa disk detach golden"),
    ("store", "miosa store stats\nmiosa store gc --dry-run"),
    ("store stats", "miosa store stats --json"),
    ("store seal", "miosa store seal"),
    ("store backup", "miosa store backup monday"),
    ("store gc", "miosa store gc --dry-run"),
    ("store check", "miosa store check"),
    ("store scrub", "miosa store scrub --heal"),
    ("store repair", "miosa store repair --state-dir /var/lib/miosa"),
    ("store repack", "miosa store repack"),
    ("store report", "miosa store report --svg report.svg"),
    ("store usage", "miosa store usage"),
];

/// The grammar with its examples.
pub(super) fn grammar() -> Command {
    EXAMPLES.iter().fold(Cli::command(), |grammar, (path, lines)| {
        let words: Vec<_> = path.split(' ').collect();
        let text = format!("Examples:\n{}", lines.lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n"));
        add(grammar, &words, &text)
    })
}

fn add(command: Command, words: &[&str], text: &str) -> Command {
    match words {
        [] => command.after_help(text.to_owned()),
        // One that is not there is told by a test.
        [first, ..] if command.find_subcommand(first).is_none() => command,
        [first, rest @ ..] => command.mut_subcommand(first, |sub| add(sub, rest, text)),
    }
}

/// A script that completes commands and options.
pub(super) fn completion(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut grammar(), "miosa", &mut script);
    Ok(std::io::Write::write_all(&mut std::io::stdout(), &script)?)
}

/// A manual page for every command, in a directory.
pub(super) fn man(dir: &Path) -> Result<()> {
    let failed = |e: std::io::Error| {
        Failure::user("local_file", format!("manual pages could not be written to {}: {e}", dir.display()))
            .hint("name a directory of yours: miosa man DIR")
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(grammar(), dir).map_err(failed)
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    fn leaves(command: &Command, path: &str, all: &mut Vec<String>) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
            let path = format!("{path} {}", sub.get_name()).trim().to_owned();
            leaves(sub, &path, all);
            all.push(path);
        }
    }

    #[test]
    fn every_command_has_an_example_and_every_example_a_command() {
        let mut all = Vec::new();
        leaves(&Cli::command(), "", &mut all);
        for command in &all {
            assert!(EXAMPLES.iter().any(|(path, _)| path == command), "{command} has no example");
        }
        for (path, _) in EXAMPLES {
            assert!(all.iter().any(|command| command == path), "{path} is no command");
        }
    }

    #[test]
    fn every_example_parses_as_its_command() {
        for (path, lines) in EXAMPLES {
            for line in lines.lines() {
                let line = line.rsplit("| ").next().unwrap().split(" >").next().unwrap();
                let words = words(line);
                let matches = grammar().try_get_matches_from(&words).unwrap_or_else(|e| panic!("{line}: {e}"));
                Cli::from_arg_matches(&matches).unwrap_or_else(|e| panic!("{line}: {e}"));
                assert!(line.starts_with(&format!("miosa {path}")), "{line} is no example of {path}");
            }
        }
    }

    /// As a shell takes them apart.
    fn words(line: &str) -> Vec<String> {
        let quoted = line.split('"').enumerate();
        let pieces = quoted.flat_map(|(i, piece)| match i % 2 {
            0 => piece.split_whitespace().map(str::to_owned).collect(),
            _ => vec![piece.to_owned()],
        });
        pieces.collect()
    }

    #[test]
    fn pages_and_completions_are_made() {
        let dir = tempfile::tempdir().unwrap();
        man(&dir.path().join("man1")).unwrap();
        let page = std::fs::read_to_string(dir.path().join("man1/miosa-sandbox-create.1")).unwrap();
        assert!(page.contains("Examples") && page.contains("template"), "{page}");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut grammar(), "miosa", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("snapshots"), "{shell}");
        }
        assert!(man(Path::new("/proc/none")).is_err());
    }
}
