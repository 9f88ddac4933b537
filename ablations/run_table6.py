"""Table 6 of the paper: the weight λ of the cosine distance in the feature distillation. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table6.toml")))
