"""Table 3 of the paper: rivals on Cityscapes. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table3.toml")))
