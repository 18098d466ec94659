//! Builds of templates that are going on, and the last ones that are over. In memory only.

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;

use super::Progress;
use crate::engine::error::Error;
use crate::engine::records::new_id;
use crate::engine::registry::Building;

/// Builds remembered.
const MOST: usize = 100;
/// Lines of a build's output remembered.
const LOG_LINES: usize = 200;

/// How a build is going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildStatus {
    /// It is going on.
    Running,
    /// The template is there.
    Succeeded,
    /// It is not.
    Failed,
}

/// A build as callers see it.
#[derive(Debug, Clone)]
pub struct BuildView {
    /// `build-…`.
    pub id: String,
    /// The template.
    pub template: String,
    /// How it is going.
    pub status: BuildStatus,
    /// The last lines of what it said.
    pub log: VecDeque<String>,
    /// Why it failed.
    pub error: Option<Error>,
    /// When it began.
    pub started_at: Timestamp,
    /// When it was over.
    pub finished_at: Option<Timestamp>,
}

/// All builds.
#[derive(Default)]
pub(in crate::engine) struct Builds {
    views: Mutex<VecDeque<Arc<Mutex<BuildView>>>>,
}

impl Builds {
    pub(super) fn list(&self, template: Option<&str>) -> Vec<BuildView> {
        let views = self.views.lock().iter().map(|view| view.lock().clone()).collect::<Vec<_>>();
        views.into_iter().filter(|view| template.is_none_or(|name| view.template == name)).collect()
    }

    /// A build whose template's name is claimed for as long as it goes on.
    pub(super) fn begin(&self, template: &str, claim: Building) -> Build {
        let view = Arc::new(Mutex::new(BuildView {
            id: new_id("build"),
            template: template.to_owned(),
            status: BuildStatus::Running,
            log: VecDeque::new(),
            error: None,
            started_at: Timestamp::now(),
            finished_at: None,
        }));
        let mut views = self.views.lock();
        if views.len() >= MOST
            && let Some(over) = views.iter().position(|v| v.lock().status != BuildStatus::Running)
        {
            views.remove(over);
        }
        views.push_back(view.clone());
        Build { view, _claim: claim }
    }
}

/// A build that is going on.
pub(super) struct Build {
    view: Arc<Mutex<BuildView>>,
    _claim: Building,
}

impl Build {
    pub(super) fn view(&self) -> BuildView {
        self.view.lock().clone()
    }

    /// Remembers what `progress` is told.
    pub(super) fn hears(&self, progress: Progress) -> Progress {
        let view = self.view.clone();
        Arc::new(move |line: String| {
            {
                let log = &mut view.lock().log;
                if log.len() >= LOG_LINES {
                    log.pop_front();
                }
                log.push_back(line.clone());
            }
            progress(line);
        })
    }

    pub(super) fn end(self, error: Option<&Error>) {
        let mut view = self.view.lock();
        view.status = if error.is_some() { BuildStatus::Failed } else { BuildStatus::Succeeded };
        view.error = error.cloned();
        view.finished_at = Some(Timestamp::now());
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        // A build that did not come to its end, whatever the reason.
        let mut view = self.view.lock();
        if view.status == BuildStatus::Running {
            view.status = BuildStatus::Failed;
            view.finished_at = Some(Timestamp::now());
        }
    }
}
