//! What sandboxes used: compute over time, and what is stored for them.

use std::collections::HashMap;

use axum::extract::State as AppState;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::{Answer, ApiError, ListAnswer, data, list_of};
use super::request::{Paging, Params, Path, flag, refuse_unsupported};
use crate::api::types::{Envelope, FiguresBody, ListEnvelope, SessionBody, UsageReport};
use crate::engine::error::{Error, Kind};
use crate::engine::lifecycle::State;
use crate::engine::{Period, SandboxView, Used};
use crate::units::parse_duration;

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(usage))
        .routes(routes!(usage_of_all))
        .routes(routes!(summary))
        .routes(routes!(sessions))
}

/// What a sandbox used since it was made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct UsageBody {
    sandbox_id: String,
    name: String,
    state: State,
    /// Of all sessions together.
    runtime_sec: u64,
    provisioned_vcpu_ms: u64,
    provisioned_memory_mb_ms: u64,
    creation_count: u64,
    /// Not measured, as the next two.
    active_cpu_ms: Option<u64>,
    network_ingress_bytes: Option<u64>,
    network_egress_bytes: Option<u64>,
    #[schema(value_type = Object)]
    measurement_status: Value,
    /// Nothing has a price here.
    estimated_cost_cents: u64,
    timeout_sec: u64,
    timeout_remaining_ms: Option<u64>,
    disk_size_bytes: u64,
    /// When asked for: stored bytes that it refers to, shared or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    referenced_bytes: Option<u64>,
    /// When asked for: stored bytes that only it refers to, about what destroying it gives back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exclusive_bytes: Option<u64>,
}

impl From<SandboxView> for UsageBody {
    fn from(view: SandboxView) -> Self {
        let (r, compute) = (view.record, view.compute);
        Self {
            sandbox_id: r.id,
            name: r.name,
            state: r.state,
            runtime_sec: compute.runtime_ms / 1_000,
            provisioned_vcpu_ms: compute.vcpu_ms,
            provisioned_memory_mb_ms: compute.memory_mib_ms,
            creation_count: 1,
            active_cpu_ms: None,
            network_ingress_bytes: None,
            network_egress_bytes: None,
            measurement_status: json!({
                "provisioned_vcpu": "measured",
                "provisioned_memory": "measured",
                "active_cpu": "not_measured",
                "network": "not_measured",
            }),
            estimated_cost_cents: 0,
            timeout_sec: r.timeout_ms.unwrap_or_default() / 1_000,
            timeout_remaining_ms: view.timeout_remaining.map(|t| t.as_millis() as u64),
            disk_size_bytes: r.disk_size_bytes,
            referenced_bytes: None,
            exclusive_bytes: None,
        }
    }
}

/// Says what a sandbox used since it was made.
#[utoipa::path(get, path = "/sandboxes/{id}/usage", tag = "usage", params(("measure" = Option<bool>, Query, description = "Say what it stores, too; that walks the maps of all disks")), responses((status = 200, body = Envelope<UsageBody>)))]
async fn usage(AppState(api): AppState<Api>, Path(id): Path<String>, Params(params): Params) -> Answer<UsageBody> {
    let view = api.engine.show(&id)?;
    let stored = match flag(&params, "measure") && view.record.state != State::Destroyed {
        true => Some(api.engine.stored(&view.record.id).await?),
        false => None,
    };
    let mut body = UsageBody::from(view);
    body.referenced_bytes = stored.as_ref().map(|s| s.referenced_bytes);
    body.exclusive_bytes = stored.as_ref().map(|s| s.exclusive_bytes + s.unsealed_bytes);
    data(body)
}

/// The period that is asked about, as it is documented.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "read from the query by hand, for better messages")]
struct PeriodParams {
    /// How far back from now, such as `24h`, `7d` or `30d`, or `month-to-date`. By default 30 days.
    period: Option<String>,
    /// Its beginning, in place of `period`.
    #[param(value_type = Option<String>, format = DateTime)]
    start: Option<String>,
    /// Its end, if it is not now.
    #[param(value_type = Option<String>, format = DateTime)]
    end: Option<String>,
    /// Only of this one, by id or name.
    sandbox_id: Option<String>,
}

/// How far back an answer goes that was not told.
const DEFAULT_PERIOD: &str = "30d";
/// Most parts that a period is cut into.
const MAX_PARTS: u32 = 366;

fn period(params: &HashMap<String, String>) -> Result<Period, ApiError> {
    let given = |names: [&str; 2]| names.iter().find_map(|n| params.get(*n)).filter(|text| !text.is_empty());
    let time = |text: &String| {
        text.parse::<Timestamp>().map_err(|_| {
            Error::new(Kind::InvalidInput, format!("{text:?} is no time")).hint("such as 2026-01-31T00:00:00Z")
        })
    };
    // The SDK's reports call them by longer names.
    let end = given(["end", "period_end"]).map(time).transpose()?;
    let until = end.unwrap_or_else(Timestamp::now);
    let start = given(["start", "period_start"]).map(time).transpose()?;
    let from = match (start, given(["period", "period"])) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Kind::InvalidInput, "period and start exclude each other").into());
        }
        (Some(start), None) => start,
        (None, asked) => before(until, asked.map_or(DEFAULT_PERIOD, String::as_str))?,
    };
    if from > until {
        return Err(Error::new(Kind::InvalidInput, "the period ends before it begins").into());
    }
    Ok(Period { from, until })
}

