"""A step that fails where another has found something wrong: that one's own figures would be lost with it."""

from kfp import dsl


@dsl.component(base_image="genie-collect", install_kfp_package=False)
def verdict(held: bool, reason: str) -> str:
    """Fails, for that reason, unless it holds. Returns the reason."""
    if not held:
        raise SystemExit(f"[verdict] {reason}")
    return reason
