"""Curation 1: the classifier of good and bad clips."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def train_curator(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    labels_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    data_digest: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Learns 5 from 1 in a file of the labelling page, and measures itself on other videos. Returns its URI."""
    from json import dumps
    from pathlib import Path

    from genie_model.data.curation import held_out_confusion, held_out_metrics, train_classifier
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("train-curator", preset, overrides, **where) as run:
        run.dataset(data_uri, expected=data_digest)
        classifier_uri = train_classifier(run.config, data_uri, labels_uri, root_uri, run)
        run.made("curator", classifier_uri)
        found = held_out_metrics(run.config, classifier_uri)
        run.result(found)
        metrics.metadata.update(found)
        confusion.log_confusion_matrix(["bad: dropped", "good: kept"], held_out_confusion(run.config, classifier_uri))
        for artifact in (metrics, confusion):  # kfp.local caches none without a file
            Path(artifact.path).write_text(dumps(artifact.metadata))
    return classifier_uri
