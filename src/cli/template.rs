//! `miosa template …`.

use super::args::TemplateCommand;
use super::output::{Failure, Out, Result};
use crate::api::client::{Client, escape};
use crate::api::types::{ErrorBody, TemplateBody, TemplateRequestBody};
use crate::units::show_bytes;

pub(super) async fn run(client: &Client, out: Out, command: TemplateCommand) -> Result<()> {
    match command {
        TemplateCommand::Build { name, image, disk } => {
            let image_path =
                image.map(|path| super::absolute(path).map(|p| p.to_string_lossy().into_owned())).transpose()?;
            build(client, out, TemplateRequestBody { name, image_path, disk_size_mb: disk }).await
        }
        TemplateCommand::List => {
            let templates: Vec<TemplateBody> = client.get("/sandbox-templates").await?;
            let names: Vec<_> = templates.iter().map(|t| t.name.as_str()).collect();
            out.answer(&templates, &names.join("\n"), |out| {
                if templates.is_empty() {
                    return format!("no templates\n{}", out.next_step("miosa template build base"));
                }
                let row = |t: &TemplateBody| {
                    vec![t.name.clone(), show_bytes(t.disk_size_mb << 20), show_bytes(t.data_bytes), t.origin.clone()]
                };
                out.table(&["NAME", "DISK", "DATA", "ORIGIN"], &templates.iter().map(row).collect::<Vec<_>>())
            })
        }
        TemplateCommand::Show { name } => {
            let template: TemplateBody = client.get(&format!("/sandbox-templates/{}", escape(&name))).await?;
            out.answer(&template, &template.name, |out| describe(out, &template))
        }
        TemplateCommand::Delete { name } => {
            let template: TemplateBody = client.delete(&format!("/sandbox-templates/{}", escape(&name))).await?;
            out.answer(&template, &template.name, |out| {
                format!("template {} is deleted\n{}", template.name, out.next_step("miosa template list"))
            })
        }
    }
}

async fn build(client: &Client, out: Out, body: TemplateRequestBody) -> Result<()> {
    out.progress(&format!("building template {} …", body.name));
    let mut events = client.events("/sandbox-templates?stream=true", &body).await?;
    while let Some((name, data)) = events.next_event().await? {
        match name.as_str() {
            "progress" => out.progress(&format!("  {}", data["message"].as_str().unwrap_or_default())),
            "done" => {
                let template: TemplateBody = serde_json::from_value(data)
                    .map_err(|e| Failure::new(4, "bad_answer", format!("a template that cannot be decoded: {e}")))?;
                return out.answer(&template, &template.name, |out| {
                    let next = format!("miosa sandbox create --template {} --name NAME --wait", template.name);
                    format!("{}\n{}", describe(out, &template), out.next_step(&next))
                });
            }
            "error" => {
                let status = data["status"].as_u64().and_then(|s| u16::try_from(s).ok()).unwrap_or(500);
                let body: ErrorBody = serde_json::from_value(data["error"].clone()).unwrap_or_default();
                return Err(Failure::refused(status, body));
            }
            _ => {}
        }
    }
    Err(Failure::new(2, "connection_broken", "the daemon's answer broke off before the template was there")
        .hint("the build may go on: miosa template list"))
}

fn describe(out: &Out, template: &TemplateBody) -> String {
    out.fields(&[
        ("name", template.name.clone()),
        ("disk", show_bytes(template.disk_size_mb << 20)),
        ("data", show_bytes(template.data_bytes)),
        ("origin", template.origin.clone()),
        ("created", template.created_at.to_string()),
    ])
}
