//! `miosa sandbox preview`: addresses of a sandbox's ports.

use super::args::PreviewArgs;
use super::output::{Failure, Out, Result};
use super::sandbox::path;
use crate::api::client::Client;
use crate::api::types::{CreatePreviewBody, PreviewBody, PreviewTokenBody, ShareBody};
use crate::engine::records::Visibility;
use crate::units::show_duration;

pub(super) async fn run(client: &Client, out: Out, args: PreviewArgs) -> Result<()> {
    let sandbox = &args.target.sandbox;
    let route = path(sandbox, "/previews");
    let Some(port) = args.port.filter(|_| !args.list) else {
        let all: Vec<PreviewBody> = client.get(&route).await?;
        return list(out, sandbox, &all);
    };
    let one = format!("{route}/{port}");
    if args.delete {
        let gone: PreviewBody = client.delete(&one).await?;
        return out.answer(&gone, &gone.id, |_| format!("port {port} of {sandbox} has no address any more"));
    }
    if !args.path.starts_with('/') {
        let message = format!("{:?} is no path of a page", args.path);
        return Err(Failure::user("invalid_input", message).hint("begin it with a slash: --path /login"));
    }
    let visibility = match (args.public, args.private) {
        (true, _) => Some(Visibility::Public),
        (_, true) => Some(Visibility::Private),
        _ => None,
    };
    let wanted = CreatePreviewBody { port: Some(port), visibility, ..CreatePreviewBody::default() };
    let mut preview: PreviewBody = client.post(&route, &wanted).await?;
    if args.revoke {
        preview = client.delete(&format!("{one}/share")).await?;
    }
    if args.expires.is_none() && !args.read_only {
        preview.url = with_path(&preview.url, &args.path);
        return out.answer(&preview, &preview.url, |out| tell(out, &preview, &preview.url, None));
    }
    let body = PreviewTokenBody {
        expires_in: args.expires.map(|time| time.as_secs().max(1)),
        scope: args.read_only.then(|| "read".to_owned()),
        ..PreviewTokenBody::default()
    };
    let mut share: ShareBody = client.post(&format!("{one}/share"), &body).await?;
    share.share_url = with_path(&share.share_url, &args.path);
    let lasts = args.expires.map(show_duration);
    out.answer(&share, &share.share_url, |out| tell(out, &share.preview, &share.share_url, lasts.as_deref()))
}

/// The address of another page than the first.
fn with_path(url: &str, page: &str) -> String {
    let after_host = url.find("://").and_then(|at| url[at + 3..].find('/').map(|slash| at + 3 + slash));
    match after_host {
        // What follows the slash is nothing, or the token.
        Some(slash) => {
            let (host, token) = (&url[..slash], url[slash + 1..].trim_start_matches('?'));
            match (token.is_empty(), page.contains('?')) {
                (true, _) => format!("{host}{page}"),
                (false, false) => format!("{host}{page}?{token}"),
                (false, true) => format!("{host}{page}&{token}"),
            }
        }
        None => url.to_owned(),
    }
}

fn tell(out: &Out, preview: &PreviewBody, url: &str, lasts: Option<&str>) -> String {
    let (id, port) = (&preview.sandbox_id, preview.port);
    let lasts = lasts.map(|lasts| format!(", for {lasts}")).unwrap_or_default();
    let next = out.next_step(&format!("miosa sandbox wait {id} --port {port}"));
    format!("{url}\nopens port {port} of {id}{lasts}\n{next}")
}

fn list(out: Out, sandbox: &str, all: &[PreviewBody]) -> Result<()> {
    let urls: Vec<_> = all.iter().map(|preview| preview.url.as_str()).collect();
    out.answer(&all, &urls.join("\n"), |out| {
        if all.is_empty() {
            let next = out.next_step(&format!("miosa sandbox preview {sandbox} --port PORT"));
            return format!("no previews\n{next}");
        }
        let who = |preview: &PreviewBody| match preview.visibility {
            Visibility::Private => "who has the link",
            Visibility::Public => "everybody",
        };
        let rows: Vec<_> =
            all.iter().map(|p| vec![p.id.clone(), p.port.to_string(), who(p).to_owned(), p.url.clone()]).collect();
        out.table(&["ID", "PORT", "OPEN TO", "ADDRESS"], &rows)
    })
}

#[cfg(test)]
mod tests {
    use super::with_path;

    #[test]
    fn an_address_gets_a_page_and_keeps_its_token() {
        let (plain, with) = ("http://3000-web.localhost:1/", "http://3000-web.localhost:1/?mt=T");
        assert_eq!(with_path(plain, "/a?b=c"), "http://3000-web.localhost:1/a?b=c");
        assert_eq!(with_path(with, "/"), with);
        assert_eq!(with_path(with, "/a"), "http://3000-web.localhost:1/a?mt=T");
        assert_eq!(with_path(with, "/a?b=c"), "http://3000-web.localhost:1/a?b=c&mt=T");
    }
}
