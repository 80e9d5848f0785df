"""One step back: `python -m pipelines rollback` does the same from a terminal."""

from components.rollback import rollback as roll_back
from pipelines.placement import place


def rollback(dry_run: bool = False, model_name: str = "genie", tracking_uri: str = "") -> str:
    """Makes the champion before the champion again. The one that goes is marked: no pipeline promotes it again.

    Args:
        dry_run: Say what would happen, and change nothing in the registry.
        model_name: The registered model.
        tracking_uri: The MLflow server; empty takes MLFLOW_TRACKING_URI of the step's environment.
    """
    back = roll_back(tracking_uri=tracking_uri, dry_run=dry_run, model_name=model_name)
    return place(back, "small", "roll back").set_caching_options(False).output
