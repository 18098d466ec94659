//! Libraries that fail at what nobody sends them, or what their callers are prepared for.

/// Lets a thread that panics in one of these crates end as threads do; any other panic is a crash, as before.
pub fn allow_in(crates: &'static [&'static str]) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let at = panic.location().map_or("", |location| location.file());
        if !crates.iter().any(|name| at.contains(name)) {
            before(panic);
        }
    }));
}
