//! Changing what a sandbox is made with. What concerns its machine counts from the next session on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;

use super::error::Result;
use super::guest::check_env;
use super::lifecycle::Request;
use super::records::SandboxRecord;
use super::sandbox::Sandbox;
use super::{Engine, SandboxView};

/// What is to be changed; what is none or empty stays.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Its name; the guest hears of it in its next session.
    pub name: Option<String>,
    /// Virtual processors of the next sessions.
    pub cpus: Option<u32>,
    /// Memory of the next sessions.
    pub memory_mib: Option<u64>,
    /// How long a session may last, the present one from now on.
    pub timeout: Option<Option<Duration>>,
    /// How long a session may go unused, the present one too.
    pub idle_timeout: Option<Option<Duration>>,
    /// Keep the file system when a session ends.
    pub persistent: Option<bool>,
    /// Variables of later commands that get a value, or go.
    pub env: BTreeMap<String, Option<String>>,
    /// Notes that get a value; null takes one out.
    pub metadata: Map<String, Value>,
    /// All labels.
    pub tags: Option<Vec<String>>,
}

impl Changes {
    fn apply(self, record: &mut SandboxRecord) {
        let millis = |limit: Option<Duration>| limit.map(|t| t.as_millis() as u64);
        record.name = self.name.unwrap_or_else(|| record.name.clone());
        record.cpus = self.cpus.unwrap_or(record.cpus);
        record.memory_mib = self.memory_mib.unwrap_or(record.memory_mib);
        record.timeout_ms = self.timeout.map_or(record.timeout_ms, millis);
        record.idle_timeout_ms = self.idle_timeout.map_or(record.idle_timeout_ms, millis);
        record.persistent = self.persistent.unwrap_or(record.persistent);
        for (name, value) in self.env {
            match value {
                Some(value) => record.env.insert(name, value),
                None => record.env.remove(&name),
            };
        }
        for (name, value) in self.metadata {
            match value {
                Value::Null => record.metadata.remove(&name),
                value => record.metadata.insert(name, value),
            };
        }
        if let Some(tags) = self.tags {
            record.tags = tags;
        }
    }
}

impl Engine {
    /// Changes a sandbox; durable when it answers.
    pub async fn update(&self, key: &str, changes: Changes) -> Result<SandboxView> {
        let sandbox = self.find(key)?;
        self.detached(async move { sandbox.update(changes).await }).await
    }
}

impl Sandbox {
    async fn update(self: &Arc<Self>, changes: Changes) -> Result<SandboxView> {
        let owner = self.own().await;
        self.decide(Request::Update)?;
        let old = self.record();
        let names = match &changes.name {
            Some(name) if *name != old.name => Some(self.shared.registry.reserve_names(std::slice::from_ref(name))?),
            _ => None,
        };
        let timeout = changes.timeout;
        let mut record = old.clone();
        changes.apply(&mut record);
        check_env(&record.env)?;
        self.save_as(record.clone()).await?;
        self.publish(|r| *r = record);
        if let Some(names) = names {
            self.shared.registry.rename(&old.name, self, names);
        }
        if let Some(session) = &owner.session {
            let deadline = match timeout {
                Some(limit) => limit.map(|limit| Instant::now() + limit),
                None => session.deadline(),
            };
            // Told in any case: who waits for it looks at the idle timeout, too.
            session.set_deadline(deadline);
            self.publish_deadline(deadline);
        }
        Ok(self.view())
    }
}
