"""Table 2: rivals on the augmented PASCAL VOC 2012, with two families of lists. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table2.toml")))
