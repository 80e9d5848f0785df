"""Step 3: the latent action model and the dynamics model."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def train_world(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    tokenizer_uri: str,
    data_digest: str = "",
    machine: list = [],  # noqa: B006
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Co-trains the latent action model and the dynamics on the tokenizer's codes. Returns the whole model's URI.

    `machine` are overrides that placement adds below the user's: how the devices of its node share the work.
    """
    from genie_model.tracking import step
    from genie_model.train import train_world as train

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("train-world", preset, [*machine, *overrides], **where) as run:
        run.dataset(data_uri, expected=data_digest)
        model_uri = train(run.config, data_uri, tokenizer_uri, root_uri, run)
        run.made("world", model_uri)
    return model_uri
