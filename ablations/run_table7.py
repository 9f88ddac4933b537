"""Table 7: the number of diffusion steps, also with matched flips and without ViLa. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("table7.toml")))
