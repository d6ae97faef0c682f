"""The command `perceptual-diffusion`."""

import os
import sys


def main() -> None:
    """Run the command; without its extra installed, say how to install it."""
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait, which slows each step many times over on a busy machine. The setting
        # is read when torch is loaded, and that has happened: start again with it.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, sys.orig_argv)
    try:
        from perceptual_diffusion.cli._app import app
    except Exception as error:
        if sys.argv[1:2] == ["doctor"]:  # it needs torch alone
            from perceptual_diffusion.cli import doctor

            doctor.main(sys.argv[2:])
            return
        if not isinstance(error, ModuleNotFoundError) or (error.name or "").split(".")[0] == "perceptual_diffusion":
            raise
        sys.exit(
            f"the command needs {error.name!r}, which is not installed. Run `pip install 'perceptual-diffusion[demo,train]'`."
        )
    app()
