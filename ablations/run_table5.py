"""Table 5 of the paper: what each module adds to the semi-supervised baseline. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table5.toml")))
