//! miosa: a self-hosted snapshot daemon for persistent sandboxes.

fn main() -> std::process::ExitCode {
    miosa::cli::main()
}
