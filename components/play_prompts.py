"""What a world makes of pictures unlike its training data."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def play_prompts(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    model_uri: str,
    images_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    pictures: dsl.Output[dsl.HTML],
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> dict:
    """Holds each latent action from every picture below `images_uri`, by default from the samples. Returns metrics."""
    from json import dumps
    from pathlib import Path

    from genie_model.prompts import play_prompts as play
    from genie_model.report import html_page
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("play-prompts", preset, overrides, **where) as run:
        played = play(run.config, model_uri, images_uri, run)
        metrics.metadata.update(played.metrics)
        Path(metrics.path).write_text(dumps(played.metrics))  # kfp.local caches none without a file
        Path(pictures.path).write_text(html_page(f"{run.config.name} from pictures", played.metrics, played.pictures))
    return played.metrics
