"""Build the site: `python docs/build.py [--no-gallery]` writes docs/_build/html, offline; a warning is an error.

The tutorials take some minutes. Those that have not changed since the last build are not run again. Where the site is not
served at the root of its host, DOCS_URL in the environment says where: the version switcher asks for its list there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Build the site, and give Sphinx's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--no-gallery", action="store_true", help="leave the tutorials out")
    parser.add_argument("--out", type=Path, default=HERE / "_build/html", help="where the site goes")
    arguments = parser.parse_args(argv)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    command += ["-d", str(arguments.out.parent / f".{arguments.out.name}.doctrees"), str(HERE), str(arguments.out)]
    environment = os.environ | ({"DOCS_NO_GALLERY": "1"} if arguments.no_gallery else {})
    environment.pop("TUTORIALS_QUICK", None)  # its pages would be kept, and show nothing
    code = subprocess.run(command, env=environment).returncode
    print(f"{'wrote' if code == 0 else 'warnings or errors above; see'} {arguments.out / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
