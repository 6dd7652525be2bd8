"""``python -m pycodesign``: the command ``pycodesign``."""

from pycodesign.cli import main

main()
