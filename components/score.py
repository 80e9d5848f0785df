"""Curation 2: what the classifier says of every clip."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def score(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    classifier_uri: str,
    data_digest: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Scores the train clips, part by part; whole parts are reused. Returns the scores' URI."""
    from genie_model.data.curation import score as score_clips
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("score", preset, overrides, **where) as run:
        run.dataset(data_uri, expected=data_digest)
        scores_uri = score_clips(run.config, data_uri, classifier_uri, root_uri, run)
    return scores_uri
