"""Table 1 of the paper: rivals on PASCAL VOC 2012 with the official masks. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table1.toml")))
