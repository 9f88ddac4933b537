"""Figure 1: features and masks with and without text, and how well classes cluster. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("figure1.toml")))
