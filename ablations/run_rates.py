"""Three learning rates for each family of methods, on held-out labelled images. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("rates.toml")))
