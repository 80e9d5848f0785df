"""The champion before is the champion again."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def rollback(tracking_uri: str, dry_run: bool, model_name: str = "genie") -> str:
    """Gives the alias champion back to the version with the alias previous. Returns what became of both in a line."""
    from genie_model.tracking import TrackingError, connect
    from genie_model.tracking import rollback as roll_back

    try:
        told = roll_back(connect(tracking_uri), model_name, dry_run=dry_run)
    except (ValueError, OSError, TrackingError) as error:
        raise SystemExit(f"[rollback] error: {' '.join(str(error).split())}") from None
    return told
