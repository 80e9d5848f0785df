"""A larger decoder of a trained tokenizer's tokens."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def train_decoder(
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
    """Learns the data set's frames from the tokens of what they are when made small. Returns the decoder's URI.

    The tokenizer may lie in the folder of the world that was trained on it. `machine` as in train_tokenizer.
    """
    from genie_model.enlarging import train_large_decoder
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    with step("train-decoder", preset, [*machine, *overrides], **where) as run:
        run.dataset(data_uri, expected=data_digest)
        decoder_uri = train_large_decoder(run.config, data_uri, tokenizer_uri, root_uri, run)
        run.made("large_decoder", decoder_uri)
    return decoder_uri