fn before(until: Timestamp, period: &str) -> Result<Timestamp, ApiError> {
    if period == "month-to-date" {
        let first = until.to_zoned_datetime(TimeZone::UTC).first_of_month().and_then(|day| day.start_of_day());
        return Ok(first
            .map_err(|e| Error::new(Kind::InvalidInput, format!("the month has no beginning: {e}")))?
            .timestamp());
    }
    let back = parse_duration(period).map_err(|_| {
        Error::new(Kind::InvalidInput, format!("{period:?} is no period")).hint("such as 24h, 7d, 30d or month-to-date")
    })?;
    Ok(until.checked_sub(back).unwrap_or(Timestamp::MIN))
}

fn refuse_others(params: &HashMap<String, String>, known: &[&str]) -> Result<(), ApiError> {
    let common = ["period", "start", "end", "period_start", "period_end", "sandbox_id"];
    let other = params.iter().filter(|(name, _)| !known.contains(&name.as_str()) && !common.contains(&name.as_str()));
    let other = other.map(|(name, value)| (name.clone(), Value::from(value.clone()))).collect();
    refuse_unsupported("usage", &other)
}

/// Says what sandboxes used within a period: those that are there, and those that used anything.
#[utoipa::path(get, path = "/usage", tag = "usage", params(PeriodParams, ("parts" = Option<u32>, Query, description = "Cut the period into so many equal parts, too", minimum = 1, maximum = 366), ("measure" = Option<bool>, Query, description = "Look now at what is kept; that walks the maps of all disks")), responses((status = 200, body = Envelope<UsageReport>)))]
async fn usage_of_all(AppState(api): AppState<Api>, Params(params): Params) -> Answer<UsageReport> {
    refuse_others(&params, &["parts", "measure"])?;
    let parts = match params.get("parts").filter(|text| !text.is_empty()) {
        None => 0,
        Some(text) => text.parse().ok().filter(|parts| (1..=MAX_PARTS).contains(parts)).ok_or_else(|| {
            Error::new(Kind::InvalidInput, format!("parts is a number from 1 to {MAX_PARTS}, and not {text:?}"))
        })?,
    };
    let period = period(&params)?;
    if flag(&params, "measure") {
        api.engine.measure_usage().await?;
    }
    data(report(&api, &params, period, parts)?)
}

fn report(api: &Api, params: &HashMap<String, String>, period: Period, parts: u32) -> Result<UsageReport, ApiError> {
    let all = api.engine.usage(params.get("sandbox_id").map(String::as_str), period, parts)?;
    let mut total = Used::default();
    all.iter().for_each(|usage| total.add(usage.used));
    let results = all.into_iter().map(Into::into).collect();
    Ok(UsageReport { period_start: period.from, period_end: period.until, total: total.into(), results })
}

/// What all sandboxes used together.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
struct SummaryBody {
    #[schema(value_type = String, format = DateTime)]
    period_start: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    period_end: Timestamp,
    sandboxes: u64,
    running: u64,
    #[serde(flatten)]
    total: FiguresBody,
}

/// Says what all sandboxes used together within a period.
#[utoipa::path(get, path = "/usage/summary", tag = "usage", params(PeriodParams), responses((status = 200, body = Envelope<SummaryBody>)))]
async fn summary(AppState(api): AppState<Api>, Params(params): Params) -> Answer<SummaryBody> {
    refuse_others(&params, &[])?;
    let UsageReport { period_start, period_end, total, .. } = report(&api, &params, period(&params)?, 0)?;
    let here = api.engine.list(None);
    let running = here.iter().filter(|view| view.record.state == State::Running).count() as u64;
    data(SummaryBody { period_start, period_end, sandboxes: here.len() as u64, running, total })
}

/// Lists the sessions that were going on within a period, oldest first; of each sandbox the last 64.
#[utoipa::path(get, path = "/usage/sessions", tag = "usage", params(PeriodParams, Paging), responses((status = 200, body = ListEnvelope<SessionBody>)))]
async fn sessions(AppState(api): AppState<Api>, Params(params): Params) -> ListAnswer<SessionBody> {
    refuse_others(&params, &["limit", "cursor", "offset"])?;
    let of = params.get("sandbox_id").map(String::as_str);
    list_of(api.engine.usage_sessions(of, period(&params)?)?, &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pairs: &[(&str, &str)]) -> Result<(String, String), ApiError> {
        let mut params: HashMap<String, String> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        params.entry("end".to_owned()).or_insert_with(|| "2026-03-15T12:00:00Z".to_owned());
        period(&params).map(|p| (p.from.to_string(), p.until.to_string()))
    }

    #[test]
    fn periods_are_lengths_months_or_times() {
        let from = |pairs: &[(&str, &str)]| ask(pairs).unwrap().0;
        assert_eq!(from(&[]), "2026-02-13T12:00:00Z");
        assert_eq!(from(&[("period", "7d")]), "2026-03-08T12:00:00Z");
        assert_eq!(from(&[("period", "90m")]), "2026-03-15T10:30:00Z");
        assert_eq!(from(&[("period", "month-to-date")]), "2026-03-01T00:00:00Z");
        assert_eq!(from(&[("start", "2026-01-01T00:00:00Z")]), "2026-01-01T00:00:00Z");
        assert_eq!(from(&[("period_start", "2026-01-01T00:00:00+01:00")]), "2025-12-31T23:00:00Z");
        for wrong in [
            &[("period", "long")][..],
            &[("period", "7d"), ("start", "2026-01-01T00:00:00Z")],
            &[("start", "yesterday")],
            &[("start", "2027-01-01T00:00:00Z")],
        ] {
            assert!(ask(wrong).is_err(), "{wrong:?}");
        }
    }
}
