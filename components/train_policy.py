"""A policy that clones the expert."""

from kfp import dsl


@dsl.component(base_image="genie-train", install_kfp_package=False)
def train_policy(
    preset: str,
    overrides: list,
    root_uri: str,
    tracking_uri: str,
    experiment: str,
    demonstrations_uri: str,
    model_uri: str = "",
    study: dict = {},  # noqa: B006 - KFP reads the default, nobody changes it
) -> str:
    """Learns from the latent actions of the world model's LAM; without a model from the true ones. Returns its URI."""
    from genie_model.cloning import train_policy as train
    from genie_model.tracking import step

    where = {"root_uri": root_uri, "tracking_uri": tracking_uri, "experiment": experiment, "study": study}
    name = "train-policy-latent" if model_uri else "train-policy-oracle"
    with step(name, preset, overrides, **where) as run:
        policy_uri = train(run.config, demonstrations_uri, root_uri, model_uri, run)
        run.made("policy" if model_uri else "oracle", policy_uri)
    return policy_uri
