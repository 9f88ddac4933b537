"""Table 4 of the paper: rivals on COCO 2017. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table4.toml")))
