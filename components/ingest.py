"""Step 1 of a pipeline of ordinary video: the data set."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def ingest(
    source_uri: str,
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    card: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    prompts_uri: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> NamedTuple("Ingested", [("data_uri", str), ("data_digest", str)]):
    """Cuts the videos at a place into clips; a finished data set is reused. Returns its URI and its digest.

    Pictures that the last steps want are looked at first: training would be in vain.
    """
    from json import dumps, loads
    from pathlib import Path

    from genie_model import files
    from genie_model.data.ingest import ingest as ingest_videos
    from genie_model.prompts import Prompts
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("ingest", preset, overrides, **where) as run:
        if prompts_uri:
            Prompts.read(prompts_uri, *run.config.frame_shape[:2], run.config.prompts.aspect)
        data_uri = ingest_videos(run.config, source_uri, root_uri, run)
        data_digest = run.dataset(data_uri)
        texts = {name: files.read(f"{data_uri}/{name}").decode() for name in ("card.md", "card.html", "report.json")}
        for name, text in texts.items():
            run.client.log_text(run.run_id, text, name)
        Path(card.path).write_text(texts["card.html"])
        report = loads(texts["report.json"])
        metrics.metadata.update({name: report[name] for name in ("videos", "clips", "hours")} | report["rejected"])
        Path(metrics.path).write_text(dumps(metrics.metadata))  # kfp.local caches none without a file
    return data_uri, data_digest
