"""Step 2: the video tokenizer."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def train_tokenizer(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    data_uri: str,
    data_digest: str = "",
    machine: list = [],  # noqa: B006
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
    only_find: bool = False,
) -> str:
    """Trains the tokenizer on the data set; carries on from its last checkpoint. Returns the model's URI.

    `machine` are overrides that placement adds below the user's: how the devices of its node share the work.
    """
    from genie_model.tracking import step
    from genie_model.train import train_tokenizer as train

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("train-tokenizer", preset, [*machine, *overrides], **where) as run:
        run.dataset(data_uri, expected=data_digest)
        tokenizer_uri = train(run.config, data_uri, root_uri, run, only_find)
        run.made("tokenizer", tokenizer_uri)
    return tokenizer_uri
