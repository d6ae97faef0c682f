"""The command `perceptual-diffusion`."""

import sys


def main() -> None:
    """Run the command; without its extra installed, say how to install it."""
    try:
        from perceptual_diffusion.cli._app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "perceptual_diffusion":
            raise
        sys.exit(
            f"the command needs {error.name!r}, which is not installed. Run `pip install 'perceptual-diffusion[demo]'`."
        )
    app()
