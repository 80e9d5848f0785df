"""A training step on several hosts: a job of the cluster, which this step starts, follows and ends."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def launch(
    stage: str,
    job: dict,
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    tokenizer_uri: str = "",
    data_digest: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Runs a training stage on every host of a TPU slice. Returns the URI of what was trained.

    KFP's cache and the job's name go by `data_digest`: other data at the same URI is trained on anew.
    """
    from genie_model.launcher import Job, JobError
    from genie_model.launcher import launch as launch_job

    what = {"root_uri": root_uri, "data_uri": data_uri, "tokenizer_uri": tokenizer_uri, "data_digest": data_digest}
    where = {"tracking_uri": tracking_uri, "experiment": experiment, "study": study}  # its first host opens the run
    try:
        uri = launch_job(Job.model_validate(job), stage, preset, overrides, **what, **where)
    except (ValueError, OSError, JobError) as error:
        raise SystemExit(f"[launch] error: {error}") from None
    return uri
