//! Metrics, as generated types.

use crate::api;
use crate::service::metrics::{BASE_LABELS, DESCRIPTORS, Metric, MetricKind, PodMetrics};

/// What metrics there are.
pub(super) fn descriptors() -> Vec<api::MetricDescriptor> {
    let descriptor = |of: &&crate::service::metrics::Descriptor| api::MetricDescriptor {
        name: of.name.into(),
        help: of.help.into(),
        label_keys: BASE_LABELS.iter().chain(of.labels).map(|label| label.to_string()).collect(),
    };
    DESCRIPTORS.iter().map(descriptor).collect()
}

/// One pod's.
pub(super) fn pod(from: PodMetrics) -> api::PodSandboxMetrics {
    api::PodSandboxMetrics {
        pod_sandbox_id: from.record.id.to_string(),
        metrics: from.metrics.into_iter().map(metric).collect(),
        container_metrics: from
            .containers
            .into_iter()
            .map(|(record, metrics)| api::ContainerMetrics {
                container_id: record.id.to_string(),
                metrics: metrics.into_iter().map(metric).collect(),
            })
            .collect(),
    }
}

fn metric(from: Metric) -> api::Metric {
    api::Metric {
        name: from.of.name.into(),
        // Read when it was asked for.
        timestamp: 0,
        metric_type: match from.of.kind {
            MetricKind::Counter => api::MetricType::Counter,
            MetricKind::Gauge => api::MetricType::Gauge,
        }
        .into(),
        label_values: from.labels,
        value: Some(api::UInt64Value { value: from.value }),
    }
}
