//! `miosa template …`.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::ValueEnum;

use super::args::{BuildArgs, TemplateCommand};
use super::output::{Failure, Out, Result};
use super::sandbox::age;
use crate::api::client::{Client, escape};
use crate::api::types::{ErrorBody, TemplateBody, TemplateRequestBody};
use crate::engine::recipe::Recipe;
use crate::units::show_bytes;

pub(super) async fn run(client: &Client, out: Out, command: TemplateCommand) -> Result<()> {
    match command {
        TemplateCommand::Build(args) => build(client, out, build_body(args)?).await,
        TemplateCommand::Import(args) => {
            let body = TemplateRequestBody {
                name: args.name,
                image_path: Some(shown_absolute(args.file)?),
                format: args.format.and_then(|f| Some(f.to_possible_value()?.get_name().to_owned())),
                disk_size_mb: args.disk,
                ..TemplateRequestBody::default()
            };
            build(client, out, body).await
        }
        TemplateCommand::List => {
            let templates: Vec<TemplateBody> = client.get("/sandbox-templates?usage=true").await?;
            let names: Vec<_> = templates.iter().map(|t| t.name.as_str()).collect();
            out.answer(&templates, &names.join("\n"), |out| {
                if templates.is_empty() {
                    return format!("no templates\n{}", out.next_step("miosa template build base"));
                }
                let row = |t: &TemplateBody| {
                    vec![
                        t.name.clone(),
                        show_bytes(t.disk_size_mb << 20),
                        show_bytes(t.data_bytes),
                        t.referenced_bytes.map(show_bytes).unwrap_or_default(),
                        t.exclusive_bytes.map(show_bytes).unwrap_or_default(),
                        t.sandbox_count.to_string(),
                        age(t.created_at),
                        t.origin.clone(),
                    ]
                };
                let head = ["NAME", "DISK", "DATA", "STORED", "EXCLUSIVE", "SANDBOXES", "AGE", "SOURCE"];
                out.table(&head, &templates.iter().map(row).collect::<Vec<_>>())
            })
        }
        TemplateCommand::Show { name } => {
            let template: TemplateBody = client.get(&format!("/sandbox-templates/{}", escape(&name))).await?;
            out.answer(&template, &template.name, |out| describe(out, &template))
        }
        TemplateCommand::Delete { name } => {
            let template: TemplateBody = client.delete(&format!("/sandbox-templates/{}", escape(&name))).await?;
            out.answer(&template, &template.name, |out| {
                let kept = match template.sandbox_count {
                    0 => String::new(),
                    1 => "; the sandbox made from it keeps working".to_owned(),
                    n => format!("; the {n} sandboxes made from it keep working"),
                };
                format!("template {} is deleted{kept}\n{}", template.name, out.next_step("miosa template list"))
            })
        }
    }
}

fn shown_absolute(path: std::path::PathBuf) -> Result<String> {
    super::absolute(path).map(|p| p.to_string_lossy().into_owned())
}

fn build_body(args: BuildArgs) -> Result<TemplateRequestBody> {
    let build_spec = match &args.file {
        None => None,
        Some(file) => Some(
            serde_json::to_value(read_recipe(file)?)
                .map_err(|e| Failure::new(4, "internal_error", format!("the recipe cannot be sent: {e}")))?,
        ),
    };
    Ok(TemplateRequestBody {
        name: args.name,
        build_spec,
        image_path: args.image.map(shown_absolute).transpose()?,
        disk_size_mb: args.disk,
        no_cache: args.no_cache.then_some(true),
        ..TemplateRequestBody::default()
    })
}

/// Reads a recipe, and the files next to it that it names.
fn read_recipe(file: &Path) -> Result<Recipe> {
    let text = std::fs::read_to_string(file).map_err(|e| {
        Failure::user("local_file", format!("the recipe {} cannot be read: {e}", file.display()))
            .hint("name a TOML file, such as one with: from = \"base\"")
    })?;
    let mut recipe = Recipe::parse(&text)?;
    let dir = file.parent().unwrap_or(Path::new(""));
    for entry in &mut recipe.files {
        let Some(source) = entry.source.take() else { continue };
        let path = dir.join(&source);
        let content = std::fs::read(&path).map_err(|e| {
            Failure::user("local_file", format!("the recipe's file {} cannot be read: {e}", path.display()))
                .hint("source is relative to the recipe")
        })?;
        if entry.mode.is_none() {
            use std::os::unix::fs::PermissionsExt;
            entry.mode = std::fs::metadata(&path).ok().map(|m| format!("{:o}", m.permissions().mode() & 0o777));
        }
        if entry.content.is_some() || entry.content_base64.is_some() {
            let message = format!("the recipe's file {} has content and a source", entry.path);
            return Err(Failure::user("invalid_input", message).hint("give one of them"));
        }
        entry.content_base64 = Some(BASE64.encode(content));
    }
    recipe.check()?;
    Ok(recipe)
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

fn describe(out: &Out, t: &TemplateBody) -> String {
    let mut fields = vec![("name", t.name.clone()), ("status", t.status.clone())];
    if t.status == "ready" {
        fields.extend([
            ("source", t.origin.clone()),
            ("disk", show_bytes(t.disk_size_mb << 20)),
            ("data", show_bytes(t.data_bytes)),
            ("sandboxes", t.sandbox_count.to_string()),
        ]);
    }
    let mut optional = |key, value: Option<String>| fields.extend(value.map(|v| (key, v)));
    let words = |words: &[String]| Some(words.join(" ")).filter(|text| !text.is_empty());
    optional("from", t.from.clone());
    optional("stored", t.referenced_bytes.map(show_bytes));
    optional("exclusive", t.exclusive_bytes.map(show_bytes));
    optional("cpus", t.cpu_count.map(|n| n.to_string()));
    optional("memory", t.memory_mb.map(|mb| show_bytes(mb << 20)));
    optional("workdir", t.workdir.clone());
    optional("env", words(&t.env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()));
    optional("user", t.user.clone());
    optional("entrypoint", words(&t.entrypoint));
    optional("command", words(&t.cmd));
    optional("error", t.error.as_ref().map(|e| e.message.clone()));
    fields.push(("created", t.created_at.to_string()));
    out.fields(&fields)
}
